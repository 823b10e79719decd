"""One sequence: a prompt, the tokens generated for it so far, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from .sampling import Drawn, SamplingParams, TokenLogprob

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]


class Span(NamedTuple):
    """Output tokens ``start … end-1`` were made by the weights labelled ``version``."""

    version: str
    start: int
    end: int


def as_objects(spans: Iterable[Span]) -> list[dict[str, object]]:
    """Spans as JSON has them."""
    return [{"version": version, "start": start, "end": end} for version, start, end in spans]


class Sequence:
    """What the scheduler runs. Only the scheduler changes it; everyone may read it.

    The output lists grow together: one id, logprob, rank and tuple of best candidates a token.

    Args:
        request_id: The id that ``abort`` names. Several sequences may share one (``n`` > 1).
        prompt: The prompt's token ids; at least one.
        params: How to sample.
        max_tokens: The budget after the model's length was taken into account.
        rng: This sequence's own generator, so that no neighbour changes what it draws.
        on_token: Called after each token, from inside ``Scheduler.step``; must not call back into
            the scheduler.
        on_finish: Called exactly once, when ``finish_reason`` was set; the same rule.
    """

    __slots__ = (
        "finish_reason",
        "logprobs",
        "max_tokens",
        "on_finish",
        "on_token",
        "params",
        "prompt_length",
        "ranks",
        "request_id",
        "retractions",
        "rng",
        "spans",
        "stop_reason",
        "token_ids",
        "top_logprobs",
    )

    def __init__(
        self,
        request_id: str,
        prompt: SequenceOf[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        rng: np.random.Generator,
        on_token: Callable[[Sequence], None] | None = None,
        on_finish: Callable[[Sequence], None] | None = None,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(prompt)  # prompt and output in one list: what the model reads
        self.prompt_length = len(self.token_ids)
        self.params = params
        self.max_tokens = max_tokens
        self.rng = rng
        self.on_token = on_token
        self.on_finish = on_finish
        self.logprobs: list[float] = []
        self.ranks: list[int] = []
        self.top_logprobs: list[tuple[TokenLogprob, ...]] = []
        self.spans: list[Span] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None
        self.retractions = 0  # times it was put back into the queue

    @property
    def prompt_ids(self) -> list[int]:
        """int[P], a copy."""
        return self.token_ids[: self.prompt_length]

    @property
    def output_ids(self) -> list[int]:
        """int[N], a copy."""
        return self.token_ids[self.prompt_length :]

    @property
    def output_length(self) -> int:
        """N, the number of tokens generated so far."""
        return len(self.logprobs)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def unhook(self) -> None:
        """Call nobody any more: those hooks hold it, too, and only the collector would free it."""
        self.on_token = self.on_finish = None

    def append(self, drawn: Drawn, version: str) -> None:
        """Take one token, made by the weights labelled ``version``."""
        self.token_ids.append(drawn.token_id)
        self.logprobs.append(drawn.logprob)
        self.ranks.append(drawn.rank)
        self.top_logprobs.append(drawn.top)
        self._extend_spans(version)

    def _extend_spans(self, version: str) -> None:
        end = self.output_length
        if self.spans and self.spans[-1].version == version:
            self.spans[-1] = self.spans[-1]._replace(end=end)
        else:
            self.spans.append(Span(version, end - 1, end))
