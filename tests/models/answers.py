"""What the compiled writer must give, by msgspec from an object for each token."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


def records(ids: Sequence[int], logprobs: Sequence[float], ranks: Sequence[int]) -> bytes:
    content = []
    for token_id, logprob, rank in zip(ids, logprobs, ranks, strict=True):
        chosen = {"token_id": token_id, "logprob": logprob, "rank": rank}
        content.append({**chosen, "top_logprobs": [chosen]})
    return msgspec.json.encode(content)


def pairs(logprobs: Sequence[float], ids: Sequence[int]) -> bytes:
    return msgspec.json.encode([(p, i, None) for p, i in zip(logprobs, ids, strict=True)])
