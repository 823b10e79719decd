"""What SGLang accepts in a ``/generate`` body, and the words it refuses the rest with.

The messages are those of SGLang 0.5.23. Unknown fields are ignored, as there; a known field that
this server cannot honour is refused, because ignoring it would give wrong answers silently.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar

import msgspec

from .http import NOT_JSON
from .sampling import SamplingParams
from .sglang_error import SglangError, malformed

MAX_PENALTY = 2.0
_UNSUPPORTED = ("text", "input_embeds", "video_data", "audio_data", "session_params")
_UNSUPPORTED_SAMPLING = (
    "stop", "stop_regex", "json_schema", "regex", "ebnf", "structural_tag", "beam_width",
)  # fmt: skip
T = TypeVar("T")
_VALUES_OF: dict[tuple[str, ...], Callable[[object], tuple[Any, ...]]] = {
    names: attrgetter(*names) for names in (_UNSUPPORTED, _UNSUPPORTED_SAMPLING)
}


class Sampling(msgspec.Struct, kw_only=True):
    """``sampling_params``; the defaults are SGLang's."""

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: int | float = 1.0  # as sent, because a refusal repeats it
    top_p: int | float = 1.0
    top_k: int = -1
    min_p: int | float = 0.0
    frequency_penalty: int | float = 0.0
    presence_penalty: int | float = 0.0
    repetition_penalty: int | float = 1.0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    n: int = 1
    stop: Any = None
    stop_regex: Any = None
    json_schema: Any = None
    regex: Any = None
    ebnf: Any = None
    structural_tag: Any = None
    beam_width: int | None = None


class GenerateBody(msgspec.Struct, kw_only=True):
    """The body of ``/generate``."""

    input_ids: list[Any] | None = None
    rid: str | list[str] | None = None
    sampling_params: Sampling | list[Sampling] | None = None
    return_logprob: bool | list[bool] | None = None
    top_logprobs_num: int | list[int] | None = None
    logprob_start_len: int | list[int] | None = None
    lora_path: str | list[str | None] | None = None
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    stream: bool = False
    text: Any = None
    input_embeds: Any = None
    image_data: list[str] | None = None
    video_data: Any = None
    audio_data: Any = None
    session_params: Any = None

    def __post_init__(self) -> None:
        """One prompt or several: a union that msgspec has no type for."""
        ids = self.input_ids
        if ids and set(map(type, ids)) != {int}:  # which is one prompt, and sound
            kind: Any = list[list[int]] if isinstance(ids[0], list) else list[int]
            self.input_ids = msgspec.convert(ids, kind)


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of a request.

    Args:
        rid: Its id, by which it is aborted.
        prompt: Token ids.
        sampling: As sent.
        logprobs: Whether to report logprobs.
        lora: The adapter asked for.
        experts_from: The first token whose experts are to be told; None: of none.
        images: For the placeholders in the prompt.
    """

    rid: str
    prompt: list[int]
    sampling: Sampling
    logprobs: bool
    lora: str | None
    experts_from: int | None = None
    images: tuple[str, ...] = ()


class GenerateRequest(msgspec.Struct, frozen=True):
    """A body whose shape was found sound.

    Args:
        items: Its prompts.
        batch: Whether the answer is a list, because the prompts were one.
    """

    items: tuple[Item, ...]
    batch: bool


def decode(raw: bytes, kind: type[T]) -> T:
    """Parse a body; an empty one is ``{}``.

    Raises:
        SglangError: It is no JSON object, or a field has a wrong type.
    """
    try:
        return msgspec.json.decode(raw or b"{}", type=kind, strict=False)
    except NOT_JSON as exc:
        raise malformed(f"1 validation error: {exc}") from exc


def read_generate(body: GenerateBody) -> GenerateRequest:
    """Make prompts of a body, or of a batch.

    Raises:
        SglangError: The prompts are missing or empty, lists differ in length, or something is asked
            for that this server does not have.
    """
    _check_supported(body, _UNSUPPORTED)
    prompts, batch = _prompts(body.input_ids)
    count = len(prompts)
    sampling = body.sampling_params or Sampling()
    items = [
        Item(
            rid=rid,
            prompt=prompt,
            sampling=params,
            logprobs=bool(logprobs),
            lora=lora or None,
            experts_from=_experts_from(body, prompt),
            images=tuple(body.image_data or ()),
        )
        for rid, prompt, params, logprobs, lora in zip(
            _rids(body.rid, count, batch=batch),
            prompts,
            _spread(sampling, count, "sampling_params"),
            _spread(body.return_logprob, count, "return_logprob"),
            _spread(body.lora_path, count, "lora_path"),
            strict=True,
        )
    ]
    for item in items:
        _check_supported(item.sampling, _UNSUPPORTED_SAMPLING)
    _check_logprob_options(body, items)
    return GenerateRequest(tuple(items), batch)


def _experts_from(body: GenerateBody, prompt: list[int]) -> int | None:
    start = body.routed_experts_start_len
    if not body.return_routed_experts:
        return None
    if not 0 <= start <= len(prompt):
        raise SglangError(f"recv_req.routed_experts_start_len={start} is out of the input's range.")
    return start


def _check_supported(body: object, names: tuple[str, ...]) -> None:
    values = _VALUES_OF[names](body)
    if values.count(None) == len(values):  # nearly always
        return
    for name, value in zip(names, values, strict=True):
        if value is not None and value not in ([], ""):
            raise SglangError(f"{name} is not supported by this embedded server")


def _check_logprob_options(body: GenerateBody, items: Iterable[Item]) -> None:
    if body.top_logprobs_num not in (None, 0):
        raise _unsupported_value("top_logprobs_num")
    if body.logprob_start_len not in (None, -1):
        raise _unsupported_value("logprob_start_len")
    for item in items:
        if item.sampling.n != 1:
            raise _unsupported_value("n")


def _unsupported_value(name: str) -> SglangError:
    return SglangError(f"this value of {name} is not supported by this embedded server")


def _prompts(value: list[Any] | None) -> tuple[list[list[int]], bool]:
    if value is None:
        raise SglangError("Either text, input_ids or input_embeds should be provided.")
    if not value:
        raise SglangError("input_ids cannot be empty.")
    batch = isinstance(value[0], list)
    prompts = value if batch else [value]
    if not all(prompts):
        raise SglangError("input_ids cannot be empty.")
    return prompts, batch


def _rids(value: str | list[str] | None, count: int, *, batch: bool) -> list[str]:
    if value is None:
        return [secrets.token_hex(16) for _ in range(count)]
    if isinstance(value, str):
        return [f"{value}_{i}" for i in range(count)] if batch else [value]
    if len(value) != count:
        raise SglangError(
            "The specified rids length mismatch with the batch_size for batch processing."
        )
    twice = [rid for rid, times in Counter(value).items() if times > 1]
    if twice:
        raise SglangError(f"Duplicate request IDs detected within the request: {twice}")
    return value


def _spread(value: Any, count: int, name: str) -> list[Any]:
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise SglangError(f"The length of {name} should be equal to the batch size.")
    return value


def sampling_params(item: Item, *, vocab_size: int, max_model_len: int) -> SamplingParams:
    """Check one prompt and its parameters against the model, and return how to sample.

    Two rules of SGLang differ from vLLM's: prompt and ``max_new_tokens`` together must fit, and
    ``ignore_eos`` ignores ``stop_token_ids`` as well.

    Args:
        item: The prompt.
        vocab_size: Stop ids and biases are below it. The prompt's ids are not looked at.
        max_model_len: Prompt and answer together at most.

    Raises:
        SglangError: As SGLang would answer.
    """
    _check_length(item, max_model_len)
    return _params(msgspec.msgpack.encode(item.sampling), vocab_size)


@lru_cache
def _params(written: bytes, vocab_size: int) -> SamplingParams:
    """Check sampling parameters, which are the same from request to request."""
    sampling = msgspec.msgpack.decode(written, type=Sampling)
    _check_ranges(sampling)
    _check_lengths(sampling)
    biased = _biases(sampling, vocab_size)
    stop_ids = [] if sampling.ignore_eos else (sampling.stop_token_ids or [])
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        temperature=float(sampling.temperature),
        top_p=float(sampling.top_p),
        top_k=max(sampling.top_k, 0),
        min_p=float(sampling.min_p),
        seed=sampling.sampling_seed,
        stop_token_ids=frozenset(i for i in stop_ids if 0 <= i < vocab_size),
        ignore_eos=sampling.ignore_eos,
        logit_bias=biased,
        presence_penalty=float(sampling.presence_penalty),
        frequency_penalty=float(sampling.frequency_penalty),
        repetition_penalty=float(sampling.repetition_penalty),
    )


def _check_length(item: Item, limit: int) -> None:
    length, wanted = len(item.prompt), item.sampling.max_new_tokens
    if length >= limit:
        raise SglangError(
            f"The input ({length} tokens) is longer than the model's context length "
            f"({limit} tokens)."
        )
    if wanted is not None and length + wanted > limit:
        raise SglangError(
            f"Requested token count exceeds the model's maximum context length of {limit} tokens. "
            f"You requested a total of {length + wanted} tokens: {length} tokens from the input "
            f"messages and {wanted} tokens for the completion. Please reduce the number of tokens "
            "in the input messages or the completion to fit within the limit."
        )


def _check_ranges(sampling: Sampling) -> None:
    """In the order of SGLang's ``SamplingParams.verify``."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise _out("temperature must be a non-negative finite number", sampling.temperature)
    if not 0 < sampling.top_p <= 1:
        raise _out("top_p must be in (0, 1]", sampling.top_p)
    if not 0 <= sampling.min_p <= 1:
        raise _out("min_p must be in [0, 1]", sampling.min_p)
    if sampling.top_k < 1 and sampling.top_k != -1:
        raise _out("top_k must be -1 (disable) or at least 1", sampling.top_k)
    for name in ("frequency_penalty", "presence_penalty"):
        if not -MAX_PENALTY <= getattr(sampling, name) <= MAX_PENALTY:
            raise _out(f"{name} must be in [-2, 2]", getattr(sampling, name))
    if not 0 < sampling.repetition_penalty <= MAX_PENALTY:
        allowed = "repetition_penalty must be in (0, 2] (1.0 = no penalty)"
        raise _out(allowed, sampling.repetition_penalty)


def _check_lengths(sampling: Sampling) -> None:
    least, most = sampling.min_new_tokens, sampling.max_new_tokens
    if least < 0:
        raise _out("min_new_tokens must be in [0, max_new_tokens]", least)
    if most is not None and most < 0:
        raise _out("max_new_tokens must be at least 0", most)
    if most == 0:
        raise SglangError("max_new_tokens 0 is not supported by this embedded server")
    if most is not None and least > most:
        raise _out(f"min_new_tokens must be in [0, max_new_tokens({most})]", least)


def _biases(sampling: Sampling, vocab_size: int) -> dict[int, float]:
    biases = sampling.logit_bias or {}
    for token_id in biases:
        if not (token_id.isdecimal() and int(token_id) < vocab_size):
            raise _out(f"logit_bias must has keys in [0, {vocab_size - 1}]", token_id)
    return {int(token_id): bias for token_id, bias in biases.items()}


def _out(allowed: str, value: object) -> SglangError:
    return SglangError(f"{allowed}, got {value}.")
