"""What vLLM accepts in a body, and the words it refuses the rest with: pure functions.

The messages are those of vLLM 0.32.0, of which every error of this server is an imitation (recorded
in tests/golden/vllm-0.32.0). Unknown fields are ignored, as there; a known field that this server
cannot honour is refused, because ignoring it would give wrong answers silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from .sampling import SamplingParams

MAX_LOGPROBS = 20  # vLLM's --max-logprobs
DEFAULT_MAX_TOKENS = 16  # vLLM's, of /v1/completions and of SamplingParams alike
_UNSUPPORTED = (
    "echo", "suffix", "prompt_embeds", "prompt_logprobs", "stop", "use_beam_search",
    "response_format", "structured_outputs", "bad_words", "allowed_token_ids",
)  # fmt: skip

T = TypeVar("T")
Body = Mapping[str, Any]


class VllmError(Exception):
    """An answer in vLLM's error shape.

    Args:
        message: Its message.
        status: The HTTP status, which is also its ``code``.
        kind: Its ``type``.
        param: Its ``param``, the field at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "BadRequestError",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """A body that was found sound.

    Args:
        prompts: Token ids of each prompt.
        params: How to sample.
        n: Answers for each prompt.
        request_id: The body's own id; None where it gives none.
        stream: Answer in server-sent events.
        include_usage: End the stream with a chunk that holds the usage.
        return_token_ids: Name the ids of prompt and answer.
        tokens_as_ids: Write tokens as ``token_id:123``.
    """

    prompts: tuple[list[int], ...]
    params: SamplingParams
    n: int = 1
    request_id: str | None = None
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False


def engine_error() -> VllmError:
    """What every caller of a dead engine is told."""
    return VllmError(
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        status=500,
        kind="InternalServerError",
    )


def rpc_error(reason: str) -> VllmError:
    """What the caller of a failed ``collective_rpc`` is told."""
    return VllmError(
        f"Call to collective_rpc method failed: Worker failed with error '{reason}', "
        "please check the stack trace above for the root cause",
        status=500,
        kind="InternalServerError",
    )


def missing(field: str) -> VllmError:
    """A control route's body lacks ``field``."""
    return VllmError(f"Missing '{field}' in request body", kind="Bad Request")


def validation_error(loc: str, kind: str, msg: str, value: object, **ctx: object) -> VllmError:
    """Imitate how vLLM prints one pydantic error; containers are summed up, as it does."""
    detail: dict[str, object] = {"type": kind, "loc": loc, "msg": msg, "input": _shown(value)}
    if ctx:
        detail["ctx"] = ctx
    return VllmError(f"1 validation error:\n  {detail}", kind="Bad Request", param=loc)


def _shown(value: object) -> str:
    if isinstance(value, list | dict):
        return f"<{type(value).__name__} of {len(value)} items>"
    return str(value)[:100]


def decode_body(raw: bytes) -> dict[str, Any]:
    """Parse a body that has to be a JSON object; an empty one is ``{}``."""
    if not raw:
        return {}
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        message = "JSON decode error"
        raise validation_error("body", "json_invalid", message, {}, error=str(exc)) from exc
    if not isinstance(body, dict):
        message = "Input should be a valid dictionary or object to extract fields from"
        raise validation_error("body", "model_attributes_type", message, body)
    return body


def read_completion(
    body: Body, *, model: str, vocab_size: int, max_model_len: int
) -> GenerateRequest:
    """Read the body of ``/v1/completions``.

    Raises:
        VllmError: As vLLM would answer.
    """
    _check_supported(body)
    prompts = _prompts(body.get("prompt"))
    params = _sampling(body, "body", logprobs=_integer(body, "logprobs", None))
    return _checked(body, prompts, params, model, vocab_size, max_model_len)


def read_tokens(body: Body, *, model: str, vocab_size: int, max_model_len: int) -> GenerateRequest:
    """Read the body of ``/inference/v1/generate``, which nests the sampling parameters.

    Raises:
        VllmError: As vLLM would answer.
    """
    if "token_ids" not in body:
        raise validation_error("body.token_ids", "missing", "Field required", dict(body))
    sampling = body.get("sampling_params")
    if not isinstance(sampling, dict):
        message = "Input should be an object"
        raise validation_error("body.sampling_params", "dataclass_type", message, sampling)
    _check_supported(sampling)
    prompt = _token_ids(body["token_ids"], "body.token_ids")
    loc = "body.sampling_params"
    params = _sampling(sampling, loc, logprobs=_integer(sampling, "logprobs", None, loc))
    flat = {**body, "n": sampling.get("n", 1)}
    return _checked(flat, (prompt,), params, model, vocab_size, max_model_len)


def _checked(
    body: Body,
    prompts: tuple[list[int], ...],
    params: SamplingParams,
    model: str,
    vocab_size: int,
    max_model_len: int,
) -> GenerateRequest:
    _check_model(body.get("model"), model)
    _check_sampling(params, vocab_size)
    for prompt in prompts:
        _check_prompt(prompt, vocab_size, max_model_len)
    options = body.get("stream_options")
    return GenerateRequest(
        prompts=prompts,
        params=params,
        n=_at_least_one(_integer(body, "n", 1), "n"),
        request_id=_text(body, "request_id"),
        stream=_flag(body, "stream"),
        include_usage=isinstance(options, dict) and _flag(options, "include_usage"),
        return_token_ids=_flag(body, "return_token_ids"),
        tokens_as_ids=_flag(body, "return_tokens_as_token_ids"),
    )


def _check_supported(body: Body) -> None:
    for name in _UNSUPPORTED:
        if body.get(name) not in (None, False, [], "", {}):
            raise VllmError(f"{name} is not supported by this embedded server", param=name)


def _check_model(asked: object, served: str) -> None:
    if asked not in (None, "", served):
        raise VllmError(
            f"The model `{asked}` does not exist. Valid aliases: {served}.",
            status=404,
            kind="NotFoundError",
            param="model",
        )


def _prompts(value: object) -> tuple[list[int], ...]:
    if value is None:
        raise _value_error("Either prompt or prompt_embeds must be provided and non-empty.",
                           "prompt")  # fmt: skip
    if value in ([], ""):
        raise VllmError("You must pass at least one prompt")
    if isinstance(value, str) or (isinstance(value, list) and isinstance(value[0], str)):
        raise VllmError("This server has no tokenizer; give the prompt as token ids")
    if isinstance(value, list) and isinstance(value[0], list):
        return tuple(_token_ids(prompt, f"body.prompt.{i}") for i, prompt in enumerate(value))
    return (_token_ids(value, "body.prompt"),)


def _token_ids(value: object, loc: str) -> list[int]:
    if not isinstance(value, list):
        raise validation_error(loc, "list_type", "Input should be a valid list", value)
    for index, item in enumerate(value):
        if type(item) is not int:
            message = "Input should be a valid integer"
            raise validation_error(f"{loc}.{index}", "int_type", message, item)
        if item < 0:
            message = "Input should be greater than or equal to 0"
            raise validation_error(f"{loc}.{index}", "greater_than_equal", message, item, ge=0)
    return value


def _check_prompt(prompt: Sequence[int], vocab_size: int, max_model_len: int) -> None:
    if not prompt:
        raise VllmError("You must pass at least one prompt")
    if max(prompt) >= vocab_size:
        raise VllmError(f"Token id {max(prompt)} is out of vocabulary")
    if len(prompt) >= max_model_len:
        raise _value_error(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt "
            f"contains {len(prompt)} input tokens, which exceeds this limit even without any "
            "output tokens. Please reduce the length of the input prompt.",
            "input_tokens",
            len(prompt),
        )


def _sampling(body: Body, loc: str, *, logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=_integer(body, "max_tokens", DEFAULT_MAX_TOKENS, loc),
        min_tokens=_integer(body, "min_tokens", 0, loc) or 0,
        temperature=_number(body, "temperature", 1.0, loc),
        top_p=_number(body, "top_p", 1.0, loc),
        top_k=_integer(body, "top_k", 0, loc) or 0,
        min_p=_number(body, "min_p", 0.0, loc),
        seed=_integer(body, "seed", None, loc),
        stop_token_ids=frozenset(
            _token_ids(body.get("stop_token_ids") or [], f"{loc}.stop_token_ids")
        ),
        ignore_eos=_flag(body, "ignore_eos", loc),
        logit_bias=_bias(body.get("logit_bias")),
        presence_penalty=_number(body, "presence_penalty", 0.0, loc),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, loc),
        repetition_penalty=_number(body, "repetition_penalty", 1.0, loc),
        logprobs=logprobs,
    )


def _bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    try:
        return {int(key): float(bias) for key, bias in value.items()}  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError) as exc:
        message = "Input should be a valid dictionary"
        raise validation_error("body.logit_bias", "dict_type", message, value) from exc


def _check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Refuse values out of range, in the order and words of vLLM's SamplingParams."""
    if params.temperature < 0:
        raise _value_error(f"temperature must be non-negative, got {params.temperature}.",
                           "temperature", params.temperature)  # fmt: skip
    if params.max_tokens is not None and params.max_tokens < 1:
        raise _value_error(f"max_tokens must be at least 1, got {params.max_tokens}.",
                           "max_tokens", params.max_tokens)  # fmt: skip
    _check_filters(params)
    _check_penalties(params)
    _check_ids(params, vocab_size)
    if params.logprobs is not None and not 0 <= params.logprobs <= MAX_LOGPROBS:
        raise _value_error(
            f"Requested sample logprobs of {params.logprobs}, which is greater than max allowed: "
            f"{MAX_LOGPROBS}",
            "logprobs",
            params.logprobs,
        )


def _check_filters(params: SamplingParams) -> None:
    if not 0 < params.top_p <= 1:
        raise _value_error(f"top_p must be in (0, 1], got {params.top_p}.", "top_p", params.top_p)
    if params.top_k < -1:
        raise _value_error(f"top_k must be 0 (disable), or at least 1, got {params.top_k}.",
                           "top_k", params.top_k)  # fmt: skip
    if not 0 <= params.min_p <= 1:
        raise _value_error(f"min_p must be in [0, 1], got {params.min_p}.", "min_p", params.min_p)


def _check_penalties(params: SamplingParams) -> None:
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if not -2 <= value <= 2:
            raise _value_error(f"{name} must be in [-2, 2], got {value}.", name, value)
    if params.repetition_penalty <= 0:
        raise _value_error(f"repetition_penalty must be greater than zero, got "
                           f"{params.repetition_penalty}.",
                           "repetition_penalty", params.repetition_penalty)  # fmt: skip


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    if params.min_tokens < 0 or params.min_tokens > (params.max_tokens or math.inf):
        raise _value_error(
            "min_tokens must be greater than or equal to 0 and at most max_tokens="
            f"{params.max_tokens}, got {params.min_tokens}.",
            "min_tokens",
            params.min_tokens,
        )
    outside = [i for i in (*params.logit_bias, *params.stop_token_ids) if not 0 <= i < vocab_size]
    if outside:
        raise VllmError(f"Token id {outside[0]} is out of vocabulary")


def _value_error(message: str, param: str, value: object = None) -> VllmError:
    """Imitate vLLM's own validation errors, which repeat the parameter at the end."""
    where = f"(parameter={param})" if value is None else f"(parameter={param}, value={value})"
    return VllmError(f"{message} {where}", param=param)


def _at_least_one(value: int | None, name: str) -> int:
    if value is None or value < 1:
        raise _value_error(f"{name} must be at least 1, got {value}.", name, value)
    return value


def _integer(body: Body, name: str, default: int | None, loc: str = "body") -> int | None:
    return _parsed(body, name, default, loc, _to_int, "int_parsing", "integer")


def _number(body: Body, name: str, default: float, loc: str = "body") -> float:
    value = _parsed(body, name, default, loc, _to_float, "float_parsing", "number")
    return default if value is None else value


def _flag(body: Body, name: str, loc: str = "body") -> bool:
    value = _parsed(body, name, False, loc, _to_bool, "bool_parsing", "boolean")
    return bool(value)


def _text(body: Body, name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        message = "Input should be a valid string"
        raise validation_error(f"body.{name}", "string_type", message, value)
    return value


def _parsed(
    body: Body,
    name: str,
    default: T | None,
    loc: str,
    convert: Callable[[Any], T],
    kind: str,
    noun: str,
) -> T | None:
    """Read one field as leniently as pydantic does: null is the default, "8" is a number."""
    value = body.get(name)
    if value is None:
        return default
    try:
        return convert(value)
    except (TypeError, ValueError) as exc:
        suffix = f", unable to parse string as {_article(noun)}" if isinstance(value, str) else ""
        message = f"Input should be a valid {noun}{suffix}"
        raise validation_error(f"{loc}.{name}", kind, message, value) from exc


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _to_int(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("a fraction")
    if not isinstance(value, int | float | str):
        raise TypeError("no number")
    return int(value)


def _to_float(value: Any) -> float:
    if not isinstance(value, int | float | str):
        raise TypeError("no number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


def _to_bool(value: Any) -> bool:
    table = {True: True, False: False, "true": True, "false": False}
    if not isinstance(value, bool | int | str) or value not in table:
        raise ValueError("no boolean")
    return table[value]
