"""Server-sent events out of bytes that were split anywhere.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html. A lone carriage return as a
line's end, which the format allows and no server here writes, is not one to this reader.
"""

from __future__ import annotations


class EventReader:
    """Bytes in, the data of whole events out. An event without its empty line never comes out."""

    __slots__ = ("_data", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a line whose end is not there
        self._data: list[bytes] = []  # the ``data`` lines of an event whose end is not there

    def feed(self, data: bytes) -> list[bytes]:
        """Take what arrived; return the data of each event that it completed, in order."""
        if b"\n" not in data:  # joined once, however many reads a long line takes
            self._pieces.append(data)
            return []
        lines = b"".join([*self._pieces, data]).split(b"\n")
        self._pieces = [lines.pop()]
        found = (self._take(line.removesuffix(b"\r")) for line in lines)
        return [event for event in found if event is not None]

    def _take(self, line: bytes) -> bytes | None:
        """Note one line; an empty one ends the event. Comments and other fields say nothing."""
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        lines, self._data = self._data, []
        return b"\n".join(lines) if lines else None
