"""vLLM's chat route, for what only a server can turn into tokens: messages with images.

The server applies its chat template, puts an image's tokens in the place of the image, and tells
the tokens of prompt and answer. Recordings: chat_logprobs.json, chat_plain.json.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from ..errors import ProtocolError
from ..types import HttpResponse
from . import body
from .dialect import SegmentResponse
from .experts import read_npy
from .status import check_status
from .stream import Logprob, TokenId
from .tokens import check_same, check_tokens
from .versions import read_label
from .vllm_choice import SERVER, Choice, stop_reason_of

CHAT_ROUTE: Final = "/v1/chat/completions"


class _Record(msgspec.Struct):
    token: str
    logprob: Logprob = None


class _Logprobs(msgspec.Struct):
    content: list[_Record] | None = None


class _ChatChoice(Choice):
    token_ids: list[TokenId] | None = None
    logprobs: _Logprobs | None = None


class _Chat(msgspec.Struct):
    choices: list[_ChatChoice]
    prompt_token_ids: list[TokenId] | None = None


def chat_fields(messages: tuple[Any, ...]) -> dict[str, Any]:
    """What a chat asks for beside what all routes name alike."""
    return {
        "messages": messages,
        "logprobs": True,
        "top_logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def parse_chat(response: HttpResponse) -> SegmentResponse:
    """Read the one choice of a chat.

    Raises:
        RequestRejected: On 4xx.
        ServerError: On 5xx.
        ProtocolError: For anything but tokens of prompt and answer, and a logprob for each of the
            latter.
    """
    check_status(response, SERVER)
    answer = body.decode(response.body, _Chat, response, f"a chat from {SERVER}")
    if len(answer.choices) != 1 or not answer.prompt_token_ids:
        raise ProtocolError(f"expected 1 choice and the prompt's token ids from {SERVER}")
    (choice,) = answer.choices
    records = (choice.logprobs or _Logprobs()).content or []
    ids = np.array(choice.token_ids or [], dtype=np.int32)
    described = np.array([_id_of(record.token) for record in records], dtype=np.int32)
    check_same(ids, described, SERVER)
    with np.errstate(over="ignore"):  # looked at below
        told = np.array([record.logprob for record in records], dtype=np.float32)
    ids, logprobs = check_tokens(ids, np.where(np.isinf(told), np.nan, told), SERVER)
    return SegmentResponse(
        token_ids=ids,
        logprobs=logprobs,
        stop_reason=stop_reason_of(choice),
        prompt_ids=np.array(answer.prompt_token_ids, dtype=np.int32),
        routed_experts=read_npy(choice.routed_experts, SERVER),
    )


def _id_of(token: str) -> int:
    number = read_label(token.removeprefix("token_id:"))
    if number is None:
        raise ProtocolError(f"expected token ids from {SERVER}, got text")
    return number
