"""What vLLM accepts in a body, and the words it refuses the rest with: pure functions.

The messages are those of vLLM 0.32.0, of which every error of this server is an imitation (recorded
in tests/golden/vllm-0.32.0). Unknown fields are ignored, as there; a known field that this server
cannot honour is refused, because ignoring it would give wrong answers silently.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from functools import lru_cache

import msgspec

from .images import rendered
from .sampling import SamplingParams
from .vllm_error import VllmError, validation_error, value_error
from .vllm_fields import Body, flag, integer, number, number_by_id, text, token_ids

MAX_LOGPROBS = 20  # vLLM's --max-logprobs
MAX_ANSWERS = 16384  # vLLM's VLLM_MAX_N_SEQUENCES
DEFAULT_MAX_TOKENS = 16  # vLLM's, of /v1/completions and of SamplingParams alike
_UNSUPPORTED = (
    "echo", "suffix", "prompt_embeds", "prompt_logprobs", "stop", "use_beam_search",
    "response_format", "structured_outputs", "bad_words", "allowed_token_ids",
)  # fmt: skip
_SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop_token_ids",
    "ignore_eos", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logprobs", "n", "routed_experts_prompt_start",
)  # fmt: skip


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A body that was found sound.

    Args:
        prompts: Token ids of each prompt.
        params: How to sample.
        model: The name to answer under: the served model's or an adapter's.
        n: Answers for each prompt.
        request_id: The body's own id; None where it gives none.
        stream: Answer in server-sent events.
        include_usage: End the stream with a chunk that holds the usage.
        return_token_ids: Name the ids of prompt and answer.
        tokens_as_ids: Write tokens as ``token_id:123``.
        experts_from: The first token whose experts are told.
    """

    prompts: tuple[list[int], ...]
    params: SamplingParams
    model: str
    n: int = 1
    request_id: str | None = None
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    experts_from: int = 0


class Limits(msgspec.Struct, frozen=True):
    """What a request is checked against.

    Args:
        model: The served model's name.
        vocab_size: Token ids are below it.
        max_model_len: Prompt and answer together at most.
        adapters: Names that may be given in place of the model's.
    """

    model: str
    vocab_size: int
    max_model_len: int
    adapters: Container[str] = ()


def read_completion(body: Body, limits: Limits) -> GenerateRequest:
    """Read the body of ``/v1/completions``.

    Raises:
        VllmError: As vLLM would answer.
    """
    _check_supported(body)
    prompts = _prompts(body.get("prompt"))
    for prompt in prompts:
        if len(prompt) >= limits.max_model_len:
            raise _too_long_for_completions(len(prompt), limits.max_model_len)
    return _checked(body, prompts, _sampling_fields(body), "body", limits)


def read_tokens(body: Body, limits: Limits) -> GenerateRequest:
    """Read the body of ``/inference/v1/generate``, which nests the sampling parameters.

    Raises:
        VllmError: As vLLM would answer.
    """
    for name in ("token_ids", "sampling_params"):
        if name not in body:
            raise validation_error(f"body.{name}", "missing", "Field required", dict(body))
    sampling = body["sampling_params"]
    if not isinstance(sampling, dict):
        message = "Input should be an object"
        raise validation_error("body.sampling_params", "dataclass_type", message, sampling)
    _check_supported(sampling)
    prompt = token_ids(body["token_ids"], "body.token_ids")
    if len(prompt) >= limits.max_model_len:
        raise _too_long_for_tokens(len(prompt), limits.max_model_len)
    return _checked(body, (prompt,), sampling, "body.sampling_params", limits)


def read_chat(body: Body, limits: Limits) -> GenerateRequest:
    """Read the body of ``/v1/chat/completions``; its logprobs are asked for by two fields.

    Raises:
        VllmError: As vLLM would answer, and for a stream, which is not imitated.
    """
    _check_supported(body)
    _check_supported(body, ("stream", "tools"))
    if not body.get("messages"):
        raise validation_error("body.messages", "missing", "Field required", dict(body))
    try:
        prompt = rendered(body["messages"], limits.vocab_size)
    except (ValueError, KeyError, TypeError) as exc:
        raise VllmError(f"messages: {exc}") from exc
    if len(prompt) >= limits.max_model_len:
        raise _too_long_for_completions(len(prompt), limits.max_model_len)
    wanted = integer(body, "top_logprobs", 0) if flag(body, "logprobs") else None
    sampling = {**_sampling_fields(body), "logprobs": wanted}
    return _checked(body, (prompt,), sampling, "body", limits)


def _sampling_fields(body: Body) -> Body:
    """Of a route that has them among the others."""
    return {name: body[name] for name in _SAMPLING if name in body}


def _checked(
    body: Body, prompts: tuple[list[int], ...], sampling: Body, loc: str, limits: Limits
) -> GenerateRequest:
    written = msgspec.json.encode(sampling)
    params = _sampling(written, loc)
    model = _model(body.get("model"), limits)
    _check_sampling(written, loc, limits.vocab_size)
    for prompt in prompts:
        _check_prompt(prompt, limits.vocab_size)
    options = body.get("stream_options")
    return GenerateRequest(
        prompts=prompts,
        params=params,
        model=model,
        n=_answers(integer(sampling, "n", 1, loc)),
        request_id=text(body, "request_id"),
        stream=flag(body, "stream"),
        include_usage=isinstance(options, dict) and flag(options, "include_usage"),
        return_token_ids=flag(body, "return_token_ids"),
        tokens_as_ids=flag(body, "return_tokens_as_token_ids"),
        experts_from=_experts_from(sampling, prompts, loc),
    )


def _experts_from(sampling: Body, prompts: tuple[list[int], ...], loc: str) -> int:
    start = integer(sampling, "routed_experts_prompt_start", 0, loc) or 0
    shortest = min(map(len, prompts))
    if not 0 <= start <= shortest:
        message = (
            "routed_experts_prompt_start must be between 0 and the prompt length "
            f"({shortest}), inclusive."
        )
        raise value_error(message, "routed_experts_prompt_start", start)
    return start


def _check_supported(body: Body, names: Iterable[str] = _UNSUPPORTED) -> None:
    if body.keys().isdisjoint(names):  # nearly always
        return
    for name in names:
        value = body.get(name)
        if value is not None and value is not False and value not in ([], "", {}):
            raise VllmError(f"{name} is not supported by this embedded server", param=name)


def _model(asked: object, limits: Limits) -> str:
    if asked in (None, "", limits.model):
        return limits.model
    if isinstance(asked, str) and asked in limits.adapters:
        return asked
    raise VllmError(
        f"The model `{asked}` does not exist. Valid aliases: {limits.model}.",
        status=404,
        kind="NotFoundError",
        param="model",
    )


def _prompts(value: object) -> tuple[list[int], ...]:
    if value is None:
        message = "Either prompt or prompt_embeds must be provided and non-empty."
        raise value_error(message, "prompt")
    if value in ([], ""):
        raise VllmError("You must pass at least one prompt")
    if isinstance(value, str) or (isinstance(value, list) and isinstance(value[0], str)):
        raise VllmError("This server has no tokenizer; give the prompt as token ids")
    if isinstance(value, list) and isinstance(value[0], list):
        return tuple(token_ids(prompt, f"body.prompt.{i}") for i, prompt in enumerate(value))
    return (token_ids(value, "body.prompt"),)


def _check_prompt(prompt: Sequence[int], vocab_size: int) -> None:
    if not prompt:
        raise VllmError("You must pass at least one prompt")
    if max(prompt) >= vocab_size:
        raise VllmError(f"Token id {max(prompt)} is out of vocabulary")


def _too_long_for_completions(length: int, limit: int) -> VllmError:
    return value_error(
        f"This model's maximum context length is {limit} tokens. However, your prompt contains "
        f"{length} input tokens, which exceeds this limit even without any output tokens. "
        "Please reduce the length of the input prompt.",
        "input_tokens",
        length,
    )


def _too_long_for_tokens(length: int, limit: int) -> VllmError:
    return VllmError(
        f"The decoder prompt (length {length}) is longer than the maximum model length of {limit}. "
        "Make sure that `max_model_len` is no smaller than the number of text tokens."
    )


@lru_cache
def _sampling(written: bytes, loc: str) -> SamplingParams:
    """Read sampling parameters, which are the same from request to request, from their JSON."""
    body: Body = msgspec.json.decode(written)
    return SamplingParams(
        max_tokens=integer(body, "max_tokens", DEFAULT_MAX_TOKENS, loc),
        min_tokens=integer(body, "min_tokens", 0, loc) or 0,
        temperature=number(body, "temperature", 1.0, loc),
        top_p=number(body, "top_p", 1.0, loc),
        top_k=integer(body, "top_k", 0, loc) or 0,
        min_p=number(body, "min_p", 0.0, loc),
        seed=integer(body, "seed", None, loc),
        stop_token_ids=frozenset(
            token_ids(body.get("stop_token_ids") or [], f"{loc}.stop_token_ids")
        ),
        ignore_eos=flag(body, "ignore_eos", loc),
        logit_bias=number_by_id(body, "logit_bias", loc),
        presence_penalty=number(body, "presence_penalty", 0.0, loc),
        frequency_penalty=number(body, "frequency_penalty", 0.0, loc),
        repetition_penalty=number(body, "repetition_penalty", 1.0, loc),
        logprobs=integer(body, "logprobs", None, loc),
    )


@lru_cache
def _check_sampling(written: bytes, loc: str, vocab_size: int) -> None:
    """Refuse values out of range, in the order and words of vLLM's SamplingParams."""
    params = _sampling(written, loc)
    if params.temperature < 0:
        message = f"temperature must be non-negative, got {params.temperature}."
        raise value_error(message, "temperature", params.temperature)
    if params.max_tokens is not None and params.max_tokens < 1:
        message = f"max_tokens must be at least 1, got {params.max_tokens}."
        raise value_error(message, "max_tokens", params.max_tokens)
    _check_filters(params)
    _check_penalties(params)
    _check_ids(params, vocab_size)
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise value_error(
            f"Requested sample logprobs of {params.logprobs}, which is greater than max allowed: "
            f"{MAX_LOGPROBS}",
            "logprobs",
            params.logprobs,
        )


def _check_filters(params: SamplingParams) -> None:
    if not 0 < params.top_p <= 1:
        raise value_error(f"top_p must be in (0, 1], got {params.top_p}.", "top_p", params.top_p)
    if params.top_k < -1:
        message = f"top_k must be 0 (disable), or at least 1, got {params.top_k}."
        raise value_error(message, "top_k", params.top_k)
    if not 0 <= params.min_p <= 1:
        raise value_error(f"min_p must be in [0, 1], got {params.min_p}.", "min_p", params.min_p)


def _check_penalties(params: SamplingParams) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not -2 <= value <= 2:
            raise value_error(f"{name} must be in [-2, 2], got {value}.", name, value)
    if params.repetition_penalty <= 0:
        message = f"repetition_penalty must be greater than zero, got {params.repetition_penalty}."
        raise value_error(message, "repetition_penalty", params.repetition_penalty)


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    if params.min_tokens < 0 or params.min_tokens > (params.max_tokens or math.inf):
        raise value_error(
            "min_tokens must be greater than or equal to 0 and at most max_tokens="
            f"{params.max_tokens}, got {params.min_tokens}.",
            "min_tokens",
            params.min_tokens,
        )
    outside = [i for i in (*params.logit_bias, *params.stop_token_ids) if not 0 <= i < vocab_size]
    if outside:
        raise VllmError(f"Token id {outside[0]} is out of vocabulary")


def _answers(count: int | None) -> int:
    if count is None or not 1 <= count <= MAX_ANSWERS:
        raise value_error(f"n must be between 1 and {MAX_ANSWERS}, got {count}.", "n", count)
    return count
