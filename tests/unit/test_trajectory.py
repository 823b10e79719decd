"""Groups, and batches as arrays; the memory they use again; and the arithmetic of staleness."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from arealtrio import trajectory
from arealtrio.errors import ConfigError, UsageError, WorkflowError
from arealtrio.trajectory import Batch, CollateBuffers, Group, rows_from_result
from arealtrio.types import Trajectory


def row(
    versions: list[int], reward: float = 0.0, extras: dict[str, Any] | None = None
) -> Trajectory:
    """A row whose token ids are 100 and up, and whose -1 versions are its prompt."""
    made = np.array(versions) >= 0
    return Trajectory(
        input_ids=np.arange(100, 100 + len(versions), dtype=np.int32),
        loss_mask=made.astype(int),
        logprobs=np.where(made, -0.5, 0.0),
        versions=np.array(versions),
        reward=reward,
        extras=extras or {},
    )


def group(*members: list[Trajectory], number: int = 0) -> Group:
    return Group.of(members, number=number, permit_version=0, prompt_id="p", task_id="t")


def batch(*groups: Group, version: int = 9) -> Batch:
    return Batch(groups=groups, version=version)


def test_a_group_stamps_its_rows() -> None:
    made = Group.of(
        [[row([-1, 4])], [], [row([-1, 2, 3], 1.0), row([-1])]],
        number=7,
        permit_version=2,
        prompt_id="prompt-3",
        task_id="task-1",
    )
    assert [r.member_index for r in made.rows] == [0, 2, 2]
    assert {r.prompt_id for r in made.rows} == {"prompt-3"}
    assert (len(made), len(made.rows)) == (3, 3)
    assert (made.number, made.permit_version, made.task_id) == (7, 2, "task-1")
    assert made.rewards.tolist() == [0.0, 1.0, 0.0]
    assert made.rewards.dtype == np.float32


def test_a_group_is_as_old_as_its_oldest_member() -> None:
    made = group([row([-1, 4, 5])], [row([-1, 2])], [row([-1])])
    assert (made.head_version, made.tail_version) == (2, 5)


def test_a_group_without_a_generated_token_has_no_version() -> None:
    made = group([row([-1])])
    assert (made.head_version, made.tail_version) == (None, None)


@pytest.mark.parametrize("members", [[], [[]], [[], []]])
def test_an_accepted_group_has_rows(members: list[list[Trajectory]]) -> None:
    with pytest.raises(UsageError, match="settle it as rejected"):
        group(*members)


def two_groups() -> Batch:
    return batch(
        group([row([-1, 3], 1.0)], [row([-1, 3, 4, 4], -1.0)], number=5),
        group([row([-1, 5, 5], 0.5)], number=6),
    )


def test_a_batch_counts_groups_and_keeps_their_order() -> None:
    made = two_groups()
    assert len(made) == 2
    assert [len(r) for r in made.rows] == [2, 4, 3]
    assert made.failures == ()


def test_padded() -> None:
    arrays = two_groups().padded(pad_id=9)
    assert arrays["input_ids"].tolist() == [
        [100, 101, 9, 9],
        [100, 101, 102, 103],
        [100, 101, 102, 9],
    ]
    assert arrays["loss_mask"].tolist() == [[0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]]
    assert arrays["logprobs"][2].tolist() == [0.0, -0.5, -0.5, 0.0]
    assert arrays["versions"].tolist() == [[-1, 3, -1, -1], [-1, 3, 4, 4], [-1, 5, 5, -1]]
    assert arrays["attention_mask"].sum(axis=1).tolist() == [2, 4, 3]
    assert arrays["rewards"].tolist() == [1.0, -1.0, 0.5]
    assert arrays["group_ids"].tolist() == [0, 0, 1]
    assert {name: array.dtype.str[1:] for name, array in arrays.items()} == {
        "input_ids": "i4",
        "loss_mask": "i4",
        "logprobs": "f4",
        "versions": "i4",
        "attention_mask": "b1",
        "rewards": "f4",
        "group_ids": "i4",
    }


def test_packed() -> None:
    arrays = two_groups().packed()
    assert arrays["cu_seqlens"].tolist() == [0, 2, 6, 9]
    assert arrays["cu_seqlens"].dtype == np.int32
    assert arrays["max_seqlen"] == 4
    assert arrays["input_ids"].tolist() == [100, 101, 100, 101, 102, 103, 100, 101, 102]
    assert arrays["versions"].tolist() == [-1, 3, -1, 3, 4, 4, -1, 5, 5]
    assert arrays["rewards"].tolist() == [1.0, -1.0, 0.5]
    assert arrays["group_ids"].tolist() == [0, 0, 1]


def test_packed_is_padded_without_the_padding() -> None:
    made = two_groups()
    padded, packed = made.padded(), made.packed()
    shown = padded["attention_mask"]
    for name in ("input_ids", "loss_mask", "logprobs", "versions"):
        assert packed[name].tolist() == padded[name][shown].tolist()


def test_areals_dict_goes_round() -> None:
    made = two_groups()
    arrays = made.padded()
    del arrays["group_ids"]
    for before, after in zip(made.rows, rows_from_result(arrays), strict=True):
        assert after.input_ids.tolist() == before.input_ids.tolist()
        assert after.versions.tolist() == before.versions.tolist()
        assert after.logprobs.tolist() == before.logprobs.tolist()
        assert after.reward == before.reward


def test_an_empty_batch_has_empty_arrays() -> None:
    empty = batch()
    assert empty.padded()["input_ids"].shape == (0, 0)
    assert empty.packed()["cu_seqlens"].tolist() == [0]
    assert empty.packed()["max_seqlen"] == 0
    assert empty.staleness().tolist() == []
    assert empty.staleness_histogram() == empty.staleness_histogram(of="trajectories") == {}


def with_extra(length: int, dtype: npt.DTypeLike, name: str = "values") -> Trajectory:
    return row([0] * length, extras={name: np.arange(length, dtype=dtype)})


def test_extras_are_collated_under_their_own_names() -> None:
    made = batch(group([with_extra(1, np.float32)], [with_extra(3, np.float32)]))
    assert made.padded()["values"].tolist() == [[0, 0, 0], [0, 1, 2]]
    assert made.packed()["values"].tolist() == [0, 0, 1, 2]
    assert made.padded()["values"].dtype == np.float32


@pytest.mark.parametrize(
    "other", [row([0]), with_extra(1, np.int32), with_extra(1, np.float32, "other")]
)
def test_rows_with_other_extras_are_refused_together(other: Trajectory) -> None:
    made = batch(group([with_extra(1, np.float32)]), group([other]))
    for collated in (made.padded, made.packed):
        with pytest.raises(WorkflowError, match="must have the same extras"):
            collated()
    assert len(made.rows) == 2


def test_an_extra_never_replaces_a_column() -> None:
    made = batch(group([with_extra(2, np.int32, "cu_seqlens")]))
    with pytest.raises(WorkflowError, match="extras can not be called cu_seqlens"):
        made.packed()


def test_more_tokens_than_int32_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "INT32_MAX", 8)
    with pytest.raises(UsageError, match="9 tokens can not be packed"):
        two_groups().packed()


def test_a_pad_id_outside_int32_is_refused() -> None:
    with pytest.raises(OverflowError):
        two_groups().padded(pad_id=2**31)


def test_buffers_keep_a_batch_until_their_turn_comes_again() -> None:
    ring = CollateBuffers(2)
    first = batch(group([row([1, 1])])).padded(buffers=ring)
    second = batch(group([row([2, 2])])).padded(buffers=ring)
    assert first["versions"].tolist() == [[1, 1]]
    third = batch(group([row([3, 3])])).padded(buffers=ring)
    assert np.shares_memory(first["versions"], third["versions"])
    assert first["versions"].tolist() == [[3, 3]], "documented: overwritten in place"
    assert second["versions"].tolist() == [[2, 2]]


def test_padded_and_packed_share_the_ring() -> None:
    ring = CollateBuffers(1)
    padded = two_groups().padded(buffers=ring)
    packed = two_groups().packed(buffers=ring)
    assert np.shares_memory(padded["input_ids"], packed["input_ids"])
    assert packed["input_ids"].tolist() == two_groups().packed()["input_ids"].tolist()


def test_without_buffers_every_array_is_the_callers() -> None:
    made = two_groups()
    assert not np.shares_memory(made.padded()["input_ids"], made.padded()["input_ids"])


def test_buffers_grow_and_leave_the_arrays_before_alone() -> None:
    ring = CollateBuffers(1)
    small = batch(group([row([1])])).padded(buffers=ring)
    large = batch(group([row([2] * 50)])).padded(buffers=ring)
    assert small["versions"].tolist() == [[1]]
    assert large["versions"].tolist() == [[2] * 50]
    held = ring.size_bytes
    assert held >= 50 * (4 * 4 + 1)
    again = batch(group([row([3] * 20)])).padded(buffers=ring)
    assert np.shares_memory(large["versions"], again["versions"])
    assert ring.size_bytes == held


def test_a_call_that_raises_uses_up_no_place() -> None:
    ring = CollateBuffers(2)
    first = two_groups().padded(buffers=ring)
    with pytest.raises(OverflowError):
        two_groups().padded(pad_id=2**31, buffers=ring)
    second = two_groups().padded(buffers=ring)
    assert not np.shares_memory(first["input_ids"], second["input_ids"])
    assert first["input_ids"].tolist() == second["input_ids"].tolist()


def test_an_extra_may_change_its_dtype_between_batches() -> None:
    ring = CollateBuffers(1)
    batch(group([with_extra(2, np.int32)])).padded(buffers=ring)
    arrays = batch(group([with_extra(2, np.float32)])).padded(buffers=ring)
    assert arrays["values"].dtype == np.float32


def test_a_ring_has_a_place() -> None:
    assert CollateBuffers().size == 2
    wrong_sizes: tuple[Any, ...] = (0, 2.5, "2")
    for size in wrong_sizes:
        with pytest.raises(ConfigError, match=f"at least 1, not {size!r}"):
            CollateBuffers(size)


def test_staleness_is_that_of_the_oldest_token() -> None:
    made = batch(group([row([-1, 3, 9])], [row([-1, 9])], [row([-1])]), version=9)
    assert made.staleness().tolist() == [6, 0, 0]
    assert made.staleness().dtype == np.int32


def test_the_histogram_counts_generated_tokens_or_trajectories() -> None:
    made = batch(group([row([-1, 3, 9])], [row([-1, 9, 9])], [row([-1])]), version=9)
    assert made.staleness_histogram() == {0: 3, 6: 1}
    assert made.staleness_histogram(of="trajectories") == {0: 2, 6: 1}


def test_no_count_of_versions_takes_a_negative_one_for_a_token_s() -> None:
    """A workflow may mark what no model made by another number than -1."""
    made = batch(group([row([-2, -100, 9])]), version=9)
    assert made.staleness_histogram() == made.staleness_histogram(of="trajectories") == {0: 1}


def test_a_word_for_neither_choice_is_refused() -> None:
    made = batch(group([row([-1, 3])]))
    with pytest.raises(UsageError, match="of must be one of tokens, trajectories, not 'token'"):
        made.staleness_histogram("token")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="layout must be one of padded, packed, not 'flat'"):
        made.to_torch(layout="flat")  # type: ignore[arg-type]


def test_mixed_versions_are_counted_by_trajectory() -> None:
    made = batch(group([row([-1, 3, 9])], [row([9, 9])], [row([-1])], [row([1, -1, 2, 3])]))
    assert made.mixed_version_trajectories() == 2


@pytest.fixture
def torch_that_is_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for torch where it is not installed: ``from_numpy`` shares memory, as torch's does."""
    stand_in = types.ModuleType("torch")
    stand_in.__dict__["from_numpy"] = lambda array: ("tensor", array)
    monkeypatch.setitem(sys.modules, "torch", stand_in)


@pytest.mark.usefixtures("torch_that_is_numpy")
def test_to_torch_shares_memory_and_takes_either_layout() -> None:
    ring = CollateBuffers(1)
    made = two_groups()
    padded = made.to_torch(9, buffers=ring)
    assert all(kind == "tensor" for kind, _ in padded.values())
    assert padded["input_ids"][1].tolist() == made.padded(9)["input_ids"].tolist()
    packed = made.to_torch(layout="packed", buffers=ring)
    assert packed["max_seqlen"] == 4
    assert np.shares_memory(packed["input_ids"][1], padded["input_ids"][1])


def test_to_torch_without_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match="torch, which is not installed"):
        two_groups().to_torch()


def test_to_torch_with_the_real_torch() -> None:
    torch = pytest.importorskip("torch")
    tensors = two_groups().to_torch()
    assert tensors["input_ids"].dtype == torch.int32
    assert tensors["attention_mask"].dtype == torch.bool
    assert tensors["logprobs"].dtype == torch.float32
    assert tensors["rewards"].tolist() == [1.0, -1.0, 0.5]
