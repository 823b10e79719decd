from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def pad(
    columns: Sequence[Sequence[npt.NDArray[Any]]],
    fills: Sequence[float],
    outs: Sequence[npt.NDArray[Any]],
    mask: npt.NDArray[np.bool_] | None = None,
) -> None: ...
def pack(
    columns: Sequence[Sequence[npt.NDArray[Any]]],
    outs: Sequence[npt.NDArray[Any]],
    cu_seqlens: npt.NDArray[np.int32],
) -> None: ...
def span(rows: Iterable[npt.NDArray[np.int32]]) -> tuple[int, int] | None: ...
