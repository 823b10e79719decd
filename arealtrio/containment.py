"""What of all that user code can raise ends the run. The rest is one rollout's failure."""

from __future__ import annotations

import inspect
from math import inf

import trio

from .asyncio_workflow import AsyncioWorkflow, explain_asyncio
from .errors import WorkflowError

interruptible = trio.lowlevel.disable_ki_protection
"""Decorator of a function that calls user code: Ctrl-C may interrupt it, as it may not us."""


def what_ends_the_run(error: BaseException) -> BaseException | None:
    """Return the part of an error that ends the run; None where it costs one group alone.

    ``KeyboardInterrupt`` ends it, and so does its cancellation from outside. ``SystemExit`` does
    not: a grader that calls ``exit`` must not end a run of weeks, and neither must what a library
    raises past ``except Exception`` on purpose, such as ``asyncio.CancelledError``. Whoever means
    to end the run raises in the trainer.

    Args:
        error: As user code raised it. What else a group of errors holds is dropped: the group of
            rollouts that raised it is cancelled with the run.
    """
    ends: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
    if is_cancelled_from_outside():
        ends = (KeyboardInterrupt, trio.Cancelled)
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(ends)
    return error if isinstance(error, ends) else None


def is_cancelled_from_outside() -> bool:
    """Whether the task that asks is cancelled by a scope that is still around it: by the run's."""
    return trio.current_effective_deadline() == -inf


def contained(error: BaseException, code: object) -> Exception:
    """Return the error to record for one that does not end the run.

    Args:
        error: As raised.
        code: What raised it: a workflow, or a filter.
    """
    if isinstance(error, Exception):
        return explain_asyncio(error, code) if _is_workflow(code) else error
    inner = _innermost(error)
    explained = WorkflowError(
        f"{_name_of(code)} raised {_name_of(inner)}, which is no Exception: it costs this rollout "
        "and ends nothing else"
    )
    explained.__cause__ = inner
    return explained


def _is_workflow(code: object) -> bool:
    try:
        return hasattr(code, "arun_episode")
    except Exception:  # noqa: BLE001 - a filter's own ``__getattr__`` may raise anything
        return False


def _name_of(code: object) -> str:
    kind = type(code.workflow if isinstance(code, AsyncioWorkflow) else code)
    named = inspect.isroutine(code) or inspect.isclass(code)
    name = code.__qualname__ if named else kind.__qualname__  # type: ignore[attr-defined]
    return f"asyncio.{name}" if kind.__module__.startswith("asyncio.") else name


def _innermost(error: BaseException) -> BaseException:
    """The one error in nurseries' groups of one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
