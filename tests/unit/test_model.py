"""TinyModel: its two ways of scoring agree, its gradient is the slope, its files are whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arealtrio.embedded.model import WEIGHTS_FILE, TinyModel, Weights, log_softmax


def replace_weights(model: TinyModel, arrays: dict[str, Any]) -> TinyModel:
    changed = object.__new__(TinyModel)
    for name in ("prefix", "eos_id"):
        object.__setattr__(changed, name, getattr(model, name))
    object.__setattr__(changed, "weights", Weights(**arrays))
    return changed


def double(model: TinyModel) -> TinyModel:
    """The same model in float64, for finite differences; its constructor would refuse it."""
    return replace_weights(
        model, {name: a.astype(np.float64) for name, a in model.weights.arrays().items()}
    )


def objective(model: TinyModel, ids: np.ndarray, start: int, coefficients: np.ndarray) -> float:
    table = log_softmax_64(model.logits(model.contexts(ids, start)))
    return float(coefficients @ table[np.arange(len(ids) - start), ids[start:]])


def log_softmax_64(logits: np.ndarray) -> Any:
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("prefix", "window"), [(0, 1), (1, 3), (4, 4), (7, 2)])
@pytest.mark.parametrize("start", [0, 1, 3, 29, 30])
def test_logprobs_agree_with_next_logits(prefix: int, window: int, start: int) -> None:
    model = TinyModel.random(3, vocab_size=11, prefix=prefix, window=window)
    ids = np.random.default_rng(0).integers(0, 11, size=30).astype(np.int32)
    one_by_one = [
        log_softmax(model.next_logits([ids[:t].tolist()]))[0, ids[t]] for t in range(start, 30)
    ]
    logprobs = model.logprobs(ids, start)
    assert logprobs.dtype == np.float32
    assert logprobs.shape == (30 - start,)
    np.testing.assert_allclose(logprobs, np.array(one_by_one, np.float32), atol=2e-6)


def test_a_sequence_is_scored_alike_alone_and_in_a_batch() -> None:
    model = TinyModel.random(1)
    sequences = [list(range(n)) for n in (0, 1, 3, 8, 50)]
    together = model.next_logits(sequences)
    assert together.shape == (5, model.vocab_size)
    assert together.dtype == np.float32
    alone = np.concatenate([model.next_logits([s]) for s in sequences])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_no_sequences_give_no_logits() -> None:
    assert TinyModel.random().next_logits([]).shape == (0, 64)


def test_only_the_prompt_and_the_latest_tokens_are_in_view() -> None:
    model = TinyModel.random(prefix=2, window=3)
    one, other, prompt = [5, 6, 1, 1, 7, 8, 9], [5, 6, 2, 3, 4, 7, 8, 9], [5, 4, 1, 1, 7, 8, 9]
    a, b, c = model.next_logits([one, other, prompt])
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a - c).max() > 1e-3


def test_the_gradient_is_the_slope_of_the_objective() -> None:
    """Central differences in float64 along random directions, of more rows than one block has."""
    rng = np.random.default_rng(0)
    model = TinyModel.random(2, vocab_size=9, window=2, prefix=2, embedding_size=3, hidden_size=5)
    ids = rng.integers(0, 9, size=300).astype(np.int32)
    coefficients = rng.standard_normal(297).astype(np.float32)
    gradient = model.gradient(model.contexts(ids, 3), ids[3:], coefficients).arrays()
    wide = double(model)
    for name, slope in gradient.items():
        direction = rng.standard_normal(slope.shape)
        weights = wide.weights.arrays()
        there, back = (
            replace_weights(wide, {**weights, name: weights[name] + h * direction})
            for h in (1e-5, -1e-5)
        )
        difference = objective(there, ids, 3, coefficients) - objective(back, ids, 3, coefficients)
        assert difference / 2e-5 == pytest.approx(float((slope * direction).sum()), rel=1e-3), name


def test_saved_is_loaded(tmp_path: Path) -> None:
    model = TinyModel.random(5, vocab_size=20, window=3, prefix=2, eos_id=7)
    model.save(tmp_path / "new" / "v1")
    loaded = TinyModel.load(tmp_path / "new" / "v1")
    assert (loaded.vocab_size, loaded.window, loaded.prefix, loaded.eos_id) == (20, 3, 2, 7)
    for name, array in model.weights.arrays().items():
        np.testing.assert_array_equal(loaded.weights.arrays()[name], array)


def test_the_same_seed_gives_the_same_model() -> None:
    ids = np.arange(10, dtype=np.int32)
    np.testing.assert_array_equal(
        TinyModel.random(4).logprobs(ids, 1), TinyModel.random(4).logprobs(ids, 1)
    )
    assert not np.allclose(
        TinyModel.random(4).logprobs(ids, 1), TinyModel.random(5).logprobs(ids, 1)
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights\.npz in .*nowhere"):
        TinyModel.load(tmp_path / "nowhere")


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def not_an_archive(file: Path) -> None:
    file.write_text("these are no weights")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def without_an_array(file: Path) -> None:
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "output"}
    np.savez(file, **arrays)


def with_other_values(file: Path, **changes: object) -> None:
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(file, **{**arrays, **changes})


def with_a_nan(file: Path) -> None:
    with_other_values(file, hidden_bias=np.full(32, np.nan, np.float32))


def with_other_shapes(file: Path) -> None:
    with_other_values(file, output_bias=np.zeros(5, np.float32))


def with_other_ranks(file: Path) -> None:
    with_other_values(file, hidden=np.zeros(5, np.float32))


def with_an_eos_out_of_the_vocabulary(file: Path) -> None:
    with_other_values(file, eos_id=np.int64(64))


def with_a_pickle(file: Path) -> None:
    with_other_values(file, output_bias=np.array([object()]))


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        not_an_archive,
        empty,
        without_an_array,
        with_a_nan,
        with_other_shapes,
        with_other_ranks,
        with_an_eos_out_of_the_vocabulary,
        with_a_pickle,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, spoil) -> None:  # type: ignore[no-untyped-def]
    TinyModel.random().save(tmp_path)
    spoil(tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"weights\.npz does not hold a TinyModel: "):
        TinyModel.load(tmp_path)


def test_a_save_that_fails_leaves_the_old_weights_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = TinyModel.random(1)
    old.save(tmp_path)

    def full_disk(file, **arrays: object) -> None:  # type: ignore[no-untyped-def]
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space left"):
        TinyModel.random(2).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]
    np.testing.assert_array_equal(TinyModel.load(tmp_path).weights.embedding, old.weights.embedding)


def test_a_contradictory_model_is_refused() -> None:
    model = TinyModel.random()
    with pytest.raises(ValueError, match="prefix must not be negative"):
        replace(model, prefix=-1)
    with pytest.raises(ValueError, match="window must be at least 1"):
        replace(model, prefix=8)
    wide = replace(model.weights, output=model.weights.output.astype(np.float64))
    with pytest.raises(ValueError, match="output must be finite float32"):
        replace(model, weights=wide)
