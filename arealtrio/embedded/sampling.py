"""How one token is drawn from one row of logits: pure numpy, no state but the generator given.

The order of the filters is vLLM's: penalties and bias change the logits, the temperature divides
them, then min_p, top_k and top_p drop candidates, then one token is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Logits: TypeAlias = npt.NDArray[np.floating[Any]]
LogprobsMode: TypeAlias = Literal["raw_logprobs", "processed_logprobs", "scaled_logprobs"]
_LARGEST = 1e300  # of a logit: whatever penalty and bias are asked for, it stays a number
GREEDY_BELOW = 1e-5  # vLLM's limit: a smaller temperature means the most probable token


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one sequence is sampled and where it ends; the names are vLLM's.

    The door that parses a request checks the ranges; nothing here does.

    Args:
        max_tokens: Tokens to generate at most; None: as many as the model's length leaves.
        min_tokens: Before this many tokens, neither EOS nor a stop id can be drawn.
        temperature: 0 (anything below 1e-5) takes the most probable token.
        top_p: Smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: Tokens kept; 0 or less keeps all.
        min_p: Tokens kept are at least this share as probable as the best; 0 keeps all.
        seed: Of this sequence's generator; None: derived from the server's.
        stop_token_ids: Generation ends with one of these, which is part of the output.
        ignore_eos: Go on past the end-of-sequence token.
        logit_bias: Added to the logits, by token id.
        presence_penalty: Subtracted once from every token in the output.
        frequency_penalty: Subtracted per occurrence in the output.
        repetition_penalty: Divides (or, if negative, multiplies) every logit seen so far, the
            prompt included; 1 is off.
        logprobs: None: not wanted; k: the drawn token's and those of the k most probable.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn by chance."""
        return self.temperature < GREEDY_BELOW

    def numbered(self, number: int) -> SamplingParams:
        """Return these parameters for answer ``number`` of one prompt: its own seed, if any."""
        if self.seed is None or not number:
            return self
        return replace(self, seed=self.seed + number)

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens so far by more than the model."""
        return (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
        )


class TokenLogprob(NamedTuple):
    """One candidate: its log-probability and its place, 1 being the most probable."""

    token_id: int
    logprob: float
    rank: int


class Drawn(NamedTuple):
    """The token that was drawn, and what is reported about it."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[TokenLogprob, ...]


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Normalise each row to log-probabilities, in float64 and safe against overflow.

    Args:
        logits: float[…, V].
    """
    wide = np.asarray(logits, dtype=np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    normalised: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


def draw(
    logits: Logits,
    raw_logprobs: npt.NDArray[np.float64],
    params: SamplingParams,
    rng: np.random.Generator,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    forbidden: Sequence[int] = (),
    mode: LogprobsMode = "raw_logprobs",
) -> Drawn:
    """Draw one token.

    Args:
        logits: float[V], as the model gave them; left unchanged.
        raw_logprobs: float64[V], ``log_softmax(logits)``; computed by the caller for a whole batch.
        params: How to draw.
        rng: Advanced by one number, by none if greedy.
        prompt: The prompt's token ids, for the repetition penalty.
        output: The tokens generated so far, for the penalties.
        forbidden: Ids that cannot be drawn now (EOS and stop ids below ``min_tokens``).
        mode: ``raw_logprobs`` reports the model's own distribution; ``scaled_logprobs`` the one
            after bias, penalties and temperature; ``processed_logprobs`` the one that was drawn
            from, after the filters too.
    """
    scaled = _scaled(logits, raw_logprobs, params, prompt, output, forbidden)
    processed = _filtered(scaled, params)
    token_id = int(processed.argmax()) if params.greedy else _inverse_cdf(processed, rng)
    reported = {
        "raw_logprobs": raw_logprobs, "scaled_logprobs": scaled, "processed_logprobs": processed,
    }  # fmt: skip
    return _report(token_id, reported[mode], params)


def _scaled(
    logits: Logits,
    raw_logprobs: npt.NDArray[np.float64],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    forbidden: Sequence[int],
) -> npt.NDArray[np.float64]:
    """Return log-probabilities after all that changes logits; -inf where forbidden."""
    plain = not (params.logit_bias or params.penalised or forbidden)
    if plain and (params.temperature == 1 or params.greedy):
        return raw_logprobs
    changed = np.array(logits, dtype=np.float64)
    with np.errstate(over="ignore"):
        _penalise(changed, params, prompt, output)
        np.clip(changed, -_LARGEST, _LARGEST, out=changed)
        for token_id, bias in params.logit_bias.items():
            changed[token_id] = np.clip(changed[token_id] + bias, -_LARGEST, _LARGEST)
    if len(forbidden) < changed.size:  # else nothing would be left to draw
        changed[list(forbidden)] = -np.inf
    if not params.greedy:
        changed /= params.temperature
    return log_softmax(changed)


def _penalise(
    logits: npt.NDArray[np.float64],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
) -> None:
    """Change ``logits`` in place by OpenAI's two penalties and CTRL's repetition penalty."""
    if not params.penalised:
        return
    seen = np.unique(np.asarray([*prompt, *output], dtype=np.int64))
    row = logits[seen]
    penalty = params.repetition_penalty
    logits[seen] = np.where(row > 0, row / penalty, row * penalty)
    ids, counts = np.unique(np.asarray(output, dtype=np.int64), return_counts=True)
    logits[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _filtered(logprobs: npt.NDArray[np.float64], params: SamplingParams) -> npt.NDArray[np.float64]:
    """Drop candidates by min_p, top_k and top_p; greedy needs none of them."""
    everything = params.min_p <= 0 and params.top_k <= 0 and params.top_p >= 1
    if params.greedy or everything:
        return logprobs
    kept = logprobs.copy()
    if params.min_p > 0:
        kept[kept < kept.max() + np.log(params.min_p)] = -np.inf
    if 0 < params.top_k < kept.size:
        kept[np.argsort(-kept, kind="stable")[params.top_k :]] = -np.inf
    if params.top_p < 1:
        _keep_nucleus(kept, params.top_p)
    return log_softmax(kept)


def _keep_nucleus(logprobs: npt.NDArray[np.float64], top_p: float) -> None:
    """Drop, in place, every token that comes after the mass ``top_p`` is reached."""
    order = np.argsort(-logprobs, kind="stable")
    probabilities = np.exp(logprobs[order])
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities  # the best token always stays
    logprobs[order[before >= top_p]] = -np.inf


def _inverse_cdf(logprobs: npt.NDArray[np.float64], rng: np.random.Generator) -> int:
    """Draw with one number: the first token whose cumulative mass exceeds it."""
    mass = np.cumsum(np.exp(logprobs))
    index = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    return min(index, logprobs.size - 1)


def _report(token_id: int, logprobs: npt.NDArray[np.float64], params: SamplingParams) -> Drawn:
    chosen = float(logprobs[token_id])
    if params.logprobs is None:
        return Drawn(token_id, chosen, 0, ())
    rank = int((logprobs > chosen).sum()) + 1
    return Drawn(token_id, chosen, rank, _best(logprobs, params.logprobs))


def _best(logprobs: npt.NDArray[np.float64], count: int) -> tuple[TokenLogprob, ...]:
    if not count:
        return ()
    order = np.argsort(-logprobs, kind="stable")[:count]
    return tuple(
        TokenLogprob(int(token_id), float(logprobs[token_id]), rank)
        for rank, token_id in enumerate(order, start=1)
    )
