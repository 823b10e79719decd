"""Prompts and groups as bytes: a small header, then the arrays as they are in memory.

Every record carries a checksum. SQLite checks the structure of its file, not what is in it: a page
of a trajectory that something else wrote into would be read back as tokens.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..trajectory import Group
from ..types import Trajectory

_IS_LITTLE = sys.byteorder == "little"
_PREFIX = struct.Struct("<III")  # magic, checksum of all that follows, size of the header
_PROMPT_MAGIC = 0x31505441  # "ATP1"
_GROUP_MAGIC = 0x31475441  # "ATG1"
_ARRAY_CODE = 1  # of MessagePack's extension types: a numpy array

_COLUMNS = ("input_ids", "loss_mask", "logprobs", "versions")
_IN_RUNS = frozenset(("loss_mask", "versions"))  # which change a few times in a row, if at all
_RUNS = "runs"  # in a row's dtypes: the lengths of runs, and their values, both int32

_SCALARS = frozenset((type(None), bool, int, float, str, bytes))


RECORD_SIZE_MAX = 10**9 - 2**20
"""Bytes of a record: a row of SQLite's holds 10^9, with some more columns."""


class _Row(msgspec.Struct, array_like=True):
    """One trajectory's header; ``dtypes`` are of its columns, then of its extras.

    Of a column in runs, ``runs`` says how many. ``shapes`` are of the extras, for each token: none
    for a number.
    """

    length: int
    reward: float
    exact: bool
    dtypes: list[str]
    runs: list[int]
    extras: list[str]
    shapes: list[tuple[int, ...]]


class _Group(msgspec.Struct, array_like=True):
    """One group's header."""

    number: int
    permit_version: int
    prompt_id: str
    task_id: str
    members: list[list[_Row]]


# --- prompts -------------------------------------------------------------------------------------


def encode_prompt(prompt: Mapping[str, Any]) -> bytes:
    """Return a prompt as bytes.

    It may hold what JSON can say, bytes, and numpy arrays and numbers. A tuple comes back as a
    list, a numpy number as a Python one, any mapping as a dict.

    Args:
        prompt: As the data loader gave it; it is read at once.

    Raises:
        UsageError: If it holds anything else. Names the place and the type, not the value. Or if it
            is larger than a record can be.
    """
    try:
        body = _PROMPT_ENCODER.encode(prompt)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        _check_plain(prompt, "")
        raise UsageError(
            f"the ledger can not write a prompt: {type(exc).__name__} in its {_guilty(prompt)}"
        ) from exc
    _check_fields(prompt)
    if len(body) > RECORD_SIZE_MAX:
        raise UsageError(
            f"the ledger can not write a prompt: it is of {len(body)} bytes, and a record holds "
            f"{RECORD_SIZE_MAX} at most; let it name a file, and the workflow read that"
        )
    return _PREFIX.pack(_PROMPT_MAGIC, crc32(body, _size_checksum(0)), 0) + body


def decode_prompt(blob: bytes) -> dict[str, Any]:
    """Return what ``encode_prompt`` was given.

    Raises:
        ValueError: If the bytes are not what it wrote.
    """
    body = _checked(blob, _PROMPT_MAGIC)[1]
    prompt: dict[str, Any] = _PROMPT_DECODER.decode(body)
    return prompt


def mark_of(prompt: Mapping[str, Any], blob: bytes) -> str:
    """What to know a prompt again by: its ``prompt_id``, else the checksum of all of it."""
    named = prompt.get("prompt_id")
    if named is not None:
        return str(named)
    return f"#{_PREFIX.unpack_from(blob)[1]:08x}"


def _check_fields(prompt: Mapping[str, Any]) -> None:
    """Refuse what would come back as something else, or not at all."""
    for name, value in prompt.items():
        if not (type(name) is str and (type(value) in _SCALARS or _is_token_ids(value))):
            _check_plain({name: value}, "")


def _is_token_ids(value: object) -> bool:
    """Whether it is a list of integers, by a sum: to ask each for its type takes six times as long.

    Only of integers is the sum one; the rest, and what can not be summed, is looked at closely.
    """
    if type(value) is not list or not value or type(value[0]) is not int:
        return False
    try:
        return type(sum(value)) is int
    except (TypeError, ValueError):
        return False


def _check_plain(value: object, where: str) -> None:
    """Refuse what would come back as something else, or not at all."""
    if type(value) in _SCALARS or isinstance(value, (np.bool_, np.number)):
        return
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OV":
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) not in (str, int):
                _refuse(key, f"a key of {where or 'it'}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        if not _SCALARS.issuperset(map(type, value)):  # type: ignore[call-overload]
            for item in value:  # type: ignore[attr-defined]
                _check_plain(item, f"{where}[…]")
    else:
        _refuse(value, where or "it")


def _refuse(value: object, where: str) -> None:
    raise UsageError(
        f"the ledger can not write a prompt: {where} is of type {type(value).__name__}; let "
        "prompts hold plain data (numbers, text, bytes, lists, dicts, numpy arrays), such as a "
        "path, and let the workflow make the rest of it"
    )


def _guilty(prompt: Mapping[str, Any]) -> str:
    """The first field that can not be written alone."""
    for name, value in prompt.items():
        try:
            _PROMPT_ENCODER.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError):
            return f"field {name!r}"
    return "keys"


def _as_extension(value: object) -> object:
    if isinstance(value, np.ndarray):
        shape = " ".join(map(str, value.shape))
        header = f"{value.dtype.str} {shape}\n".encode()
        return msgspec.msgpack.Ext(_ARRAY_CODE, header + value.tobytes())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError  # and where it is, encode_prompt finds out


def _from_extension(code: int, data: memoryview) -> object:
    if code != _ARRAY_CODE:
        raise ValueError(f"a record holds an extension of code {code}")
    header, _, content = bytes(data).partition(b"\n")
    dtype, *shape = header.decode().split()
    return np.frombuffer(content, dtype=np.dtype(dtype)).reshape(list(map(int, shape))).copy()


_PROMPT_ENCODER = msgspec.msgpack.Encoder(enc_hook=_as_extension)
_PROMPT_DECODER = msgspec.msgpack.Decoder(ext_hook=_from_extension)


# --- groups --------------------------------------------------------------------------------------


def encode_group(group: Group) -> bytes:
    """Return a group as bytes: 8 a token, and some 100 a row.

    Args:
        group: Accepted; its arrays are copied.

    Raises:
        UsageError: If an extra of a trajectory holds Python objects, or a name is no Unicode text.
    """
    arrays: list[Any] = []  # which are buffers, and are not typed as such
    members = [[_row_header(row, arrays) for row in rows] for rows in group.members]
    try:
        header = _GROUP_ENCODER.encode(
            _Group(group.number, group.permit_version, group.prompt_id, group.task_id, members)
        )
    except (TypeError, ValueError, OverflowError) as exc:  # which reading maps to damage
        raise UsageError(
            f"the ledger can not write a group: {type(exc).__name__} in its prompt_id or in the "
            "names of its extras, which are to be Unicode text"
        ) from exc
    checksum = crc32(header, _size_checksum(len(header)))
    for array in arrays:
        checksum = crc32(array, checksum)
    return b"".join((_PREFIX.pack(_GROUP_MAGIC, checksum, len(header)), header, *arrays))


def decode_group(blob: bytes) -> Group:
    """Return what ``encode_group`` was given, in arrays of its own.

    Raises:
        ValueError: If the bytes are not what it wrote.
    """
    size, body = _checked(blob, _GROUP_MAGIC)
    header = _GROUP_DECODER.decode(body[:size])
    reader = _ArrayReader(body[size:])
    members = [[_row(row, reader) for row in rows] for rows in header.members]
    reader.check_end()
    return Group.of(
        members,
        number=header.number,
        permit_version=header.permit_version,
        prompt_id=header.prompt_id,
        task_id=header.task_id,
    )


def _row_header(row: Trajectory, arrays: list[Any]) -> _Row:
    """A row's header; its arrays go to the end of ``arrays``."""
    dtypes: list[str] = []
    runs: list[int] = []
    shapes: list[tuple[int, ...]] = []
    for name in _COLUMNS:
        array = getattr(row, name)
        in_runs = _in_runs(array) if name in _IN_RUNS else None
        arrays.append(_little(array) if in_runs is None else in_runs)
        dtypes.append(arrays[-1].dtype.str if in_runs is None else _RUNS)
        runs += [] if in_runs is None else [len(in_runs) // 2]
    for name, extra in row.extras.items():
        array = np.ascontiguousarray(extra)
        if array.dtype.hasobject:
            raise UsageError(
                f"the ledger can not write a trajectory: its extra {name!r} holds Python objects"
            )
        arrays.append(_little(array))
        dtypes.append(arrays[-1].dtype.str)
        shapes.append(array.shape[1:])
    names = list(map(str, row.extras))  # of text, but maybe of numpy's
    return _Row(len(row), row.reward, row.versions_exact, dtypes, runs, names, shapes)


def _in_runs(array: npt.NDArray[np.int32]) -> npt.NDArray[np.int32] | None:
    """The lengths of its runs of one value, then the values; None where that is no shorter."""
    (ends,) = (array[1:] != array[:-1]).nonzero()
    count = len(ends) + 1
    if 2 * count >= len(array):
        return None
    runs = np.empty(2 * count, dtype="<i4")
    ends += 1
    runs[: count - 1] = ends
    runs[count - 1] = len(array)
    runs[1:count] -= ends
    runs[count] = array[0]
    runs[count + 1 :] = array[ends]
    return runs


def _little(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if _IS_LITTLE and array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


class _ArrayReader:
    """Takes one array after the other from the end of a record."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, dtype: str, length: int) -> npt.NDArray[Any]:
        """The next array, in memory of its own."""
        kind = np.dtype(dtype)
        end = self._at + kind.itemsize * length
        array = np.frombuffer(self._data[self._at : end], dtype=kind)
        if len(array) != length:
            raise ValueError("a record is too short for its arrays")
        self._at = end
        return array.astype(kind.newbyteorder("="))

    def take_runs(self, count: int) -> npt.NDArray[np.int32]:
        """The next array, which is in runs."""
        lengths, values = self.take("<i4", count), self.take("<i4", count)
        return np.repeat(values, lengths)

    def check_end(self) -> None:
        """Raise unless all was taken."""
        if self._at != len(self._data):
            raise ValueError("a record goes on after its arrays")


def _row(header: _Row, reader: _ArrayReader) -> Trajectory:
    length, runs, dtypes = header.length, iter(header.runs), iter(header.dtypes)
    columns: dict[str, Any] = {
        name: reader.take_runs(next(runs)) if dtype == _RUNS else reader.take(dtype, length)
        for name, dtype in zip(_COLUMNS, dtypes, strict=False)
    }
    extras = {
        name: reader.take(dtype, length * math.prod(shape)).reshape(length, *shape)
        for name, dtype, shape in zip(header.extras, dtypes, header.shapes, strict=True)
    }
    return Trajectory(**columns, reward=header.reward, versions_exact=header.exact, extras=extras)


_GROUP_ENCODER = msgspec.msgpack.Encoder()
_GROUP_DECODER = msgspec.msgpack.Decoder(_Group)


def _size_checksum(size: int) -> int:
    return crc32(size.to_bytes(4, "little"))


def _checked(blob: bytes, expected: int) -> tuple[int, memoryview]:
    """The size of a record's header, and all after the prefix."""
    if len(blob) < _PREFIX.size:
        raise ValueError("a record is cut off")
    magic, checksum, size = _PREFIX.unpack_from(blob)
    body = memoryview(blob)[_PREFIX.size :]
    if magic != expected or crc32(body, _size_checksum(size)) != checksum or size > len(body):
        raise ValueError("a record does not have its checksum")
    return size, body
