"""The only module that imports torch, and only when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .errors import UsageError


def to_torch(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays as CPU tensors that share their memory, and other values as they are.

    Args:
        columns: What ``Batch.padded`` or ``Batch.packed`` returned. A tensor lives as long as its
            array: where that is a ``CollateBuffers`` array, until its turn comes again.

    Raises:
        UsageError: If torch is not installed.
    """
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]
    except ImportError as exc:
        raise UsageError(
            "to_torch needs torch, which is not installed: install it, or use padded() or "
            "packed(), which return numpy arrays"
        ) from exc
    return {
        name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for name, value in columns.items()
    }
