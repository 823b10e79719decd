"""Which experts tokens went through, as each kind of server writes it: base64 of raw numbers.

Sources, since no recorded server ran a mixture of experts: vLLM 0.32.0,
entrypoints/scale_out/token_in_token_out/protocol.py and utils/serial_utils.py; SGLang 0.5.23,
srt/state_capturer/routed_experts.py and srt/managers/detokenizer_manager.py.
"""

from __future__ import annotations

import io

import numpy as np

from ..errors import ProtocolError
from ..types import IntegerArray


def read_npy(content: bytes | None, server: str) -> IntegerArray | None:
    """Read what vLLM writes: a .npy file of uint8, uint16 or int32 [tokens, layers, top_k].

    Raises:
        ProtocolError: If it is none, or of another kind or shape.
    """
    if content is None:
        return None
    try:
        experts = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as exc:
        raise ProtocolError(f"expected routed experts from {server} as a .npy file") from exc
    if not isinstance(experts, np.ndarray) or experts.dtype.kind not in "iu" or experts.ndim != 3:
        raise ProtocolError(f"expected routed experts from {server} as integers of 3 dimensions")
    return experts


def read_int32(content: bytes | None, server: str) -> IntegerArray | None:
    """Read what SGLang writes: int32, little-endian, all in one vector without its shape.

    Raises:
        ProtocolError: If the bytes are not whole numbers of four.
    """
    if content is None:
        return None
    if len(content) % 4:
        raise ProtocolError(f"expected routed experts from {server} as int32, got {len(content)} "
                            "bytes")  # fmt: skip
    return np.frombuffer(content, dtype="<i4")
