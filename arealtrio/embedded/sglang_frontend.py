"""What stands between HTTP and the scheduler in SGLang: its tokenizer manager, in small."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import msgspec

from ..errors import InvalidRequest
from .engine import Engine, Generation
from .images import expanded
from .sampling import SamplingParams
from .scheduler import EngineDead
from .settings import ServerSettings
from .sglang_error import SglangError, engine_died
from .sglang_gate import Gate
from .sglang_request import Item, sampling_params


@dataclass(slots=True)
class Frontend:
    """Names, labels, and who may go through.

    Args:
        engine: Generates.
        settings: Names and limits.
        label: The weights' label as the front end knows it. It moves when an update has succeeded
            as a whole; the spans of tokens follow the scheduler's own.
        model_path: Where the weights in service came from.
        gate: Holds requests back while paused.
        rids: Requests that were not answered yet.
        released: Memory that was released, by tag.
    """

    engine: Engine
    settings: ServerSettings
    label: str
    model_path: str
    gate: Gate = field(default_factory=Gate)
    rids: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, engine: Engine, settings: ServerSettings) -> Self:
        """That of a server which has just started."""
        return cls(engine, settings, engine.scheduler.weight_version, str(settings.weights))

    def begin(self, items: Iterable[Item], *, streamed: bool = False) -> Generation:
        """Queue the prompts of one request, all or none; call it inside the gate.

        Raises:
            SglangError: As SGLang would answer.
        """
        seen = [self._with_images(item) for item in items]
        checked = [(item.rid, item.prompt, self._checked(item)) for item in seen]
        try:
            return self.engine.generate(checked, streamed=streamed)
        except EngineDead as exc:
            raise engine_died() from exc
        except InvalidRequest as exc:
            raise SglangError(str(exc)) from exc

    def _with_images(self, item: Item) -> Item:
        if not item.images:
            return item
        try:
            vocab_size = self.engine.scheduler.model.vocab_size
            return msgspec.structs.replace(
                item, prompt=expanded(item.prompt, item.images, vocab_size)
            )
        except ValueError as exc:
            raise SglangError(str(exc)) from exc

    def _checked(self, item: Item) -> SamplingParams:
        self._check_lora(item.lora)
        vocab_size = self.engine.scheduler.model.vocab_size
        params = sampling_params(
            item, vocab_size=vocab_size, max_model_len=self.settings.max_model_len
        )
        if min(item.prompt) < 0 or max(item.prompt) >= vocab_size:
            raise self.fatal(f"a token id is outside 0 … {vocab_size - 1}")
        if self.released:
            raise self.fatal(f"memory is released: {', '.join(sorted(self.released))}")
        return params

    def fatal(self, reason: str) -> SglangError:
        """What to answer where a real server dies; if this one is ``fragile``, it dies too."""
        if not self.settings.fragile:
            return SglangError(f"{reason}; a real server would die of it")
        self.engine.die()
        return engine_died()

    def _check_lora(self, name: str | None) -> None:
        if name is not None and name not in self.engine.adapters:
            raise SglangError(
                f"Got LoRA adapter that has never been loaded: {name}\n"
                f"All loaded adapters: {self.engine.adapters.paths.keys()}."
            )

    def know(self, items: Iterable[Item]) -> list[str]:
        """Make requests known by their ids, by which they can be aborted; return these.

        Raises:
            SglangError: One of them is known already.
        """
        rids = [item.rid for item in items]
        for rid in rids:
            if rid in self.rids:
                raise SglangError(f"Duplicate request ID detected: {rid}")
        self.rids.update(rids)
        return rids

    def forget(self, rids: Iterable[str]) -> None:
        """Requests have been answered, or their clients have left."""
        self.rids.difference_update(rids)

    def abort(self, rid: str) -> None:
        """Abort what is behind the gate and whose id *begins* with the id of a known request.

        Both is SGLang's: an unknown id is ignored, and the scheduler compares beginnings.
        """
        if rid not in self.rids:
            return
        scheduler = self.engine.scheduler
        everything = (*scheduler.running, *scheduler.waiting)
        self.engine.abort([s.request_id for s in everything if s.request_id.startswith(rid)])
