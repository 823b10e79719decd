"""The whole library against two real servers: balance, updates in mid-run, exact versions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from arealtrio.config import RolloutConfig
from arealtrio.controller import RolloutController
from arealtrio.trajectory import Batch, Group
from arealtrio.types import (
    Float32Array,
    GenerationHyperparameters,
    Int32Array,
    PauseMode,
    Trajectory,
)
from arealtrio.weights import WeightUpdate
from arealtrio.workflow import SingleTurnWorkflow

from .recorder import Recorder, SpyWorkflow, recording
from .server import CAP, Scored, VllmServer
from .until import wait_until

pytestmark = pytest.mark.real_servers

PROMPTS = 64
GROUP_SIZE = 4
BATCH = 16
MODEL_OF_VERSION = ("tiny-1", "tiny-2", "tiny-3", "tiny-2")  # as the run below updates them
LOGPROB_TOLERANCE = 1e-4
# Greedy members of a group are alike; were their lengths to differ between groups, the server that
# happens to get the long ones would rightly get fewer requests, and the shares would show nothing.
GREEDY = GenerationHyperparameters(greedy=True, ignore_eos=True, max_new_tokens=100)
# Any three ids end an answer anywhere between its first token and the limit.
SAMPLED = GenerationHyperparameters(
    temperature=1.0, ignore_eos=True, stop_token_ids=(7, 97, 203), max_new_tokens=160
)


def prompts() -> list[dict[str, Any]]:
    chance = random.Random(20)
    return [
        {
            "input_ids": [chance.randrange(3, 371) for _ in range(chance.randrange(4, 24))],
            "prompt_id": f"prompt-{n}",
        }
        for n in range(PROMPTS)
    ]


def config(servers: Sequence[VllmServer], **changes: Any) -> RolloutConfig:
    given: dict[str, Any] = {
        "servers": [s.url for s in servers],
        "backend": "vllm",
        "consumer_batch_size": BATCH,
        "max_staleness": 1,
        "max_concurrent_rollouts": CAP * len(servers),
    }
    return RolloutConfig(**(given | changes))


def reward(*_: Any, **__: Any) -> float:
    return 1.0


class Run:
    """Four batches of sixteen groups of four, with new weights after each of the first three."""

    def __init__(
        self,
        servers: Sequence[VllmServer],
        gconfig: GenerationHyperparameters,
        pause: PauseMode,
        recorder: Recorder,
    ) -> None:
        self.servers = servers
        self.recorder = recorder
        self.batches: list[Batch] = []
        workflow = SpyWorkflow(SingleTurnWorkflow(reward, gconfig))
        self.responses = workflow.responses
        with RolloutController(config(servers), transport=recorder) as rollout:
            data = prompts()
            for step in range(PROMPTS // BATCH):
                self.batches.append(rollout.prepare_batch(data, workflow, group_size=GROUP_SIZE))
                if step + 1 < len(MODEL_OF_VERSION):
                    self._update(rollout, step + 1, pause)
            self.counts = rollout.rollout_counts()

    def _update(self, rollout: RolloutController, version: int, pause: PauseMode) -> None:
        path = self.servers[0].models / MODEL_OF_VERSION[version]
        result = rollout.update_weights(WeightUpdate.from_disk(path, version, pause=pause))
        assert sorted(result.updated) == sorted(s.url for s in self.servers)

    @property
    def groups(self) -> list[Group]:
        return [group for batch in self.batches for group in batch.groups]

    @property
    def rows(self) -> list[Trajectory]:
        return [row for group in self.groups for row in group.rows]


@pytest.mark.parametrize(
    ("gconfig", "pause"),
    [(GREEDY, "keep"), (SAMPLED, "abort")],
    ids=["greedy-keep", "sampled-abort"],
)
def test_a_run_with_weight_updates_in_the_middle(
    vllm_servers: Sequence[VllmServer], gconfig: GenerationHyperparameters, pause: PauseMode
) -> None:
    with recording() as recorder:
        run = Run(vllm_servers, gconfig, pause, recorder)
    assert_every_group_is_delivered_once(run)
    assert_nothing_is_too_old(run)
    assert_an_update_met_generations_under_way(run, interrupts=pause == "abort")
    assert_tokens_and_versions_are_the_servers_own(run)
    assert_the_load_was_shared(run)
    assert_nothing_is_left(vllm_servers)
    assert_each_token_was_made_by_its_version(run, greedy=gconfig.greedy)


def assert_every_group_is_delivered_once(run: Run) -> None:
    assert [len(batch) for batch in run.batches] == [BATCH] * (PROMPTS // BATCH)
    assert sorted(g.prompt_id for g in run.groups) == sorted(str(p["prompt_id"]) for p in prompts())
    assert {len(group) for group in run.groups} == {GROUP_SIZE}
    assert run.counts["accepted"] == run.counts["submitted"] == PROMPTS


def assert_nothing_is_too_old(run: Run) -> None:
    for consuming, batch in enumerate(run.batches):
        assert batch.version == consuming
        for row in batch.rows:
            assert row.head_version is not None
            assert consuming - 1 <= row.head_version
            assert row.tail_version is not None
            assert row.tail_version <= consuming
            assert row.versions_exact


def assert_an_update_met_generations_under_way(run: Run, *, interrupts: bool) -> None:
    """Else the run shows nothing: the updates have to fall into the middle of generations."""
    assert any(len(set(r.output_versions.tolist())) > 1 for r in run.responses)
    assert any(len(r.segments) > 1 for r in run.responses) == interrupts


def assert_tokens_and_versions_are_the_servers_own(run: Run) -> None:
    """Token by token what the servers said, as it came over the wire."""
    assert len(run.responses) == PROMPTS * GROUP_SIZE
    for response in run.responses:
        assert response.output_tokens.tolist() == run.recorder.tokens_told(response.rid)
        assert response.output_versions.tolist() == run.recorder.versions_told(response.rid)
    told = sorted((*r.output_tokens.tolist(), *r.output_versions.tolist()) for r in run.responses)
    learnt = sorted((*made(row, row.input_ids), *made(row, row.versions)) for row in run.rows)
    assert learnt == told


def made(row: Trajectory, values: Int32Array | Float32Array) -> list[Any]:
    """Return what belongs to the tokens that a model made."""
    theirs: list[Any] = values[row.loss_mask == 1].tolist()
    return theirs


def assert_the_load_was_shared(run: Run) -> None:
    """No server was kept much busier than the other.

    Two cores that also run this test may give one of the servers three times the other's speed. It
    then rightly gets three times the requests, so it is not they that are alike but the requests
    under way: nearly as many seconds of waiting for one server as for the other. Where the two
    are as fast as each other, this says the same of the requests.
    """
    asked = [run.recorder.asked[s.url] for s in run.servers]
    busy_s = [run.recorder.busy_s[s.url] for s in run.servers]
    assert sum(asked) >= PROMPTS * GROUP_SIZE
    assert min(busy_s) >= 0.3 * sum(busy_s), (busy_s, asked)


def assert_nothing_is_left(servers: Sequence[VllmServer]) -> None:
    assert [s.in_flight() for s in servers] == [0, 0]


def assert_each_token_was_made_by_its_version(run: Run, *, greedy: bool) -> None:
    """Ask each version's weights, in one pass over each row, what they think of their tokens.

    This catches a wrong version, a wrong log-probability, a lost or doubled token at a joint, and
    keys and values that outlived their weights. Under greedy sampling each token has to be the
    likeliest, too; one as likely within the tolerance may take its place, because a server's sums
    depend on what else was in the batch.
    """
    versions = sorted({v for row in run.rows for v in made(row, row.versions)})
    assert versions[0] == 0
    assert len(versions) >= 3
    for version in versions:
        for server in run.servers:
            server.load(MODEL_OF_VERSION[version], version=version)
        rows = [row for row in run.rows if version in row.versions]
        for row, scores in zip(rows, score_all(run.servers, rows), strict=True):
            ours = np.flatnonzero(row.versions == version)
            thought = np.array([scores[i - 1] for i in ours])
            np.testing.assert_allclose(
                row.logprobs[ours], thought[:, 0], rtol=0, atol=LOGPROB_TOLERANCE
            )
            if greedy:
                assert np.all(thought[:, 0] >= thought[:, 1] - LOGPROB_TOLERANCE)


def score_all(servers: Sequence[VllmServer], rows: Sequence[Trajectory]) -> list[list[Scored]]:
    with ThreadPoolExecutor(CAP) as threads:
        return list(
            threads.map(
                lambda numbered: servers[numbered[0] % len(servers)].score(numbered[1]),
                enumerate(row.input_ids.tolist() for row in rows),
            )
        )


def test_greedy_tokens_are_those_of_a_direct_request_before_and_after_an_update(
    vllm_servers: Sequence[VllmServer],
) -> None:
    workflow = SingleTurnWorkflow(reward, GREEDY.new(max_new_tokens=64))
    data = prompts()[:4]
    with RolloutController(config(vllm_servers)) as rollout:
        before = rollout.rollout_batch(data, workflow)
        assert_equal_to_direct_requests(vllm_servers, before, version=0)
        rollout.update_weights(WeightUpdate.from_disk(vllm_servers[0].models / "tiny-3", version=1))
        after = rollout.rollout_batch(data, workflow)
        assert_equal_to_direct_requests(vllm_servers, after, version=1)
    old, new = ([made(row, row.input_ids) for row in batch.rows] for batch in (before, after))
    assert all(a != b for a, b in zip(old, new, strict=True))


def assert_equal_to_direct_requests(
    servers: Sequence[VllmServer], batch: Batch, version: int
) -> None:
    for row in batch.rows:
        prompt = row.input_ids[row.loss_mask == 0].tolist()
        tokens = made(row, row.input_ids)
        for server in servers:
            ids, logprobs = server.greedy(prompt, len(tokens))
            assert tokens == ids
            assert made(row, row.logprobs) == pytest.approx(logprobs, abs=LOGPROB_TOLERANCE)
        assert set(made(row, row.versions)) == {version}


def test_leaving_in_the_middle_leaves_nothing_on_the_servers(
    vllm_servers: Sequence[VllmServer],
) -> None:
    endless = SingleTurnWorkflow(reward, GREEDY.new(max_new_tokens=12000))
    with RolloutController(config(vllm_servers, max_staleness=4)) as rollout:
        for prompt in prompts()[: 3 * BATCH]:
            rollout.submit(prompt, endless)
        wait_until(lambda: all(running(s) == CAP for s in vllm_servers), "both servers are full")
    wait_until(lambda: sum(s.in_flight() for s in vllm_servers) == 0, "both are empty", limit_s=5)


def running(server: VllmServer) -> int:
    return int(server.metrics()["vllm:num_requests_running"])
