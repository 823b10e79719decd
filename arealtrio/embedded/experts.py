"""Made-up experts: the model has none, and a client of a mixture of experts has to be tested."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

LAYERS, TOP_K, EXPERTS = 3, 2, 64


def routed_experts(token_ids: Sequence[int], start: int = 0) -> npt.NDArray[np.uint8]:
    """Return uint8[tokens - 1 - start, LAYERS, TOP_K], the experts of each token but the last.

    They depend on the token and its place alone, so whoever reads a sequence, in whatever pieces,
    is told the same.

    Args:
        token_ids: Prompt and answer.
        start: The first token that is asked about.
    """
    places = np.arange(start, len(token_ids) - 1)
    seeds = 7 * np.asarray(token_ids, dtype=np.int64)[places] + 5 * places
    offsets = 3 * np.arange(LAYERS)[:, None] + np.arange(TOP_K)[None, :]
    return ((seeds[:, None, None] + offsets) % EXPERTS).astype(np.uint8)


def as_npy(experts: npt.NDArray[np.uint8]) -> str:
    """As vLLM writes them: a .npy file in base64."""
    with io.BytesIO() as file:
        np.save(file, experts, allow_pickle=False)
        return base64.b64encode(file.getvalue()).decode()


def as_int32(experts: npt.NDArray[np.uint8]) -> str:
    """As SGLang writes them: the numbers alone, in base64."""
    return base64.b64encode(experts.astype("<i4").tobytes()).decode()
