"""What both dialects check of a question before it is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import InvalidRequest
from .dialect import SegmentRequest, ServerInfo

_VISIBLE = re.compile("[!-~]+").fullmatch
TOP_K_ALL = int(1e8)  # AReaL's default; it and everything above means the whole vocabulary


def check_segment(segment: SegmentRequest, info: ServerInfo) -> None:
    """Refuse what no server should see.

    An id outside the vocabulary ends an SGLang server and all that it runs (the embedding look-up
    fails inside its scheduler), so the check is here and not left to the server. It needs
    ``info.vocab_size``; a server that does not say has to be told by configuration.

    Raises:
        InvalidRequest: An empty prompt, no budget, an id outside the vocabulary, or a request id
            that no HTTP header can carry.
    """
    if len(segment.token_ids) == 0 and not segment.messages:
        raise InvalidRequest("a generation needs at least one prompt token")
    if segment.max_new_tokens < 1:
        raise InvalidRequest(f"max_new_tokens must be at least 1, not {segment.max_new_tokens}")
    if not 0 <= segment.min_new_tokens <= segment.max_new_tokens:
        raise InvalidRequest("min_new_tokens must be between 0 and max_new_tokens")
    if info.vocab_size is not None:
        largest = int(segment.token_ids.max(initial=0))
        if largest >= info.vocab_size:
            raise InvalidRequest(
                f"input_ids holds {largest}, which is not below the vocabulary size "
                f"{info.vocab_size}"
            )
    if _VISIBLE(segment.request_id) is None:
        raise InvalidRequest("a request id must be visible ASCII without spaces, and not empty")


def top_k_of(segment: SegmentRequest, info: ServerInfo) -> int:
    """``top_k`` as both servers read it: -1 for the whole vocabulary."""
    top_k = segment.gconfig.top_k
    return -1 if top_k >= min(info.vocab_size or TOP_K_ALL, TOP_K_ALL) else top_k


def images_of(messages: tuple[Mapping[str, Any], ...]) -> list[str]:
    """The URLs of all ``image_url`` parts, in order.

    Raises:
        InvalidRequest: If a part of that kind holds none.
    """
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [_url_of(part) for part in parts if _is_image(part)]


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image_url"


def _url_of(part: Mapping[str, Any]) -> str:
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, Mapping) else image
    if not isinstance(url, str):
        raise InvalidRequest("an image_url part must hold {'image_url': {'url': …}}")
    return url
