"""What one rollout does: the protocol, and the two workflows most runs need.

A workflow runs one member; the executor runs a group by running it several times.
"""

from __future__ import annotations

import inspect
import itertools
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from .checks import finite, integer, shown
from .errors import ConfigError, WorkflowError
from .rows import RowBuilder, WorkflowResult, as_reward, trajectory_from_response
from .types import (
    GenerationHyperparameters,
    Int32Array,
    ModelRequest,
    ModelResponse,
    TokenIds,
    Trajectory,
    as_token_ids,
)

Messages: TypeAlias = Sequence[Mapping[str, Any]]

# reward_fn(prompt, completions, prompt_ids, completion_ids, **data), AReaL's signature
RewardFunction: TypeAlias = Callable[..., float | Awaitable[float | None] | None]

REWARD_ARGUMENTS = frozenset(("prompt", "completions", "prompt_ids", "completion_ids"))

FEEDBACK = (
    "The answer is wrong, or it could not be read. Look for the mistake, then answer the question "
    "again from the start."
)

_episodes = itertools.count()


class Engine(Protocol):
    """What a workflow needs of the inference side; ``RemoteEngine`` is one."""

    async def agenerate(self, request: ModelRequest, /) -> ModelResponse:
        """Generate; interruptions, retries and the choice of a server happen inside."""

    def get_version(self) -> int:
        """Return the version that a request sent now would be made by."""


@runtime_checkable
class RolloutWorkflow(Protocol):
    """One rollout of one prompt: the contract between the executor and user code.

    One instance serves all rollouts at once, so an episode keeps its state in local variables. It
    is run in its rollout's cancel scope: at every ``await`` it may be cancelled, by its deadline
    among others, and must let ``trio.Cancelled`` pass. An exception it raises is recorded with the
    rollout; so are ``SystemExit`` and the like, and ``KeyboardInterrupt`` alone ends the run.

    What it can not do is end inside a nursery that it opened: trio calls that corruption, and the
    run ends. To leave the loop over an asynchronous generator with a nursery in it is to do so;
    ``trio.as_safe_channel`` (of trio 0.30) makes one that may be left.
    """

    @abstractmethod
    async def arun_episode(self, engine: Engine, data: dict[str, Any], /) -> WorkflowResult:
        """Run one rollout.

        Args:
            engine: Generates.
            data: What the data loader gave for this prompt; of another mapping a dict is made. The
                members of a group share it, and a rollout that is run again gets it once more, so
                leave it as it is. A workflow of one's own may ask for a ``Mapping`` instead.

        Returns:
            A Trajectory, a non-empty sequence of them, AReaL's dict of [batch, seq] arrays, or None
            to reject the rollout.
        """


class Tokenizer(Protocol):
    """The two methods used of a tokenizer, as ``transformers`` and ``tokenizers`` have them.

    For ``data["messages"]`` it needs ``apply_chat_template`` of ``transformers`` as well.
    """

    def encode(self, text: str, /) -> Any:
        """Return token ids, or an object with them in ``ids``."""

    def decode(self, ids: Any, /) -> str:
        """Return the text of token ids."""


def ids_of(encoded: Any) -> Int32Array:
    """Return the token ids in whatever a tokenizer returned.

    Args:
        encoded: A list of ids, an array, an object with ``ids`` (``tokenizers``), or a mapping with
            ``input_ids`` (``transformers``, whose templates return one by default since version 5).

    Raises:
        InvalidRequest: If what is found are no token ids.
    """
    if isinstance(encoded, Mapping):
        encoded = encoded["input_ids"]
    return as_token_ids(getattr(encoded, "ids", encoded), "the tokenizer's ids")


class _RewardedWorkflow:
    """A prompt out of the data, and a reward out of an answer: what both workflows share."""

    def __init__(
        self,
        reward_fn: RewardFunction,
        gconfig: GenerationHyperparameters,
        tokenizer: Tokenizer | None,
        prompt_key: str,
        template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        if not callable(reward_fn):
            raise ConfigError("reward_fn must be callable")
        if not isinstance(gconfig, GenerationHyperparameters):
            raise ConfigError(f"gconfig must be GenerationHyperparameters, not {shown(gconfig)}")
        if gconfig.n_samples != 1:
            raise ConfigError("gconfig.n_samples must be 1; ask for several with group_size")
        self.reward_fn = reward_fn
        self._gconfig = gconfig
        self._tokenizer = tokenizer
        self._prompt_key = prompt_key
        self._prompt_name = f"data[{prompt_key!r}]"  # for errors
        self._template_kwargs = dict(template_kwargs or {})

    def _prompt_ids(self, data: Mapping[str, Any]) -> Int32Array:
        if self._prompt_key in data:
            return as_token_ids(data[self._prompt_key], self._prompt_name)
        if self._tokenizer is not None and "messages" in data:
            return self._template(data["messages"])
        if self._tokenizer is not None and "prompt" in data:
            return ids_of(self._tokenizer.encode(data["prompt"]))
        wanted = f"{self._prompt_key!r} (token ids)"
        if self._tokenizer is not None:
            wanted += ", 'messages' (a chat) or 'prompt' (a text)"
        raise WorkflowError(f"data must hold {wanted}; without a tokenizer only token ids will do")

    def _template(self, messages: Messages, *, answer_next: bool = True) -> Int32Array:
        apply = getattr(self._tokenizer, "apply_chat_template", None)
        if apply is None:
            raise WorkflowError("the tokenizer has no apply_chat_template, which messages need")
        options = {"tokenize": True, "add_generation_prompt": answer_next, **self._template_kwargs}
        return ids_of(apply(list(messages), **options))

    def _decode(self, ids: Int32Array) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode(ids.tolist())

    def _warm_up(self) -> None:
        """Let a reward that needs processes start them while the answer is generated."""
        warm_up = getattr(self.reward_fn, "warm_up", None)
        if warm_up is not None:
            warm_up()

    async def _reward(self, response: ModelResponse, data: Mapping[str, Any]) -> float | None:
        if not REWARD_ARGUMENTS.isdisjoint(data):
            data = {key: value for key, value in data.items() if key not in REWARD_ARGUMENTS}
        result = self.reward_fn(
            self._decode(response.input_tokens),
            self._decode(response.output_tokens),
            response.input_tokens.copy(),  # it may sort them, say, and these are yet to be a row
            response.output_tokens.copy(),
            **data,
        )
        if not isinstance(result, float) and inspect.isawaitable(result):
            result = await result
        return None if result is None else as_reward(result)


class SingleTurnWorkflow(_RewardedWorkflow):
    """One prompt, one answer, one reward: reinforcement learning with verifiable rewards.

    Args:
        reward_fn: ``reward_fn(prompt, completions, prompt_ids, completion_ids, **data)``, AReaL's
            signature: the two texts (None where there is no tokenizer), the int32 token ids, and
            the prompt's data, less any keys of those four names. It returns a finite number, or
            None to reject the rollout. It may be async. A synchronous one runs in the event loop,
            and while it runs nothing else does: only for what takes well under a millisecond. One
            that computes, or can hang or crash, belongs in a ``ProcessReward``; what that raises
            (``RewardError``) fails the rollout.
        gconfig: How to sample; ``n_samples`` is 1.
        tokenizer: Any object with ``encode`` and ``decode``, and ``apply_chat_template`` for chats;
            None where the data holds token ids and the reward needs no text.
        prompt_key: Where the data holds the prompt's token ids. Where it does not, ``messages`` is
            put through the chat template, or ``prompt`` encoded.
        template_kwargs: For the chat template, such as ``{"enable_thinking": False}``.
    """

    def __init__(
        self,
        reward_fn: RewardFunction,
        gconfig: GenerationHyperparameters,
        tokenizer: Tokenizer | None = None,
        *,
        prompt_key: str = "input_ids",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(reward_fn, gconfig, tokenizer, prompt_key, template_kwargs)

    async def arun_episode(self, engine: Engine, data: Mapping[str, Any]) -> Trajectory | None:
        """Generate once and reward it.

        Args:
            engine: Generates.
            data: One prompt's; where it holds a ``prompt_id``, the members of the group ask for the
                server that has the prompt in its cache.

        Returns:
            The row, or None where the reward is None.

        Raises:
            InvalidRequest: If the prompt is no vector of token ids.
            WorkflowError: If the data holds no prompt, or the reward is no finite number.
        """
        self._warm_up()
        named = data.get("prompt_id")
        session = None if named is None else str(named)
        request = ModelRequest(self._prompt_ids(data), self._gconfig, session=session)
        response = await engine.agenerate(request)
        reward = await self._reward(response, data)
        return None if reward is None else trajectory_from_response(response, reward)


RLVRWorkflow = SingleTurnWorkflow
"""AReaL's name for it."""


class MultiTurnWorkflow(_RewardedWorkflow):
    """Ask again, with feedback, until an answer earns a reward other than 0.

    The row is the entire conversation, token-in-token-out: each turn's prompt is the tokens so far,
    as the model wrote them. Only the model's own tokens are learnt from, each with the version that
    made it. The reward is the last turn's times ``turn_discount`` for each turn before it.

    The conversation also ends after ``max_turns``, or where another turn would leave no room for an
    answer within ``gconfig.max_tokens``; its reward is then 0.

    Args:
        reward_fn: As in ``SingleTurnWorkflow``, called after each turn with that turn's prompt and
            answer. None rejects the rollout.
        gconfig: How to sample each turn.
        tokenizer: As in ``SingleTurnWorkflow``, needed for the feedback.
        max_turns: Answers at most, at least 1.
        turn_discount: In (0, 1].
        feedback: The user's words after an answer that earned nothing.
        feedback_ids: int32[F], all the tokens between an answer's last token and the next answer's
            first, for tokenizers without a usable chat template. None: taken from the template, or
            where the tokenizer has none, ``feedback`` as it encodes it.
        eos_token_id: The token that ends a turn; put after an answer that did not end with it, as a
            model expects of a finished turn. None: the tokenizer's, if it has one.
        prompt_key: As in ``SingleTurnWorkflow``.
        template_kwargs: As in ``SingleTurnWorkflow``.

    Raises:
        ConfigError: For a value out of its range, or a chat template whose rendering of a
            conversation does not begin with its rendering of the turns before (give
            ``feedback_ids`` then).
    """

    def __init__(
        self,
        reward_fn: RewardFunction,
        gconfig: GenerationHyperparameters,
        tokenizer: Tokenizer,
        max_turns: int,
        turn_discount: float,
        *,
        feedback: str = FEEDBACK,
        feedback_ids: TokenIds | None = None,
        eos_token_id: int | None = None,
        prompt_key: str = "input_ids",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(reward_fn, gconfig, tokenizer, prompt_key, template_kwargs)
        self._max_turns = integer("max_turns", max_turns, 1)
        self._turn_discount = finite("turn_discount", turn_discount)
        if not 0 < turn_discount <= 1:
            raise ConfigError(f"turn_discount must be in (0, 1], not {turn_discount}")
        self._eos = (
            getattr(tokenizer, "eos_token_id", None) if eos_token_id is None else eos_token_id
        )
        self._feedback_ids = (
            self._render_feedback(tokenizer, feedback)
            if feedback_ids is None
            else as_token_ids(feedback_ids, "feedback_ids")
        )

    async def arun_episode(self, engine: Engine, data: Mapping[str, Any]) -> Trajectory | None:
        """Converse.

        Args:
            engine: Generates.
            data: One prompt's. The turns of a conversation ask for the server that has the turns
                before in its cache; conversations of one group are kept apart, because each soon
                holds more of its own than of the shared prompt.

        Returns:
            The row, or None where a reward is None.

        Raises:
            InvalidRequest: If the prompt is no vector of token ids.
            WorkflowError: If the data holds no prompt, or a reward is no finite number.
        """
        self._warm_up()
        row = RowBuilder().append_prompt(self._prompt_ids(data))
        session = f"{data.get('prompt_id', '')}#{next(_episodes)}"
        turns_before = 0
        while True:
            request = ModelRequest(row.input_ids, self._gconfig, session=session)
            response = await engine.agenerate(request)
            row.append_response(response)
            reward = await self._reward(response, data)
            if reward is None:
                return None
            joint = self._joint(response)
            last = turns_before + 1 == self._max_turns or not self._has_room(len(row) + len(joint))
            if reward != 0 or last:
                return row.build(reward * self._turn_discount**turns_before)
            row.append_prompt(joint)
            turns_before += 1

    def _has_room(self, length: int) -> bool:
        return length < self._gconfig.max_tokens

    def _joint(self, response: ModelResponse) -> Int32Array:
        """What stands between this answer and the next."""
        output = response.output_tokens
        if self._eos is None or (len(output) and output[-1] == self._eos):
            return self._feedback_ids
        return np.concatenate([np.array([self._eos], dtype=np.int32), self._feedback_ids])

    def _render_feedback(self, tokenizer: Tokenizer, feedback: str) -> Int32Array:
        """The template's tokens after an answer's end-of-turn, up to where the next one begins.

        A template may put more behind the end-of-turn token (a line break, say), which the model
        does not generate; so the cut is made after that token, not after the rendered answer.
        """
        if not hasattr(tokenizer, "apply_chat_template"):
            return ids_of(tokenizer.encode(feedback))
        answered = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        before = self._template(answered, answer_next=False)
        after = self._template([*answered, {"role": "user", "content": feedback}])
        if not np.array_equal(after[: len(before)], before):
            raise ConfigError(
                "the chat template rewrites earlier turns, so its feedback tokens can not be told "
                "apart: give feedback_ids"
            )
        ends = np.flatnonzero(before == self._eos) if self._eos is not None else np.empty(0)
        return after[int(ends[-1]) + 1 if len(ends) else len(before) :]
