"""Prompts and groups as bytes: a small header, then the arrays as they are in memory.

Every record carries a checksum. SQLite checks the structure of its file, not what is in it: a page
of a trajectory that something else wrote into would be read back as tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any
from zlib import crc32

import msgspec
import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..trajectory import Group
from ..types import Trajectory

_PREFIX = struct.Struct("<III")  # magic, checksum of all that follows, size of the header
_PROMPT_MAGIC = 0x31505441  # "ATP1"
_GROUP_MAGIC = 0x31475441  # "ATG1"
_ARRAY_CODE = 1  # of MessagePack's extension types: a numpy array

_COLUMNS = ("input_ids", "loss_mask", "logprobs", "versions")
_NARROWED = frozenset(("loss_mask", "versions"))  # small numbers in 32 bits: a third of all bytes

_SCALARS = frozenset((type(None), bool, int, float, str, bytes))


class _Row(msgspec.Struct, array_like=True):
    """One trajectory's header; ``dtypes`` are of its columns, then of its extras."""

    length: int
    reward: float
    exact: bool
    dtypes: list[str]
    extras: list[str]


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
        UsageError: If it holds anything else. Names the place and the type, not the value.
    """
    _check_plain(prompt, "")
    try:
        body = _PROMPT_ENCODER.encode(prompt)
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise UsageError(
            f"the ledger can not write a prompt: {type(exc).__name__} in its {_guilty(prompt)}"
        ) from exc
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
    if "prompt_id" in prompt:
        return str(prompt["prompt_id"])
    return f"#{_PREFIX.unpack_from(blob)[1]:08x}"


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
    raise NotImplementedError


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
    """Return a group as bytes: 10 a token, where versions are below 128, and some 60 a row.

    Args:
        group: Accepted; its arrays are copied.

    Raises:
        UsageError: If an extra of a trajectory holds Python objects.
    """
    arrays: list[Any] = []  # which are buffers, and are not typed as such
    members = [[_row_header(row, arrays) for row in rows] for rows in group.members]
    header = _GROUP_ENCODER.encode(
        _Group(group.number, group.permit_version, group.prompt_id, group.task_id, members)
    )
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
    first = len(arrays)
    for name in _COLUMNS:
        array = getattr(row, name)
        arrays.append(_narrowed(array) if name in _NARROWED else _little(array))
    for name, extra in row.extras.items():
        array = np.ascontiguousarray(extra)
        if array.dtype.hasobject:
            raise UsageError(
                f"the ledger can not write a trajectory: its extra {name!r} holds Python objects"
            )
        arrays.append(_little(array))
    dtypes = [array.dtype.str for array in arrays[first:]]
    return _Row(len(row), row.reward, row.versions_exact, dtypes, list(row.extras))


def _narrowed(array: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """The same integers in as few bytes as hold the largest of them."""
    low, high = int(array.min()), int(array.max())
    for dtype, limit in (("<i1", 2**7), ("<i2", 2**15)):
        if -limit <= low and high < limit:
            return array.astype(dtype)
    return _little(array)


def _little(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


class _ArrayReader:
    """Takes one array after the other from the end of a record."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, dtype: str, length: int) -> npt.NDArray[Any]:
        kind = np.dtype(dtype)
        end = self._at + kind.itemsize * length
        array = np.frombuffer(self._data[self._at : end], dtype=kind)
        if len(array) != length:
            raise ValueError("a record is too short for its arrays")
        self._at = end
        return array.astype(kind.newbyteorder("="))  # a copy, which may be written to

    def check_end(self) -> None:
        if self._at != len(self._data):
            raise ValueError("a record goes on after its arrays")


def _row(header: _Row, reader: _ArrayReader) -> Trajectory:
    names = (*_COLUMNS, *header.extras)
    arrays: dict[str, Any] = {
        name: reader.take(dtype, header.length)
        for name, dtype in zip(names, header.dtypes, strict=True)
    }
    # Trajectory widens what was narrowed.
    columns: dict[str, Any] = {name: arrays.pop(name) for name in _COLUMNS}
    return Trajectory(**columns, reward=header.reward, versions_exact=header.exact, extras=arrays)


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
