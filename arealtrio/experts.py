"""The experts that the tokens of one generation went through, joined over its segments."""

from __future__ import annotations

import numpy as np

from .errors import ProtocolError
from .types import IntegerArray


class RoutedExperts:
    """A row for each token that was read by the model, in the order of prompt and answer.

    A segment's answer ends one row before its last token, which nothing has read yet. The next
    segment's server reads it, so the rows of one follow those of the other without a gap.
    """

    __slots__ = ("_parts", "count")

    def __init__(self) -> None:
        self.count = 0
        self._parts: list[IntegerArray] = []

    def take(self, told: IntegerArray, tokens: int, server: str) -> None:
        """Append what an answer tells.

        Args:
            told: From ``count`` on, or from the first token on where the server is older than that
                request: in any shape, a row for each token but the last.
            tokens: Of its prompt and answer.
            server: Its address, for the error.

        Raises:
            ProtocolError: If these are not that many rows; nothing is changed.
        """
        wanted = tokens - 1 - self.count
        rows = self._as_rows(told, wanted)
        if rows is None:
            raise ProtocolError(
                f"{server} told the experts of {len(told)} tokens where {wanted} were asked for"
                if told.ndim > 1
                else f"{server} told experts that are no whole rows for {wanted} tokens"
            )
        self._parts.append(rows)
        self.count += wanted

    def _as_rows(self, told: IntegerArray, wanted: int) -> IntegerArray | None:
        """The last ``wanted`` rows of what is told; None where it is not so many, nor all."""
        width = self._parts[0].shape[1] if self._parts else None
        for count in (wanted, wanted + self.count):
            fits = told.size % count == 0 if told.ndim == 1 else len(told) == count
            if fits and told.size and width in (None, told.size // count):
                return told.reshape(count, -1)[count - wanted :]
        return None

    def joined(self) -> IntegerArray:
        """int[count, layers · top_k]."""
        if len(self._parts) == 1:
            return self._parts[0]
        return np.concatenate(self._parts)
