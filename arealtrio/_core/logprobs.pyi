from collections.abc import Mapping
from typing import Self, TypeAlias, final

import numpy as np
import numpy.typing as npt

_Ids: TypeAlias = npt.NDArray[np.int32]
_Floats: TypeAlias = npt.NDArray[np.float32]

# ``Scanner(wanted)`` lifts the long lists out of JSON documents of one shape.
#
# ``wanted`` is a path to a kind: ``{"choices.0.token_ids": "ids"}``. A path's steps are an object's
# keys, in ASCII, or an array's indices. What is found there is null, or for a kind of
#   ids            [1, 2]                                   ids
#   floats         [-0.5, null]                             values
#   token_strings  ["token_id:1", "token_id:2"]             ids; None if any string is another text
#   pairs          [[-0.5, 1, …], [null, 2, …]]             ids and values
#   records        [{"token_id": 1, "logprob": -0.5, …}]    ids and values
#   drop           anything                                 nothing
# Ids are integers in 0 … 2**31 - 1. Values are finite float32, equal to
# ``numpy.float32(json.loads(text))``; null is NaN. Raises ValueError for a kind or path that it can
# not use.
#
# ``scan(body)`` returns a column for each path but the dropped ones, and the rest of the document:
# the same bytes with ``null`` for everything wanted. A column is ``(ids, values)``, fresh arrays,
# with None for the one that its kind lacks; or None where the path leads nowhere or to null.
# Raises ValueError, with the offset and never the content, if the bytes are not one UTF-8 JSON
# document (RFC 8259: no NaN, no Infinity), nest deeper than 128, hold a list of another shape at a
# wanted path, or hold a key twice in an object that a wanted path goes through.
# The interpreter lock is released while it reads; a scanner is immutable and may be shared.
@final
class Scanner:
    def __new__(cls, wanted: Mapping[str, str]) -> Self: ...
    def scan(
        self, body: bytes
    ) -> tuple[dict[str, tuple[_Ids | None, _Floats | None] | None], bytes]: ...

# ``encode_ids(ids)`` writes int32 ids as a JSON array, ``b"[1,2]"``, without the interpreter lock
# and without a Python object for each. Raises ValueError if ``ids`` is not a C-contiguous int32
# vector.
def encode_ids(ids: _Ids) -> bytes: ...
