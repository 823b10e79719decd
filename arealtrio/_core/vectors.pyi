import numpy as np
import numpy.typing as npt

def token_ids(value: object) -> npt.NDArray[np.int32] | None: ...
def are_alike(vectors: tuple[object, ...], kinds: bytes) -> bool: ...
def largest(values: npt.NDArray[np.int32]) -> int: ...
def has_nan(values: npt.NDArray[np.float32]) -> bool: ...
def ascends(values: npt.NDArray[np.int32], least: int) -> bool: ...
def columns(
    parts: list[
        tuple[
            npt.NDArray[np.int32],
            npt.NDArray[np.float32] | None,
            npt.NDArray[np.int32] | None,
        ]
    ],
) -> (
    tuple[
        npt.NDArray[np.int32],
        npt.NDArray[np.int32],
        npt.NDArray[np.float32],
        npt.NDArray[np.int32],
    ]
    | None
): ...
