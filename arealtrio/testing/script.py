"""ScriptedModel: answers that count down to the end of the sequence.

An answer of L tokens is ``EOS + L - 1, …, EOS + 1, EOS``. So the next token follows from the last
one, as in a real model: an answer that was interrupted goes on where it stopped, on whatever
server, and a test sees at once whether a token was lost or made twice. The log-probability of a
token says which weights made it, so that a test can check every reported version against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ..checks import integer
from ..embedded.sampling import Logits, SamplingParams
from ..errors import UsageError

EOS: Final = 1_000_000
"""Prompts are to use ids below it; every generated id is at least it."""
LONGEST: Final = 1_000_000
"""The longest answer, in tokens."""
TORN: Final = -2
"""What ``made_by`` returns for a token of weights that were loaded by half."""
_CHECKPOINT: Final = "/simulated/checkpoint"
_SCALE: Final = 2.0**-10  # log-probabilities are multiples of it, which float32 holds exactly


@dataclass(frozen=True, slots=True)
class ScriptedModel:
    """The weights of one training step, of which nothing matters but their number.

    Args:
        version: That number, at least 0.
        torn: Whether some of its tensors are of other weights. Tokens of such a model were made by
            no version at all.
    """

    version: int
    torn: bool = False

    @property
    def vocab_size(self) -> int:
        """Prompt ids, and one id for each number of tokens that may still follow."""
        return EOS + LONGEST

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return EOS

    @property
    def logprob(self) -> float:
        """Of every token that these weights make."""
        return -(self.version + (1.5 if self.torn else 1)) * _SCALE

    def next_logits(self, sequences: Sequence[Sequence[int]]) -> Logits:  # noqa: ARG002
        """Not to be asked for: answers are planned whole, see ``TimedScheduler``."""
        raise UsageError("a scripted model has no logits; run it by TimedScheduler")


def made_by(logprob: float) -> int:
    """Return the version of the weights that made a token with this log-probability.

    ``TORN`` where they were no version's: a load of weights had failed half-way.
    """
    number = -logprob / _SCALE
    return round(number) - 1 if number.is_integer() else TORN


def checkpoint(version: int) -> str:
    """Return the path from which simulated servers load the weights of a version.

    Raises:
        ConfigError: ``version`` is no integer of at least 0.
    """
    return f"{_CHECKPOINT}-{integer('version', version, 0)}"


def load(path: Path) -> ScriptedModel:
    """Return the weights at ``path``.

    Raises:
        FileNotFoundError: If it is not a path that ``checkpoint`` gives.
    """
    stem, _, number = str(path).rpartition("-")
    if stem != _CHECKPOINT or not number.isdecimal():
        raise FileNotFoundError(f"no simulated checkpoint: {path}")
    return ScriptedModel(int(number))


class Plan(NamedTuple):
    """The whole answer to one request, before a token of it is made.

    Args:
        first: Its first token; each further one is smaller by 1.
        length: Its tokens.
        stop_reason: The stop id that ends it, if one does.
        stopped: Whether it ends by itself; else the budget does.
    """

    first: int
    length: int
    stop_reason: int | None
    stopped: bool


def continues(token_ids: Sequence[int]) -> bool:
    """Whether a prompt ends in the middle of an answer."""
    return token_ids[-1] > EOS


def plan(token_ids: Sequence[int], params: SamplingParams, budget: int, drawn: int) -> Plan:
    """Plan an answer.

    Args:
        token_ids: The prompt, which may end in the middle of an answer.
        params: Where to stop. With ``ignore_eos`` the answer is as long as its budget.
        budget: Tokens at most.
        drawn: The length of a new answer in tokens; unused where one goes on.
    """
    first = _first_token(token_ids, params, budget, drawn)
    soonest = first - params.min_tokens  # a token above it comes too early to stop at
    stops = [token for token in params.stop_token_ids if EOS < token <= soonest]
    if soonest >= EOS and not params.ignore_eos:
        stops.append(EOS)
    if not stops or first - max(stops) >= budget:
        return Plan(first, budget, None, stopped=False)
    last = max(stops)
    return Plan(first, first - last + 1, last if last != EOS else None, stopped=True)


def _first_token(token_ids: Sequence[int], params: SamplingParams, budget: int, drawn: int) -> int:
    if params.ignore_eos:
        return EOS + budget - 1
    if continues(token_ids):
        return token_ids[-1] - 1
    return EOS + min(max(drawn, params.min_tokens + 1), LONGEST) - 1
