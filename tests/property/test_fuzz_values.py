"""Every public record: any value of any field is taken, as the type documented, or one error."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arealtrio import (
    ArealTrioError,
    ConfigError,
    GenerationHyperparameters,
    GroupPolicy,
    InvalidRequest,
    ModelRequest,
    RolloutConfig,
    TensorSpec,
    Trajectory,
    UsageError,
    WeightsGroup,
    WeightUpdate,
    WorkflowError,
)
from arealtrio.demo.run import DemoOptions
from arealtrio.embedded.settings import ServerSettings
from arealtrio.testing import (
    FixedLengths,
    LogNormalLengths,
    RecordedLengths,
    SimulatedServerSettings,
)
from arealtrio.transport import HttpTransport
from arealtrio.wire.vllm import VllmDialect

from .fuzzing import SECRET, anything, check_message

MANY = 4 * settings().max_examples
GROUP = WeightsGroup(master_address="a", master_port=1, members=("http://a",))


@dataclasses.dataclass(frozen=True)
class Record:
    """A public record, or what makes one.

    Args:
        make: Takes the fields by name.
        fields: That are given anything.
        right: The values of the fields that have no default.
        errors: What it may raise.
    """

    make: Callable[..., Any]
    fields: tuple[str, ...]
    right: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    errors: tuple[type[ArealTrioError], ...] = (ConfigError,)


def record(kind: Any, right: Mapping[str, Any] | None = None, *errors: Any) -> Record:
    names = tuple(field.name for field in dataclasses.fields(kind))
    return Record(kind, names, right or {}, errors or (ConfigError,))


ROW = {
    "input_ids": [1, 2], "loss_mask": [0, 1], "logprobs": [0, -1], "versions": [-1, 0], "reward": 1,
}  # fmt: skip
RECORDS: dict[str, Record] = {
    "RolloutConfig": record(RolloutConfig),
    "GenerationHyperparameters": record(GenerationHyperparameters),
    "ModelRequest": record(ModelRequest, {"input_ids": [1]}, InvalidRequest),
    "WeightUpdate": record(WeightUpdate, {"kind": "label", "version": 1}, UsageError),
    "WeightUpdate.from_disk": Record(
        WeightUpdate.from_disk, ("path", "version", "pause", "rolling"),
        {"path": "a", "version": 1}, (UsageError,),
    ),
    "WeightUpdate.lora": Record(
        WeightUpdate.lora, ("name", "path", "version"), {"name": "n", "path": "a", "version": 1},
        (UsageError,),
    ),
    "WeightUpdate.distributed": Record(
        WeightUpdate.distributed,
        ("version", "group", "tensors", "send", "chunk_size_bytes", "pause"),
        {"version": 1, "group": GROUP, "tensors": [TensorSpec("a", "int8", (1,))], "send": print},
        (UsageError,),
    ),
    "TensorSpec": Record(
        lambda **fields: WeightUpdate.distributed(
            1, group=GROUP, tensors=[TensorSpec(**fields)], send=print
        ),
        ("name", "dtype", "shape"), {"name": "a", "dtype": "int8", "shape": (1,)}, (UsageError,),
    ),
    "WeightsGroup": record(WeightsGroup, {"master_address": "a", "master_port": 1}, UsageError),
    "GroupPolicy": record(GroupPolicy),
    "GroupPolicy.all": Record(GroupPolicy.all, ("max_retries",)),
    "GroupPolicy.at_least": Record(GroupPolicy.at_least, ("least",), {"least": 1}),
    "GroupPolicy.replace": Record(GroupPolicy.replace, ("max_replacements",)),
    "Trajectory": record(Trajectory, ROW, WorkflowError),
    "ServerSettings": record(ServerSettings, {"weights": Path("w")}),
    "SimulatedServerSettings": record(SimulatedServerSettings),
    "FixedLengths": Record(FixedLengths, ("tokens",), {"tokens": 1}),
    "LogNormalLengths": Record(
        LogNormalLengths, ("median", "sigma", "longest"), {"median": 1, "sigma": 1, "longest": 9}
    ),
    "LogNormalLengths.with_tail": Record(
        LogNormalLengths.with_tail, ("median", "p99", "longest"),
        {"median": 1, "p99": 5, "longest": 9},
    ),
    "RecordedLengths": Record(RecordedLengths, ("tokens",), {"tokens": [1]}),
    "DemoOptions": record(DemoOptions),
    "HttpTransport": Record(HttpTransport, ("keep_alive_s", "idle_per_origin")),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_right_is_taken(name: str) -> None:
    assert RECORDS[name].make(**RECORDS[name].right) is not None


@pytest.mark.parametrize("name", RECORDS)
@settings(max_examples=MANY)
@given(data=st.data())
def test_any_value_of_any_field_is_taken_or_one_error_that_names_it(
    name: str, data: st.DataObject
) -> None:
    kind = RECORDS[name]
    field = data.draw(st.sampled_from(kind.fields))
    try:
        made = kind.make(**{**kind.right, field: data.draw(anything)})
    except kind.errors as exc:
        check_message(exc, *words_for(field))
        return
    if dataclasses.is_dataclass(made):
        check_types(made)


def words_for(field: str) -> tuple[str, ...]:
    """What an error may call a field by: its name, or what it is about."""
    more = {
        "servers": ("server",), "version": ("version",), "headers": ("header",),
        "server_headers": ("header", "server"), "max_requests_per_server": ("server",),
        "tokens": ("length", "answer"), "median": ("percentile", "lengths"), "p99": ("percentile",),
        "group": ("group",), "tensors": ("tensors",), "path": ("path",), "dtype": ("type", "size"),
        "shape": ("size", "shape"), "name": ("name",), "extras": ("extra",),
    }  # fmt: skip
    return (field, *more.get(field, ()))


def check_types(made: Any) -> None:
    """Every plain field of a record has the type that it is annotated with."""
    hints = typing.get_type_hints(type(made))
    for field in dataclasses.fields(made):
        value, hint = getattr(made, field.name), hints[field.name]
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if is_union else (hint,)
        if set(options) <= {int, float, bool, str, type(None)} and options:
            allowed = {*options, *((int,) if float in options else ())}
            assert type(value) in allowed, field.name
        if isinstance(value, float):
            assert math.isfinite(value), field.name


@given(value=anything)
def test_no_config_repeats_a_header(value: Any) -> None:
    for headers in ({SECRET: value}, {"authorization": value}, {"authorization": [SECRET, value]}):
        for given_as in ({"headers": headers}, {"server_headers": {"http://a": headers}}):
            try:
                config = RolloutConfig(servers=["http://a"], **given_as)
            except ConfigError as exc:
                check_message(exc)
            else:
                assert SECRET not in repr(config)
                assert all(
                    isinstance(part, str) for pair in config.headers_of("http://a") for part in pair
                )


@pytest.mark.parametrize(
    "address", [f"http://me:{SECRET}@a:x", f"ftp://me:{SECRET}@a", f"http://[?k={SECRET}"]
)
def test_no_error_repeats_a_password_in_an_address(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RolloutConfig(servers=[address])
    check_message(caught.value)
    assert caught.value.__cause__ is None


@given(changes=st.dictionaries(
    st.sampled_from([field.name for field in dataclasses.fields(GenerationHyperparameters)]),
    anything, max_size=3,
))  # fmt: skip
def test_what_is_taken_can_be_sent(changes: dict[str, Any]) -> None:
    """No parameters are refused by a codec that were taken at their construction."""
    try:
        gconfig = GenerationHyperparameters(**changes)
    except ConfigError:
        return
    msgspec.json.encode(dataclasses.asdict(gconfig))


@given(path=anything, version=anything)
def test_a_weight_update_that_is_taken_can_be_sent(path: Any, version: Any) -> None:
    try:
        update = WeightUpdate.from_disk(path, version)
    except UsageError as exc:
        check_message(exc)
        return
    assert VllmDialect().load_weights(update.path, update.version)


def test_numbers_of_numpy_are_taken_for_pythons() -> None:
    gconfig = GenerationHyperparameters(
        max_new_tokens=np.int64(5),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        stop_token_ids=np.array([1, 2]),  # type: ignore[arg-type]
    )
    assert (type(gconfig.max_new_tokens), type(gconfig.temperature)) == (int, float)
    assert gconfig.stop_token_ids == (1, 2)
    config = RolloutConfig(max_staleness=np.int32(3), abort_timeout_s=np.float64(1))  # type: ignore[arg-type]
    assert (type(config.max_staleness), type(config.abort_timeout_s)) == (int, float)
