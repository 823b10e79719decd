"""Which experts tokens went through, as each kind of server writes it: base64 of raw numbers.

Sources, since no recorded server ran a mixture of experts: vLLM 0.32.0,
entrypoints/scale_out/token_in_token_out/protocol.py and utils/serial_utils.py; SGLang 0.5.23,
srt/state_capturer/routed_experts.py and srt/managers/detokenizer_manager.py.
"""

from __future__ import annotations

import math
import re
from typing import Final

import numpy as np

from ..errors import ProtocolError
from ..types import IntegerArray

# Format: numpy.lib.format, version 1.0, whose header's length is a little-endian uint16.
_MAGIC: Final = b"\x93NUMPY"
_HEADER: Final = re.compile(
    rb"\x93NUMPY\x01\x00[\0-\xff]{2}\{'descr': '([|<>][iu][1248])', 'fortran_order': False, "
    rb"'shape': \((\d{1,10}), (\d{1,10}), (\d{1,10})\), \} *\n"
)


def read_npy(content: bytes | None, server: str) -> IntegerArray | None:
    """Read what vLLM writes: a .npy file of uint8, uint16 or int32 [tokens, layers, top_k].

    ``numpy.load`` reads any such file, and much else: archives, pickles where allowed, headers by
    Python's own parser, sizes on trust. From a network only what ``numpy.save`` writes is taken.

    Raises:
        ProtocolError: If it is none, or of another kind, shape or size.
    """
    if content is None:
        return None
    if not content.startswith(_MAGIC):
        raise ProtocolError(f"expected routed experts from {server} as a .npy file")
    header = _HEADER.match(content)
    if header is None:
        raise ProtocolError(f"expected routed experts from {server} as integers of 3 dimensions")
    descr, *sizes = header.groups()
    dtype, shape = np.dtype(descr.decode()), tuple(map(int, sizes))
    if len(content) - header.end() != math.prod(shape) * dtype.itemsize:
        raise ProtocolError(f"expected routed experts from {server} as many as their file says")
    return np.frombuffer(content, dtype, offset=header.end()).reshape(shape)


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
