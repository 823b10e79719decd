"""The two workflows against an engine that answers from a list, and a real tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import trio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from arealtrio.errors import ConfigError, InvalidRequest, WorkflowError
from arealtrio.rows import rows_from_result
from arealtrio.types import GenerationHyperparameters, ModelRequest, ModelResponse, Trajectory
from arealtrio.workflow import (
    FEEDBACK,
    MultiTurnWorkflow,
    RLVRWorkflow,
    RolloutWorkflow,
    SingleTurnWorkflow,
    ids_of,
)

GCONFIG = GenerationHyperparameters(max_new_tokens=8, max_tokens=200)
PROMPT = {"input_ids": [1, 2, 3]}


class ScriptedEngine:
    """Gives the answers of a list, one a request, each by one version later; keeps the requests."""

    def __init__(self, *answers: Sequence[int]) -> None:
        self.answers = list(answers)
        self.requests: list[ModelRequest] = []

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        await trio.lowlevel.checkpoint()
        output = np.array(self.answers.pop(0), dtype=np.int32)
        version = len(self.requests)
        self.requests.append(request)
        return ModelResponse(
            rid=request.rid,
            input_tokens=request.input_ids,
            output_tokens=output,
            output_logprobs=np.full(len(output), -0.5, dtype=np.float32),
            output_versions=np.full(len(output), version, dtype=np.int32),
            stop_reason="stop",
        )

    def get_version(self) -> int:
        return len(self.requests)


def always(reward: Any) -> Callable[..., Any]:
    return lambda *_args, **_data: reward


def in_turn(*rewards: Any) -> Callable[..., Any]:
    left = list(rewards)
    return lambda *_args, **_data: left.pop(0)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    """A byte-level BPE of 300 tokens, trained here; ``<|end|>`` is its only special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is one and one? it is two.", FEEDBACK], trainer)
    return tokenizer


class ChatTokenizer:
    """The real tokenizer with a chat template, as ``transformers`` offers it.

    ``<|user|>question<|end|>\\n<|assistant|>answer<|end|>\\n``: the line break after an answer is
    the template's, not the model's.
    """

    def __init__(self, bpe: Tokenizer, *, as_mapping: bool = False) -> None:
        self.bpe = bpe
        self.as_mapping = as_mapping
        self.options: dict[str, Any] = {}
        self.eos_token_id: int = bpe.encode("<|end|>").ids[0]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.bpe.encode(text).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self.bpe.decode(ids, skip_special_tokens=False))

    def render(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        turns = [f"<|{m['role']}|>{m['content']}<|end|>\n" for m in messages]
        return "".join(turns) + ("<|assistant|>" if answer_next else "")

    def apply_chat_template(
        self, messages: Any, *, tokenize: bool, add_generation_prompt: bool, **options: Any
    ) -> Any:
        assert tokenize
        self.options = options
        ids = self.encode(self.render(messages, answer_next=add_generation_prompt))
        return {"input_ids": ids, "attention_mask": [1] * len(ids)} if self.as_mapping else ids


async def run(workflow: RolloutWorkflow, engine: ScriptedEngine, data: Any) -> Trajectory | None:
    rows = rows_from_result(await workflow.arun_episode(engine, data))
    assert len(rows) <= 1
    return rows[0] if rows else None


async def test_one_turn_is_a_row() -> None:
    engine = ScriptedEngine([7, 8])
    row = await run(SingleTurnWorkflow(always(1), GCONFIG), engine, PROMPT)
    assert row is not None
    assert row.input_ids.tolist() == [1, 2, 3, 7, 8]
    assert row.loss_mask.tolist() == [0, 0, 0, 1, 1]
    assert row.reward == 1.0
    assert engine.requests[0].gconfig is GCONFIG


async def test_the_reward_gets_areals_arguments() -> None:
    got: list[Any] = []

    def reward(*args: Any, **data: Any) -> float:
        got.extend([*args, data])
        return 0.5

    data = {"input_ids": [1], "prompt": "shadowed", "completions": "too", "answer": "42"}
    await run(SingleTurnWorkflow(reward, GCONFIG), ScriptedEngine([7]), data)
    prompt, completions, prompt_ids, completion_ids, rest = got
    assert (prompt, completions) == (None, None), "there is no tokenizer to make texts"
    assert (prompt_ids.tolist(), completion_ids.tolist()) == ([1], [7])
    assert rest == {"input_ids": [1], "answer": "42"}


@pytest.mark.parametrize("multi", [False, True])
async def test_what_a_reward_does_to_its_tokens_is_done_to_no_row(
    bpe: Tokenizer, multi: bool
) -> None:
    def spoils(prompt: Any, answer: Any, prompt_ids: Any, ids: Any, **_: Any) -> float:
        prompt_ids[:] = 0
        ids[:] = 0
        return 1.0

    prompt = np.array([7, 8, 9], np.int32)
    workflow = multi_turn(spoils, bpe) if multi else SingleTurnWorkflow(spoils, GCONFIG)
    row = await run(workflow, ScriptedEngine([5, 6]), {"input_ids": prompt})
    assert row is not None
    assert row.input_ids.tolist() == [7, 8, 9, 5, 6]
    assert prompt.tolist() == [7, 8, 9]


async def test_a_reward_function_may_be_async() -> None:
    async def reward(*_args: Any, **_data: Any) -> float:
        await trio.lowlevel.checkpoint()
        return 0.25

    row = await run(SingleTurnWorkflow(reward, GCONFIG), ScriptedEngine([7]), PROMPT)
    assert row is not None
    assert row.reward == 0.25


async def test_a_reward_of_none_rejects() -> None:
    assert await run(SingleTurnWorkflow(always(None), GCONFIG), ScriptedEngine([7]), PROMPT) is None


@pytest.mark.parametrize("wrong", ["1", float("nan"), float("inf"), [1.0]])
async def test_a_reward_that_is_no_number_is_an_error_and_no_zero(wrong: Any) -> None:
    with pytest.raises(WorkflowError, match="a reward must be"):
        await run(SingleTurnWorkflow(always(wrong), GCONFIG), ScriptedEngine([7]), PROMPT)


async def test_what_a_reward_function_raises_goes_through() -> None:
    def reward(*_args: Any, **_data: Any) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run(SingleTurnWorkflow(reward, GCONFIG), ScriptedEngine([7]), PROMPT)


async def test_members_of_a_prompt_share_a_session_and_turns_have_their_own() -> None:
    engine = ScriptedEngine([7], [7], [7], [7])
    named, missing = {**PROMPT, "prompt_id": 12}, {**PROMPT, "prompt_id": None}
    for data in (named, named, missing, PROMPT):
        await run(SingleTurnWorkflow(always(1), GCONFIG), engine, data)
    assert [r.session for r in engine.requests] == ["12", "12", None, None]


async def test_the_prompt_may_be_under_another_key() -> None:
    engine = ScriptedEngine([7])
    workflow = SingleTurnWorkflow(always(1), GCONFIG, prompt_key="ids")
    await run(workflow, engine, {"ids": np.array([4, 5]), "input_ids": [1]})
    assert engine.requests[0].input_ids.tolist() == [4, 5]


async def test_data_without_a_prompt_is_an_error_before_anything_is_sent(bpe: Tokenizer) -> None:
    engine = ScriptedEngine()
    for tokenizer, wanted in ((None, "'input_ids'"), (bpe, "'messages'")):
        with pytest.raises(WorkflowError, match=wanted):
            await run(SingleTurnWorkflow(always(1), GCONFIG, tokenizer), engine, {"answer": 1})
    with pytest.raises(WorkflowError, match="without a tokenizer only token ids"):
        await run(SingleTurnWorkflow(always(1), GCONFIG), engine, {"prompt": "hello"})
    with pytest.raises(WorkflowError, match="no apply_chat_template"):
        await run(SingleTurnWorkflow(always(1), GCONFIG, bpe), engine, {"messages": []})
    with pytest.raises(InvalidRequest, match="data\\['input_ids'\\]"):
        await run(SingleTurnWorkflow(always(1), GCONFIG), engine, {"input_ids": [0.5]})
    assert engine.requests == []


async def test_a_text_is_encoded_and_the_reward_reads_texts(bpe: Tokenizer) -> None:
    texts: list[Any] = []

    def reward(prompt: str, completions: str, *_ids: Any, **_data: Any) -> float:
        texts.extend([prompt, completions])
        return 1.0

    answer = bpe.encode("it is two.").ids
    engine = ScriptedEngine(answer)
    row = await run(
        SingleTurnWorkflow(reward, GCONFIG, bpe), engine, {"prompt": "what is one and one?"}
    )
    assert row is not None
    assert texts == ["what is one and one?", "it is two."]
    assert row.input_ids.tolist() == bpe.encode("what is one and one?").ids + answer


@pytest.mark.parametrize("as_mapping", [False, True])
async def test_a_chat_goes_through_the_template(bpe: Tokenizer, as_mapping: bool) -> None:
    tokenizer = ChatTokenizer(bpe, as_mapping=as_mapping)
    engine = ScriptedEngine([7])
    workflow = SingleTurnWorkflow(
        always(1), GCONFIG, tokenizer, template_kwargs={"enable_thinking": False}
    )
    messages = [{"role": "user", "content": "what is one and one?"}]
    await run(workflow, engine, {"messages": messages})
    sent = tokenizer.decode(engine.requests[0].input_ids.tolist())
    assert sent == "<|user|>what is one and one?<|end|>\n<|assistant|>"
    assert tokenizer.options == {"enable_thinking": False}


def test_ids_are_found_in_what_tokenizers_return(bpe: Tokenizer) -> None:
    encoded = bpe.encode("two")
    expected = list(encoded.ids)
    for form in (encoded, expected, np.array(expected), {"input_ids": expected}):
        assert ids_of(form).tolist() == expected
    with pytest.raises(InvalidRequest, match="the tokenizer's ids"):
        ids_of("two")


def test_both_workflows_follow_the_protocol(bpe: Tokenizer) -> None:
    assert isinstance(RLVRWorkflow(always(1), GCONFIG), RolloutWorkflow)
    assert isinstance(MultiTurnWorkflow(always(1), GCONFIG, bpe, 2, 1.0), RolloutWorkflow)
    assert not isinstance(object(), RolloutWorkflow)
    assert RLVRWorkflow is SingleTurnWorkflow


def test_wrong_constructions_are_refused(bpe: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="must be callable"):
        SingleTurnWorkflow("areal.reward.gsm8k", GCONFIG)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n_samples"):
        SingleTurnWorkflow(always(1), GCONFIG.new(n_samples=4))
    with pytest.raises(ConfigError, match="gconfig must be GenerationHyperparameters"):
        SingleTurnWorkflow(always(1), {"max_new_tokens": 8})  # type: ignore[arg-type]
    wrong_turns: tuple[Any, ...] = (0, 2.5, "3", True, None)
    for turns in wrong_turns:
        with pytest.raises(ConfigError, match="max_turns must be an integer of at least 1"):
            MultiTurnWorkflow(always(1), GCONFIG, bpe, turns, 1.0)
    wrong_discounts: tuple[Any, ...] = (0.0, 1.5, float("nan"), "1", None)
    for discount in wrong_discounts:
        with pytest.raises(ConfigError, match="turn_discount"):
            MultiTurnWorkflow(always(1), GCONFIG, bpe, 2, discount)


def multi_turn(reward: Callable[..., Any], bpe: Tokenizer, **changes: Any) -> MultiTurnWorkflow:
    settings: dict[str, Any] = {"feedback_ids": [50, 51], "eos_token_id": 0} | changes
    gconfig = settings.pop("gconfig", GCONFIG)
    return MultiTurnWorkflow(reward, gconfig, bpe, 3, 0.5, **settings)


async def test_turns_go_on_until_a_reward(bpe: Tokenizer) -> None:
    engine = ScriptedEngine([7, 0], [8], [9, 0])
    row = await run(multi_turn(in_turn(0, 0, 1), bpe), engine, PROMPT)
    assert row is not None
    assert row.input_ids.tolist() == [1, 2, 3, 7, 0, 50, 51, 8, 0, 50, 51, 9, 0]
    assert row.loss_mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1]
    assert row.versions.tolist() == [-1, -1, -1, 0, 0, -1, -1, 1, -1, -1, -1, 2, 2]
    assert row.reward == 0.25


async def test_each_turn_reads_the_tokens_so_far_in_one_session(bpe: Tokenizer) -> None:
    engine = ScriptedEngine([7, 0], [8, 0], [9, 0], [9, 0])
    row = await run(multi_turn(in_turn(0, 0, 1), bpe), engine, PROMPT)
    assert row is not None
    for request in engine.requests:
        asked = request.input_ids.tolist()
        assert asked == row.input_ids.tolist()[: len(asked)]
    await run(multi_turn(always(1), bpe), engine, PROMPT)
    sessions = [request.session for request in engine.requests]
    assert len(set(sessions[:3])) == 1
    assert sessions[3] != sessions[0]


@pytest.mark.parametrize(("reward", "turns"), [(1, 1), (-1, 1), (0, 3)])
async def test_any_reward_but_zero_ends_it(bpe: Tokenizer, reward: int, turns: int) -> None:
    engine = ScriptedEngine(*[[7, 0]] * 3)
    row = await run(multi_turn(always(reward), bpe), engine, PROMPT)
    assert row is not None
    assert (row.reward, len(engine.requests)) == (float(reward), turns)


async def test_none_in_any_turn_rejects(bpe: Tokenizer) -> None:
    engine = ScriptedEngine([7, 0], [8, 0])
    assert await run(multi_turn(in_turn(0, None), bpe), engine, PROMPT) is None


async def test_no_turn_is_begun_without_room_for_an_answer(bpe: Tokenizer) -> None:
    """Three tokens of prompt, two of answer, two of feedback: 7, and the next answer needs one."""
    for max_tokens, turns in ((7, 1), (8, 2)):
        engine = ScriptedEngine([7, 0], [8, 0])
        gconfig = GCONFIG.new(max_tokens=max_tokens)
        row = await run(multi_turn(always(0), bpe, gconfig=gconfig), engine, PROMPT)
        assert row is not None
        assert len(engine.requests) == turns
        assert row.loss_mask[-2:].tolist() == [1, 1], "feedback that nobody answers is left out"


async def test_an_empty_answer_is_closed_like_any_other(bpe: Tokenizer) -> None:
    row = await run(multi_turn(in_turn(0, 1), bpe), ScriptedEngine([], [8]), PROMPT)
    assert row is not None
    assert row.input_ids.tolist() == [1, 2, 3, 0, 50, 51, 8]


async def test_without_an_end_token_nothing_is_put_after_an_answer(bpe: Tokenizer) -> None:
    workflow = multi_turn(in_turn(0, 1), bpe, eos_token_id=None)
    row = await run(workflow, ScriptedEngine([7], [8]), PROMPT)
    assert row is not None
    assert row.input_ids.tolist() == [1, 2, 3, 7, 50, 51, 8]


@pytest.mark.parametrize("finished", [True, False])
async def test_a_conversation_reads_as_the_template_renders_it(
    bpe: Tokenizer, finished: bool
) -> None:
    """Token for token: with the line break after an answer, which the model does not write."""
    tokenizer = ChatTokenizer(bpe)
    end = [tokenizer.eos_token_id] * finished
    answers = [tokenizer.encode(text) + end for text in ("it is one.", "it is two.")]
    engine = ScriptedEngine(*answers)
    workflow = MultiTurnWorkflow(in_turn(0, 1), GCONFIG, tokenizer, 2, 1.0, feedback="no.")
    question = {"role": "user", "content": "what is one and one?"}
    row = await run(workflow, engine, {"messages": [question]})
    assert row is not None
    conversation = [
        question,
        {"role": "assistant", "content": "it is one."},
        {"role": "user", "content": "no."},
    ]
    expected = tokenizer.render(conversation, answer_next=True) + "it is two."
    assert tokenizer.decode(row.input_ids.tolist()) == expected + "<|end|>" * finished
    learnt = row.input_ids[row.loss_mask == 1].tolist()
    assert learnt == answers[0] + answers[1]


async def test_a_tokenizer_without_a_template_encodes_the_feedback(bpe: Tokenizer) -> None:
    workflow = MultiTurnWorkflow(in_turn(0, 1), GCONFIG, bpe, 2, 1.0, feedback=" no.")
    row = await run(workflow, ScriptedEngine([7], [8]), PROMPT)
    assert row is not None
    assert row.input_ids.tolist() == [1, 2, 3, 7, *bpe.encode(" no.").ids, 8]


def test_an_end_token_that_the_template_does_not_use_cuts_after_the_answer(bpe: Tokenizer) -> None:
    tokenizer = ChatTokenizer(bpe)
    tokenizer.eos_token_id = 299
    workflow = MultiTurnWorkflow(always(1), GCONFIG, tokenizer, 2, 1.0, feedback="no.")
    assert tokenizer.decode(workflow._feedback_ids.tolist()) == "<|user|>no.<|end|>\n<|assistant|>"


class Rewriting(ChatTokenizer):
    """A template that hides earlier answers, as templates of reasoning models do with thoughts."""

    def render(self, messages: Sequence[Mapping[str, str]], *, answer_next: bool) -> str:
        if len(messages) > 2:
            messages = [{**m, "content": ""} for m in messages[:-1]] + [messages[-1]]
        return super().render(messages, answer_next=answer_next)


def test_a_template_that_rewrites_earlier_turns_is_refused(bpe: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="give feedback_ids"):
        MultiTurnWorkflow(always(1), GCONFIG, Rewriting(bpe), 2, 1.0)
    MultiTurnWorkflow(always(1), GCONFIG, Rewriting(bpe), 2, 1.0, feedback_ids=[5])


@pytest.mark.parametrize("turns_before", [0, 1])
async def test_cancellation_passes_through(bpe: Tokenizer, turns_before: int) -> None:
    started = trio.Event()

    class Hanging(ScriptedEngine):
        async def agenerate(self, request: ModelRequest) -> ModelResponse:
            if self.answers:
                return await super().agenerate(request)
            started.set()
            await trio.sleep_forever()
            raise AssertionError

    ended: list[object] = []
    engine = Hanging(*[[7, 0]] * turns_before)
    async with trio.open_nursery() as nursery:

        async def episode() -> None:
            ended.append(await multi_turn(always(0), bpe).arun_episode(engine, PROMPT))

        nursery.start_soon(episode)
        await started.wait()
        nursery.cancel_scope.cancel()
    assert ended == []
