"""A language model small enough to run inside a test, and real enough to be trained.

``TinyModel`` embeds the first ``prefix`` and the last ``window`` tokens of a sequence, puts them
through one tanh layer, and reads the logits of the next token off it. It is the neural
probabilistic language model of Bengio et al. (JMLR 3, 2003) with one addition: the leading tokens
stay in view, so that the prompt still conditions token 200. Everything is float32 and on the CPU; a
step for 16 sequences takes tens of microseconds, so what a benchmark of this library measures is
not the model.

Shapes: ``B`` sequences, ``N`` predictions, ``V`` vocabulary, ``D`` embedding, ``H`` hidden,
``F = prefix + window`` tokens in view.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np

from ..types import Float32Array, Int32Array

WEIGHTS_FILE = "weights.npz"
_SHAPE_FIELDS = ("prefix", "eos_id")

# Products this small stay below the size at which OpenBLAS wakes its threads. On a machine whose
# cores are busy with servers those spin against them: 200 ms a training step in place of 17.
_BLOCK_ROWS = 128


def log_softmax(logits: Float32Array) -> Float32Array:
    """Return log-probabilities float32[..., V] of float32 ``logits``, safe for large values."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(shifted - normaliser, dtype=np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """The parameters, or a gradient of the same shapes. The arrays are never written in place.

    Args:
        embedding: float32[V + 1, D]; row V stands for "no token yet".
        hidden: float32[F · D, H].
        hidden_bias: float32[H].
        output: float32[H, V].
        output_bias: float32[V].
    """

    embedding: Float32Array
    hidden: Float32Array
    hidden_bias: Float32Array
    output: Float32Array
    output_bias: Float32Array

    def arrays(self) -> dict[str, Float32Array]:
        """Return every array by its name, in a fixed order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, slots=True, eq=False)
class TinyModel:
    """An autoregressive language model in numpy; immutable, so safe to share between tasks.

    New weights make a new model (``dataclasses.replace(model, weights=…)``), and a reader that
    holds the old one keeps a consistent set.

    Args:
        weights: The parameters.
        prefix: Leading tokens that stay in view. At least as long as the part of the prompt that
            matters.
        eos_id: The token that ends a sequence, in 0 … V − 1.

    Raises:
        ValueError: If shapes contradict each other, a value is not finite, or ``eos_id`` is not in
            the vocabulary.
    """

    weights: Weights
    prefix: int
    eos_id: int

    def __post_init__(self) -> None:
        _check(self)

    @property
    def vocab_size(self) -> int:
        """V: token ids are 0 … V − 1."""
        return len(self.weights.output_bias)

    @property
    def window(self) -> int:
        """The number of latest tokens in view."""
        fan_in, embedding_size = len(self.weights.hidden), self.weights.embedding.shape[1]
        return int(fan_in // embedding_size) - self.prefix

    @classmethod
    def random(
        cls,
        seed: int = 0,
        *,
        vocab_size: int = 64,
        window: int = 4,
        prefix: int = 4,
        embedding_size: int = 8,
        hidden_size: int = 32,
        eos_id: int = 0,
        output_scale: float = 0.5,
    ) -> Self:
        """Return an untrained model, the same one for the same arguments on every machine.

        Args:
            seed: Of the weights.
            vocab_size: V.
            window: Latest tokens in view, at least 1.
            prefix: Leading tokens in view.
            embedding_size: D.
            hidden_size: H.
            eos_id: The token that ends a sequence. At about 1/V a token, untrained answers are
                geometric in length with a median near 0.7 · V.
            output_scale: Standard deviation of the logits, roughly; 0 makes every token equally
                likely, larger values make the untrained model prefer some.
        """
        rng = np.random.default_rng(seed)
        fan_in = (prefix + window) * embedding_size

        def normal(*shape: int, scale: float) -> Float32Array:
            return (scale * rng.standard_normal(shape)).astype(np.float32)

        weights = Weights(
            embedding=normal(vocab_size + 1, embedding_size, scale=1.0),
            hidden=normal(fan_in, hidden_size, scale=fan_in**-0.5),
            hidden_bias=np.zeros(hidden_size, dtype=np.float32),
            output=normal(hidden_size, vocab_size, scale=output_scale * hidden_size**-0.5),
            output_bias=np.zeros(vocab_size, dtype=np.float32),
        )
        return cls(weights, prefix=prefix, eos_id=eos_id)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read the model that ``save`` wrote into the directory ``path``.

        Raises:
            FileNotFoundError: There is no ``weights.npz`` in ``path``.
            ValueError: The file is not a model, or not a consistent one.
        """
        file = Path(path) / WEIGHTS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"no {WEIGHTS_FILE} in {os.fspath(path)}")
        try:
            # np.load leaves a file that it opened itself open where the archive is broken.
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
                weights = Weights(**{field.name: stored[field.name] for field in fields(Weights)})
                shape = {name: int(stored[name]) for name in _SHAPE_FIELDS}
            return cls(weights, **shape)
        except (ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as exc:
            raise ValueError(f"{file} does not hold a TinyModel: {exc}") from exc

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model into the directory ``path``, which is created if need be.

        Whoever loads ``path`` meanwhile gets the old weights or the new ones, never a mixture or
        half a file: the file is written beside its place and renamed into it.

        Raises:
            OSError: ``path`` cannot be written; what was there is untouched.
        """
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{WEIGHTS_FILE}.")
        try:
            with os.fdopen(handle, "wb") as file:
                shape = {name: np.int64(getattr(self, name)) for name in _SHAPE_FIELDS}
                np.savez(file, **self.weights.arrays(), **shape)  # type: ignore[arg-type]
            Path(temporary).replace(directory / WEIGHTS_FILE)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def next_logits(self, sequences: Sequence[Sequence[int]]) -> Float32Array:
        """Return the logits float32[B, V] of the token that follows each sequence.

        The cost is O(B · F), whatever the lengths: one call is one decoding step of a batch.

        Args:
            sequences: Prompt and answer so far, ids in 0 … V − 1 (the caller has checked them).
                Lists are fastest.
        """
        rows = [self._context(sequence) for sequence in sequences]
        contexts = np.array(rows, dtype=np.int32).reshape(len(rows), self.prefix + self.window)
        return self.logits(contexts)

    def logprobs(self, input_ids: Int32Array, start: int) -> Float32Array:
        """Return log p(input_ids[t] | input_ids[:t]) for t = start … T − 1, float32[T − start].

        It agrees with ``next_logits`` of each prefix up to float32 rounding.

        Args:
            input_ids: int32[T].
            start: The first token to score, in 0 … T.
        """
        return self.score(self.contexts(input_ids, start), input_ids[start:])

    def contexts(self, input_ids: Int32Array, start: int) -> Int32Array:
        """Return what the model sees before each of ``input_ids[start:]``, int32[T − start, F].

        Args:
            input_ids: int32[T].
            start: The first token to be predicted.
        """
        ids = np.append(np.asarray(input_ids, dtype=np.int32), np.int32(self.vocab_size))
        none = len(ids) - 1
        positions = np.arange(start, none)[:, None]
        leading = np.arange(self.prefix)[None, :]
        latest = positions + np.arange(-self.window, 0)[None, :]
        in_view = np.concatenate(
            [np.where(leading < positions, leading, none), np.where(latest >= 0, latest, none)],
            axis=1,
        )
        return ids.take(in_view)

    def logits(self, contexts: Int32Array) -> Float32Array:
        """Return the logits float32[N, V] after each of ``contexts`` int32[N, F]."""
        return self._forward(contexts)[2]

    def score(self, contexts: Int32Array, tokens: Int32Array) -> Float32Array:
        """Return the log-probability float32[N] of each of ``tokens`` int32[N] in its context."""
        scored = np.empty(len(tokens), dtype=np.float32)
        for block in _blocks(len(tokens)):
            table = log_softmax(self.logits(contexts[block]))
            scored[block] = table[np.arange(len(table)), tokens[block]]
        return scored

    def gradient(
        self, contexts: Int32Array, tokens: Int32Array, coefficients: Float32Array
    ) -> Weights:
        """Return the gradient of Σ coefficients · log p(tokens | contexts) by every weight.

        With advantages as coefficients this is the policy gradient of REINFORCE (Williams, 1992).

        Args:
            contexts: int32[N, F], as ``contexts`` gives them.
            tokens: int32[N], the tokens that followed.
            coefficients: float32[N].
        """
        total = {name: np.zeros_like(array) for name, array in self.weights.arrays().items()}
        for block in _blocks(len(tokens)):
            part = self._block_gradient(contexts[block], tokens[block], coefficients[block])
            for name, array in part.arrays().items():
                total[name] += array
        return Weights(**total)

    def _block_gradient(
        self, contexts: Int32Array, tokens: Int32Array, coefficients: Float32Array
    ) -> Weights:
        weights = self.weights
        embedded, activation, logits = self._forward(contexts)
        d_logits = -np.exp(log_softmax(logits)) * coefficients[:, None]
        d_logits[np.arange(len(tokens)), tokens] += coefficients
        d_hidden = (d_logits @ weights.output.T) * (1 - activation**2)
        d_embedded = (d_hidden @ weights.hidden.T).reshape(
            *contexts.shape, weights.embedding.shape[1]
        )
        d_embedding = np.zeros_like(weights.embedding)
        np.add.at(d_embedding, contexts, d_embedded)
        return Weights(
            embedding=d_embedding,
            hidden=embedded.T @ d_hidden,
            hidden_bias=d_hidden.sum(axis=0),
            output=activation.T @ d_logits,
            output_bias=d_logits.sum(axis=0),
        )

    def _context(self, sequence: Sequence[int]) -> list[int]:
        none = self.vocab_size
        leading, latest = list(sequence[: self.prefix]), list(sequence[-self.window :])
        return leading + [none] * (self.prefix - len(leading) + self.window - len(latest)) + latest

    def _forward(self, contexts: Int32Array) -> tuple[Float32Array, Float32Array, Float32Array]:
        weights = self.weights
        embedded = weights.embedding[contexts].reshape(len(contexts), len(weights.hidden))
        activation = np.tanh(embedded @ weights.hidden + weights.hidden_bias)
        return embedded, activation, activation @ weights.output + weights.output_bias


def _blocks(rows: int) -> list[slice]:
    return [slice(start, start + _BLOCK_ROWS) for start in range(0, rows, _BLOCK_ROWS)]


def _check(model: TinyModel) -> None:
    arrays = model.weights.arrays()
    for name, array in arrays.items():
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite float32")
    ranks = tuple(array.ndim for array in arrays.values())
    if ranks != (2, 2, 1, 2, 1):
        raise ValueError(f"weights have ranks {ranks}, not (2, 2, 1, 2, 1)")
    _check_shapes(model)


def _check_shapes(model: TinyModel) -> None:
    weights, vocab = model.weights, len(model.weights.output_bias)
    fan_in, hidden_size = weights.hidden.shape
    agree = (
        weights.embedding.shape[0] == vocab + 1
        and weights.output.shape == (hidden_size, vocab)
        and len(weights.hidden_bias) == hidden_size
        and fan_in % weights.embedding.shape[1] == 0
    )
    if not agree:
        raise ValueError("the shapes of the weights contradict each other")
    if model.prefix < 0 or model.window < 1:
        raise ValueError("prefix must not be negative and window must be at least 1")
    if not 0 <= model.eos_id < vocab:
        raise ValueError(f"eos_id {model.eos_id} is not in 0 … {vocab - 1}")
