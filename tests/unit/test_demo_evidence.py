"""What the demo claims, checked from outside: from its weight files, and by a plain HTTP client."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import trio
from click.testing import CliRunner

from arealtrio import cli
from arealtrio.demo import training
from arealtrio.demo.trainer import PolicyTrainer, StepReport, TrainingBatch
from arealtrio.embedded.serve import ServerSettings, running_server

STEPS = 20
KEYS, FIRST_ANSWER_ID = (1, 2, 3, 4), 5
PROMPTS = [[key, salt, 44 - salt] for key in KEYS for salt in range(8, 36, 4)]
ANSWER_LENGTH = 40


@dataclass
class Evidence:
    """The files of one run, its own report, and what its trainer was given, batch by batch."""

    weights: Path
    report: dict[str, Any]
    batches: list[TrainingBatch] = field(default_factory=list)


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    at = tmp_path_factory.mktemp("demo")
    found = Evidence(at / "weights", {})

    class RecordingTrainer(PolicyTrainer):
        def step(self, batch: TrainingBatch) -> StepReport:
            found.batches.append({name: array.copy() for name, array in batch.items()})
            return super().step(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PolicyTrainer", RecordingTrainer)
        numbers = str(at / "numbers.json")
        options = ["--quiet", "--keep-weights", str(found.weights), "--json", numbers]
        result = CliRunner().invoke(cli.main, ["demo", "--steps", str(STEPS), *options])
    assert (result.exit_code, result.output) == (0, "")
    found.report = json.loads(Path(numbers).read_text())
    return found


def plain_logprobs(
    weights: dict[str, npt.NDArray[Any]], row: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """log p of each token of a row but the first, after those before it, one token at a time.

    The network of the weight file written down again, in float64, from its documentation.
    """
    prefix, vocab = int(weights["prefix"]), len(weights["embedding"]) - 1
    window = weights["hidden"].shape[0] // weights["embedding"].shape[1] - prefix
    out = []
    for t in range(1, len(row)):
        before = row[:t].tolist()
        first = (before[:prefix] + [vocab] * prefix)[:prefix]
        last = ([vocab] * window + before)[-window:]
        seen = weights["embedding"].astype(float)[first + last].reshape(-1)
        hidden = np.tanh(seen @ weights["hidden"].astype(float) + weights["hidden_bias"])
        logits = hidden @ weights["output"].astype(float) + weights["output_bias"]
        out.append(logits[row[t]] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
    return np.array(out)


def generated(batch: TrainingBatch, index: int) -> npt.NDArray[np.bool_]:
    return np.asarray(batch["loss_mask"][index, 1:] != 0)


def test_each_logprob_is_that_of_the_weights_that_the_token_s_version_names(
    evidence: Evidence,
) -> None:
    """A sample of rows, those of several versions first: each token by its own weight file."""
    files = [dict(np.load(evidence.weights / f"v{n}" / "weights.npz")) for n in range(STEPS + 1)]
    checked = mixed = 0
    told_apart = []
    for batch in evidence.batches:
        versions = [
            set(batch["versions"][i, 1:][generated(batch, i)].tolist())
            for i in range(len(batch["versions"]))
        ]
        by_mixture = sorted(range(len(versions)), key=lambda i: -len(versions[i]))
        for index in by_mixture[:3]:
            chosen = generated(batch, index)
            length = int(batch["attention_mask"][index].sum())
            row = batch["input_ids"][index, :length]
            by_version = {v: plain_logprobs(files[v], row) for v in versions[index]}
            names = batch["versions"][index, 1:length]
            for t in np.flatnonzero(chosen[: length - 1]):
                given = batch["logprobs"][index, t + 1]
                assert given == pytest.approx(by_version[int(names[t])][t], abs=1e-4)
                told_apart += [abs(given - p[t]) for v, p in by_version.items() if v != names[t]]
            checked += int(chosen.sum())
            mixed += len(versions[index]) > 1
    assert len(evidence.batches) == STEPS
    assert checked > 1000
    assert mixed > STEPS
    assert np.median(told_apart) > 1e-3, "any version's file would have passed"


def greedy_reward(key: int, answer: list[int]) -> float:
    """The task's rule, written down again: tokens of the prompt's class, of all."""
    residue = KEYS.index(key)
    return sum(t >= 5 and (t - FIRST_ANSWER_ID) % 4 == residue for t in answer) / len(answer)


async def mean_reward(weights: Path) -> float:
    """What weights earn, served afresh and asked greedily."""
    rewards: list[float] = []

    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> None:
        body = {
            "prompt": prompt, "max_tokens": ANSWER_LENGTH, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }  # fmt: skip
        answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
        rewards.append(greedy_reward(prompt[0], answer["choices"][0]["token_ids"]))

    async with (
        running_server(ServerSettings(weights=weights, max_num_seqs=len(PROMPTS))) as server,
        httpx.AsyncClient(base_url=server.url, timeout=60) as client,
        trio.open_nursery() as nursery,
    ):
        for prompt in PROMPTS:
            nursery.start_soon(ask, client, prompt)
    assert len(rewards) == len(PROMPTS)
    return float(np.mean(rewards))


async def test_the_last_weights_earn_more_than_the_first_when_served_afresh(
    evidence: Evidence,
) -> None:
    first = await mean_reward(evidence.weights / "v0")
    last = await mean_reward(evidence.weights / f"v{STEPS}")
    claimed = evidence.report["reward_last"] - evidence.report["reward_first"]
    assert claimed >= 0.3
    assert last - first >= 0.3
    assert last >= evidence.report["reward_last"] - 0.1  # greedy, it is hardly worse than sampled


def test_what_the_trainer_saw_is_what_the_report_says(evidence: Evidence) -> None:
    batches, report = evidence.batches, evidence.report
    masks = [batch["loss_mask"] != 0 for batch in batches]
    assert report["tokens"] == sum(int(mask.sum()) for mask in masks)
    means = [float(batch["rewards"].mean()) for batch in batches]
    assert report["reward_first"] == pytest.approx(np.mean(means[:3]))
    assert report["reward_last"] == pytest.approx(np.mean(means[-3:]))
    oldest = max(
        consumed - int(batch["versions"][mask].min())
        for consumed, (batch, mask) in enumerate(zip(batches, masks, strict=True))
    )
    assert report["staleness_max"] == oldest <= 4
