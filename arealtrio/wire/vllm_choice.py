"""What a choice holds on every route of vLLM."""

from __future__ import annotations

from typing import Final

import msgspec

from ..errors import ProtocolError
from ..types import StopReason
from .versions import Span

SERVER: Final = "vLLM"

# ``error`` and ``repetition`` (its repetition detection, which is never asked for) are not here:
# neither is an end that the trainer may learn from.
STOP_REASONS: Final[dict[str, StopReason]] = {
    "stop": "stop", "length": "length", "abort": "abort", "tool_calls": "tool_calls",
}  # fmt: skip


class Choice(msgspec.Struct):
    """How it ended, which weights made it, and which experts (base64 of a .npy file)."""

    finish_reason: str | None
    weight_versions: list[Span] | None = None
    routed_experts: bytes | None = None


def stop_reason_of(choice: Choice) -> StopReason:
    """Read why it ended.

    Raises:
        ProtocolError: For a reason that is none of ``STOP_REASONS``.
    """
    reason = choice.finish_reason
    if reason not in STOP_REASONS:
        raise ProtocolError(
            f"expected a finish reason of {', '.join(STOP_REASONS)} from {SERVER}, "
            f"got {str(reason)[:20]!r}"
        )
    return STOP_REASONS[reason]
