"""Made-up eyes: the tokens that stand for an image, and a chat as tokens, without a tokenizer.

An image is the same few tokens wherever it is seen, and another image is others, which is all that
a client can tell of a real one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

IMAGE_TOKENS = 6  # of one image


def image_ids(url: str, vocab_size: int) -> list[int]:
    """The tokens of an image."""
    draw = np.random.default_rng(zlib.crc32(url.encode()))
    ids: list[int] = draw.integers(0, vocab_size, IMAGE_TOKENS).tolist()
    return ids


def placeholder(vocab_size: int) -> int:
    """The token that stands for an image in a prompt."""
    return vocab_size - 1


def expanded(prompt: Sequence[int], urls: Sequence[str], vocab_size: int) -> list[int]:
    """Put each image's tokens in the place of its placeholder.

    Raises:
        ValueError: If there are more or fewer of them than images.
    """
    holders = list(prompt).count(placeholder(vocab_size))
    if holders != len(urls):
        raise ValueError(
            f"prompt has {holders} image placeholder token(s) but {len(urls)} image(s) were "
            "provided"
        )
    images, ids = iter(urls), list[int]()
    for token_id in prompt:
        is_image = token_id == placeholder(vocab_size)
        ids += image_ids(next(images), vocab_size) if is_image else [token_id]
    return ids


def rendered(messages: Sequence[Mapping[str, Any]], vocab_size: int) -> list[int]:
    """A chat as tokens: a byte of text is a token, and an image its own.

    Raises:
        ValueError: If a message is not text, nor parts of text and images.
    """
    ids = []
    for message in messages:
        ids += [byte % vocab_size for byte in f"<{message['role']}>".encode()]
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            ids += _part(part, vocab_size)
    return ids


def _part(part: Mapping[str, Any], vocab_size: int) -> list[int]:
    match part:
        case {"type": "text", "text": str(text)}:
            return [byte % vocab_size for byte in text.encode()]
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            return image_ids(url, vocab_size)
    raise ValueError("a part of a message is neither text nor an image_url")
