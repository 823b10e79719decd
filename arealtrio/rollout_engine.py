"""RolloutEngine: the engine as one rollout sees it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

import trio

from .engine import RemoteEngine
from .generation import Progress
from .types import ModelRequest, ModelResponse


class RolloutEngine:
    """Generates for one rollout, on no server older than the rollout's permit.

    Args:
        engine: What really generates.
        min_version: The version of the permit; 0 where there is none.
        prompt_id: Of the rollout's prompt.
        session: Of requests that name none: the members of a group share their prompt.
        timeout_s: From now to the rollout's deadline.

    Attributes:
        scope: The rollout's own, with its deadline. What runs the rollout enters it.
        started: When the rollout got its slot, on trio's clock.
        progress: Of its generations, for ``status``; None before the first.
    """

    __slots__ = (
        "_engine",
        "_min_version",
        "_prompt_id",
        "_session",
        "progress",
        "scope",
        "started",
    )

    def __init__(
        self,
        engine: RemoteEngine,
        min_version: int,
        prompt_id: str,
        session: str,
        timeout_s: float,
    ) -> None:
        now = trio.current_time()
        self.scope = trio.CancelScope(deadline=now + timeout_s)
        self.started = now
        self._engine = engine
        self._min_version = min_version
        self._prompt_id = prompt_id
        self._session = session
        self.progress: Progress | None = None

    def agenerate(self, request: ModelRequest, /) -> Coroutine[Any, Any, ModelResponse]:
        """See ``RemoteEngine.agenerate``: this is its coroutine, with no frame around it."""
        if self.progress is None:
            self.progress = Progress()
        return self._engine.agenerate(
            request,
            min_version=self._min_version,
            prompt_id=self._prompt_id,
            session=self._session,
            progress=self.progress,
        )

    def get_version(self) -> int:
        """The version that every server in service has."""
        return self._engine.get_version()
