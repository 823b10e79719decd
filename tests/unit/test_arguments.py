"""RolloutArguments: what a call wants done is resolved, and refused where it can not be."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from arealtrio.arguments import (
    ArgumentResolver,
    RolloutArguments,
    positive,
    resolve_accept,
    resolve_workflow,
)
from arealtrio.config import GROUP_SIZE_MAX
from arealtrio.errors import UsageError
from arealtrio.group_policy import GroupPolicy
from arealtrio.trajectory import Group

from .puppet import Instant, row


def accept_all(group: Group) -> bool:
    return True


def test_a_workflow_is_an_instance_a_class_or_a_path() -> None:
    instance = Instant()
    assert resolve_workflow(instance) is instance
    assert isinstance(resolve_workflow(Instant, {"decide": accept_all}), Instant)
    path = "arealtrio.workflow:SingleTurnWorkflow"
    with pytest.raises(TypeError):  # its constructor's own, for missing arguments
        resolve_workflow(path)


class NotACoroutine:
    def arun_episode(self, engine: Any, data: Any, /) -> Any:
        return None


@pytest.mark.parametrize("workflow", [object(), NotACoroutine(), NotACoroutine, int, "json:dumps"])
def test_what_is_no_workflow_is_refused(workflow: Any) -> None:
    with pytest.raises(UsageError, match="arun_episode"):
        resolve_workflow(workflow)


@pytest.mark.parametrize("path", ["no.such.module:name", "json:no_such_name", "", "3:4"])
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    for resolve in (resolve_workflow, resolve_accept):
        with pytest.raises(UsageError, match="can not be imported"):
            resolve(path)


def test_a_workflow_gets_a_dict() -> None:
    arguments = RolloutArguments.of(Instant(), None, None, 1)
    prompt = {"prompt_id": 3}
    assert arguments.group("t", prompt, lambda *_: None).data is prompt
    copied = arguments.group("t", MappingProxyType(prompt), lambda *_: None).data
    assert (type(copied), copied) == (dict, prompt)


def test_arguments_for_an_instance_are_refused() -> None:
    with pytest.raises(UsageError, match="made already"):
        resolve_workflow(Instant(), {"decide": accept_all})


def test_a_filter_is_a_function_a_path_or_none() -> None:
    assert resolve_accept(None) is None
    assert resolve_accept(accept_all) is accept_all
    assert callable(resolve_accept("operator:truth"))
    with pytest.raises(UsageError, match="can not be called: int"):
        resolve_accept(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -3, 1.0, "2", True, None])
def test_positive_refuses(value: Any) -> None:
    with pytest.raises(UsageError, match="size must be an integer of at least 1"):
        positive("size", value)
    assert positive("size", 3) == 3


@pytest.mark.parametrize("size", [GROUP_SIZE_MAX + 1, 99_999_999_999])
def test_a_group_has_a_largest_size(size: int) -> None:
    with pytest.raises(UsageError, match=f"group_size must be at most {GROUP_SIZE_MAX}, not"):
        RolloutArguments.of(Instant(), None, None, size)
    largest = RolloutArguments.of(Instant(), None, None, GROUP_SIZE_MAX)
    assert largest.group("t", {}, lambda *_: None).size == GROUP_SIZE_MAX


@pytest.mark.parametrize("policy", ["replace", "", 0, GroupPolicy, GroupPolicy.replace])
def test_a_policy_that_is_none_is_refused_before_anything_runs(policy: Any) -> None:
    """It would be asked first when a member fails, and end the run."""
    resolve = ArgumentResolver()
    workflow = Instant()
    assert resolve(workflow, None, None, 2, None).policy == GroupPolicy.all()
    for refuse in (resolve, RolloutArguments.of):
        with pytest.raises(UsageError, match=r"must be a GroupPolicy, such as GroupPolicy\.rep"):
            refuse(workflow, None, None, 2, policy)


def test_arguments_are_resolved_once() -> None:
    arguments = RolloutArguments.of(Instant, {"decide": lambda _: row()}, None, 2)
    assert isinstance(arguments.workflow, Instant)
    group = arguments.group("t", {"prompt_id": 3}, lambda *_: None)
    assert group.is_batched
    assert not group.is_eval
    assert (group.size, group.prompt_id) == (2, "3")
    with pytest.raises(UsageError, match="group_size"):
        RolloutArguments.of(Instant, None, None, 0)
