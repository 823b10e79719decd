"""RolloutArguments: what a call wants done with its prompts, resolved and checked."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checks import integer, shown
from .config import GROUP_SIZE_MAX
from .errors import UsageError
from .group_policy import GroupPolicy
from .groups import ALL_MEMBERS, AcceptFunction, Deliver, GroupTask, WorkflowLike
from .loader import Prompt
from .workflow import RolloutWorkflow


@dataclass(frozen=True, slots=True)
class RolloutArguments:
    """What a call wants done with its prompts, checked.

    Args:
        workflow: Runs one member.
        should_accept: The filter.
        group_size: Members of a group, at most ``GROUP_SIZE_MAX``.
        policy: What becomes of a group when a member does not succeed.
    """

    workflow: RolloutWorkflow
    should_accept: AcceptFunction | None
    group_size: int
    policy: GroupPolicy

    @classmethod
    def of(
        cls,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None,
        should_accept_fn: AcceptFunction | str | None,
        group_size: int,
        group_policy: GroupPolicy | None = None,
    ) -> RolloutArguments:
        """Resolve a caller's arguments.

        Raises:
            UsageError: If one of them is not what it should be.
        """
        return cls(
            resolve_workflow(workflow, workflow_kwargs),
            resolve_accept(should_accept_fn),
            positive("group_size", group_size, GROUP_SIZE_MAX),
            resolve_policy(group_policy),
        )

    def group(
        self,
        task_id: str,
        prompt: Prompt,
        deliver: Deliver,
        *,
        is_eval: bool = False,
        is_batched: bool = True,
    ) -> GroupTask:
        """A group of one prompt.

        Raises:
            UsageError: If the prompt is no mapping.
        """
        return GroupTask(
            task_id=task_id,
            data=prompt if type(prompt) is dict else as_dict(prompt),
            workflow=self.workflow,
            should_accept=self.should_accept,
            size=self.group_size,
            policy=self.policy,
            deliver=deliver,
            is_eval=is_eval,
            is_batched=is_batched,
        )


class ArgumentResolver:
    """Resolves what a caller gives, but only once where it gives the same for one prompt after the
    other, as a training loop does.

    A class or an import path is resolved each time: each call gets an instance of its own.
    """

    def __init__(self) -> None:
        self._last: RolloutArguments | None = None

    def __call__(
        self,
        workflow: WorkflowLike,
        workflow_kwargs: Mapping[str, Any] | None,
        should_accept_fn: AcceptFunction | str | None,
        group_size: int,
        group_policy: GroupPolicy | None,
    ) -> RolloutArguments:
        """See ``RolloutArguments.of``."""
        last = self._last
        if (
            last is not None
            and workflow is last.workflow
            and should_accept_fn is last.should_accept
            and group_size is last.group_size  # not ==: True is no size
            and (ALL_MEMBERS if group_policy is None else group_policy) is last.policy
            and not workflow_kwargs
        ):
            return last
        self._last = RolloutArguments.of(
            workflow, workflow_kwargs, should_accept_fn, group_size, group_policy
        )
        return self._last


def as_dict(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as a workflow may ask for it; a dict as it is, of another mapping a copy.

    Raises:
        UsageError: If it is no mapping.
    """
    if isinstance(prompt, dict):
        return prompt
    if isinstance(prompt, Mapping):
        return dict(prompt)
    raise UsageError(
        f"a prompt is a mapping, such as {{'input_ids': [...]}}, not {type(prompt).__name__}"
    )


def resolve_workflow(
    workflow: WorkflowLike, workflow_kwargs: Mapping[str, Any] | None = None
) -> RolloutWorkflow:
    """Return a workflow instance.

    Args:
        workflow: An instance; or a class, made with ``workflow_kwargs``; or an import path
            (``package.module:name``) of either.
        workflow_kwargs: For a class only.

    Raises:
        UsageError: If it is none of these, or has no coroutine method ``arun_episode``.
    """
    found: Any = _import(workflow) if isinstance(workflow, str) else workflow
    if inspect.isclass(found):
        found = found(**(workflow_kwargs or {}))
    elif workflow_kwargs:
        raise UsageError("workflow_kwargs were given with a workflow that is made already")
    if not inspect.iscoroutinefunction(getattr(found, "arun_episode", None)):
        raise UsageError(
            "a workflow has a coroutine method arun_episode(engine, data); "
            f"{type(found).__name__} has none"
        )
    return found  # type: ignore[no-any-return]


def resolve_accept(should_accept_fn: AcceptFunction | str | None) -> AcceptFunction | None:
    """Return a filter, imported if it was named.

    Raises:
        UsageError: If it can not be called.
    """
    found: Any = (
        _import(should_accept_fn) if isinstance(should_accept_fn, str) else should_accept_fn
    )
    if found is not None and not callable(found):
        raise UsageError(f"should_accept_fn can not be called: {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def resolve_policy(group_policy: GroupPolicy | None) -> GroupPolicy:
    """Return a policy; of None, that all members must succeed.

    It is asked only once a member does not succeed, and by then an error would be the run's.

    Raises:
        UsageError: If it is none.
    """
    if group_policy is None:
        return ALL_MEMBERS
    if not isinstance(group_policy, GroupPolicy):
        raise UsageError(
            "group_policy must be a GroupPolicy, such as GroupPolicy.replace(), not "
            f"{shown(group_policy)}"
        )
    return group_policy


def _import(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ValueError, ImportError, AttributeError) as exc:
        raise UsageError(f"{path!r} can not be imported: {exc}") from exc


def positive(name: str, value: int, most: int | None = None) -> int:
    """Return ``value``.

    Raises:
        UsageError: If it is not an integer of at least 1, or more than ``most``.
    """
    return integer(name, value, 1, most, error=UsageError)
