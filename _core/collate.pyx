"""Ragged rows to one rectangle [B, T], or end to end with their offsets; the span of their versions.

``pad`` and ``pack`` take all columns of a batch at once, look at everything, and only then write:
where they raise, no output has changed. The copy is one pass per column in C, without the GIL: a
row is one ``memcpy``, its padding one fill. Nothing is allocated for the data, because the first
touch of fresh pages costs more than the copy: outputs are the caller's, to be used again for the
next batch.

The buffer protocol is the whole interface to arrays, so this island needs no numpy to compile.
"""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS,
    PyBUF_FORMAT,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cpython.number cimport PyNumber_Index
from libc.stdint cimport INT32_MAX, UINT32_MAX, int32_t, uint32_t
from libc.string cimport memcpy, memset

cdef enum:
    WORD = 4  # bytes of an int32 and of a float32: all that rows may hold

cdef int READ = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT
cdef int WRITE = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE


cdef class _Views:
    """Buffers, held until this object goes: what the copy reads and writes through."""

    cdef Py_buffer* at
    cdef Py_ssize_t held

    def __cinit__(self, Py_ssize_t room):
        self.held = 0
        self.at = <Py_buffer*> PyMem_Calloc(max(room, 1), sizeof(Py_buffer))
        if self.at is NULL:
            raise MemoryError()

    def __dealloc__(self):
        cdef Py_ssize_t i
        if self.at is not NULL:
            for i in range(self.held):
                PyBuffer_Release(&self.at[i])
            PyMem_Free(self.at)

    cdef Py_buffer* take(self, object array, int flags) except NULL:
        cdef Py_buffer* view = &self.at[self.held]
        PyObject_GetBuffer(array, view, flags)
        self.held += 1
        return view


cdef char _kind(Py_buffer* view) noexcept:
    """``i`` (int32), ``f`` (float32), ``?`` (bool), or 0 for what no column may be."""
    cdef const char* form = view.format
    if form is NULL or form[0] == 0 or form[1] != 0:
        return 0
    if (form[0] == b"i" or form[0] == b"l") and view.itemsize == WORD:
        return b"i"
    if form[0] == b"f" and view.itemsize == WORD:
        return b"f"
    return b"?" if form[0] == b"?" and view.itemsize == 1 else 0


cdef bint _overlap(Py_buffer* a, Py_buffer* b) noexcept:
    cdef char* a_start = <char*> a.buf
    cdef char* b_start = <char*> b.buf
    return a.len > 0 and b.len > 0 and a_start < b_start + b.len and b_start < a_start + a.len


cdef Py_buffer* _take_output(_Views outs, object array, str name, str kinds, int ndim) except NULL:
    cdef Py_buffer* view
    cdef Py_ssize_t other
    try:
        view = outs.take(array, WRITE)
    except (TypeError, ValueError, BufferError) as exc:
        raise TypeError(f"{name} is not a writable C-contiguous array: {exc}") from exc
    if chr(_kind(view)) not in kinds:
        names = {"if": "int32 or float32", "i": "int32", "?": "bool"}[kinds]
        raise TypeError(f"{name} must be {names}")
    if view.ndim != ndim:
        raise ValueError(f"{name} must be {ndim}-dimensional, not {view.ndim}-dimensional")
    for other in range(outs.held - 1):
        if _overlap(&outs.at[other], view):
            raise ValueError(f"{name} shares memory with another output")
    return view


cdef int _take_row(_Views rows, object array, _Views outs, Py_ssize_t c, Py_ssize_t b) except -1:
    cdef Py_buffer* view
    cdef Py_ssize_t o
    try:
        view = rows.take(array, READ)
    except (TypeError, ValueError, BufferError) as exc:
        raise TypeError(f"row {b} of column {c} is not a C-contiguous array: {exc}") from exc
    if view.ndim != 1:
        raise ValueError(f"row {b} of column {c} is {view.ndim}-dimensional, not a vector")
    if _kind(view) != _kind(&outs.at[c]):
        raise TypeError(f"row {b} of column {c} has another dtype than the column's output")
    for o in range(outs.held):
        if _overlap(view, &outs.at[o]):
            raise ValueError(f"row {b} of column {c} shares memory with an output")
    return 0


cdef _Views _take_rows(tuple columns, _Views outs):
    """All rows, column after column; the rows of one index are equally long in every column."""
    cdef Py_ssize_t height = len(columns[0])
    cdef _Views rows = _Views(height * len(columns))
    cdef Py_ssize_t c, b
    for c in range(len(columns)):
        column = columns[c]
        if len(column) != height:
            raise ValueError(f"column {c} has {len(column)} rows, column 0 has {height}")
        for b in range(height):
            _take_row(rows, column[b], outs, c, b)
            if rows.at[c * height + b].len != rows.at[b].len:
                raise ValueError(
                    f"row {b} has {rows.at[c * height + b].len // WORD} tokens in column {c}, "
                    f"but {rows.at[b].len // WORD} in column 0"
                )
    return rows


cdef tuple _as_columns(object columns, object outs):
    cdef tuple frozen = tuple([tuple(column) for column in columns])
    if not frozen:
        raise ValueError("there must be at least one column")
    if len(frozen) != len(outs):
        raise ValueError(f"{len(frozen)} columns need as many outputs, not {len(outs)}")
    return frozen


cdef int32_t _word(object fill, char kind) except? -1:
    """The four bytes that the padding of a column repeats."""
    cdef float number
    cdef int32_t word
    if kind == b"i":
        return PyNumber_Index(fill)  # a plain conversion would cut off a fraction in silence
    number = fill
    memcpy(&word, &number, WORD)
    return word


cdef void _fill(int32_t* out, Py_ssize_t count, int32_t word) noexcept nogil:
    cdef Py_ssize_t i
    if word == 0 or word == -1:  # all bytes alike, as nearly always: the C library's own loop
        memset(out, word & 0xFF, count * WORD)
    else:
        for i in range(count):
            out[i] = word


cdef void _pad(Py_buffer* rows, Py_ssize_t height, Py_buffer* out, int32_t word) noexcept nogil:
    cdef char* at = <char*> out.buf
    cdef Py_ssize_t width = out.shape[1] * WORD
    cdef Py_ssize_t b
    for b in range(height):
        memcpy(at, rows[b].buf, rows[b].len)
        _fill(<int32_t*> (at + rows[b].len), (width - rows[b].len) // WORD, word)
        at += width


cdef void _mask(Py_buffer* rows, Py_ssize_t height, Py_buffer* out) noexcept nogil:
    cdef char* at = <char*> out.buf
    cdef Py_ssize_t width = out.shape[1]
    cdef Py_ssize_t b, length
    for b in range(height):
        length = rows[b].len // WORD
        memset(at, 1, length)
        memset(at + length, 0, width - length)
        at += width


cdef int _check_rectangle(Py_buffer* out, str name, Py_ssize_t height, Py_ssize_t width) except -1:
    if out.shape[0] != height or out.shape[1] < width:
        raise ValueError(
            f"{name} has shape [{out.shape[0]}, {out.shape[1]}], "
            f"but there are {height} rows of up to {width} tokens"
        )
    return 0


def pad(columns, fills, outs, mask=None):
    """Write every row into its line of a rectangle, and the fill value after it.

    Args:
        columns: C sequences of B vectors each, int32 or float32, C-contiguous. The b-th rows of all
            columns are equally long.
        fills: C values, one a column: an int within int32 for an int32 column, else a float.
        outs: C arrays [B, T] of their column's dtype, T at least the longest row. They share no
            memory with a row or with each other.
        mask: bool[B, T] to be written too, True on rows and False on padding; None for none.

    Raises:
        TypeError: For a wrong dtype or fill value, or a row or output that is not C-contiguous.
        ValueError: For a wrong shape, unequal lengths, or shared memory.
        OverflowError: For an int32 column's fill value outside int32.
            No output has changed where any of them is raised.
    """
    cdef tuple cells = _as_columns(columns, outs)
    cdef Py_ssize_t height = len(cells[0]), n_columns = len(cells), widest = 0, c, b
    cdef _Views targets = _Views(n_columns + 1)
    cdef bytearray words = bytearray(n_columns * WORD)  # the fill value of each column
    cdef int32_t* word = <int32_t*> PyByteArray_AS_STRING(words)
    cdef _Views rows
    cdef bint masked = mask is not None
    if len(fills) != n_columns:
        raise ValueError(f"{n_columns} columns need as many fill values, not {len(fills)}")
    for c in range(n_columns):
        _take_output(targets, outs[c], f"output {c}", "if", 2)
        word[c] = _word(fills[c], _kind(&targets.at[c]))
    if masked:
        _take_output(targets, mask, "mask", "?", 2)
    rows = _take_rows(cells, targets)
    for b in range(height):
        widest = max(widest, rows.at[b].len // WORD)
    for c in range(targets.held):
        _check_rectangle(&targets.at[c], f"output {c}" if c < n_columns else "mask", height, widest)
    with nogil:
        for c in range(n_columns):
            _pad(&rows.at[c * height], height, &targets.at[c], word[c])
        if masked:
            _mask(rows.at, height, &targets.at[n_columns])


cdef void _pack(Py_buffer* rows, Py_ssize_t height, Py_buffer* out) noexcept nogil:
    cdef char* at = <char*> out.buf
    cdef Py_ssize_t b
    for b in range(height):
        memcpy(at, rows[b].buf, rows[b].len)
        at += rows[b].len


cdef void _offsets(Py_buffer* rows, Py_ssize_t height, int32_t* out) noexcept nogil:
    cdef Py_ssize_t b
    out[0] = 0
    for b in range(height):
        out[b + 1] = out[b] + <int32_t> (rows[b].len // WORD)


def pack(columns, outs, cu_seqlens):
    """Write the rows of every column end to end, and where each begins.

    Args:
        columns: C sequences of B vectors each, as ``pad`` takes them.
        outs: C arrays (total,) of their column's dtype, total being the sum of the rows' lengths.
        cu_seqlens: int32[B + 1] to be written: row b is ``out[cu_seqlens[b]:cu_seqlens[b + 1]]``
            (the name and layout of FlashAttention's variable-length kernels).

    Raises:
        TypeError: For a wrong dtype, or a row or output that is not C-contiguous.
        ValueError: For a wrong shape, unequal lengths, shared memory, or a total above int32.
            No output has changed where any of them is raised.
    """
    cdef tuple cells = _as_columns(columns, outs)
    cdef Py_ssize_t height = len(cells[0]), n_columns = len(cells), total = 0, c, b
    cdef _Views targets = _Views(n_columns + 1)
    cdef _Views rows
    for c in range(n_columns):
        _take_output(targets, outs[c], f"output {c}", "if", 1)
    _take_output(targets, cu_seqlens, "cu_seqlens", "i", 1)
    rows = _take_rows(cells, targets)
    for b in range(height):
        total += rows.at[b].len // WORD
    if total > INT32_MAX:
        raise ValueError(f"{total} tokens do not fit cu_seqlens, which is int32")
    for c in range(n_columns):
        if targets.at[c].shape[0] != total:
            raise ValueError(f"output {c} holds {targets.at[c].shape[0]} tokens, the rows {total}")
    if targets.at[n_columns].shape[0] != height + 1:
        raise ValueError(f"cu_seqlens must have {height + 1} entries for {height} rows")
    with nogil:
        for c in range(n_columns):
            _pack(&rows.at[c * height], height, &targets.at[c])
        _offsets(rows.at, height, <int32_t*> targets.at[n_columns].buf)


cdef void _widen(Py_buffer* view, uint32_t* least, int32_t* most) noexcept nogil:
    """Widen a span by a vector. Without a sign, what is negative is the largest, never the least."""
    cdef const int32_t* at = <const int32_t*> view.buf
    cdef uint32_t low = least[0]
    cdef int32_t high = most[0]
    cdef Py_ssize_t i
    for i in range(view.len // WORD):
        low = min(low, <uint32_t> at[i])
        high = max(high, at[i])
    least[0] = low
    most[0] = high


def span(rows):
    """Return the smallest and the largest value from 0 on of some vectors.

    Args:
        rows: int32 vectors, C-contiguous: versions, of which -1 is no model's.

    Returns:
        The two; None where no value is 0 or more.

    Raises:
        TypeError: If one of them is no C-contiguous int32 vector.
    """
    cdef uint32_t least = UINT32_MAX
    cdef int32_t most = -1
    cdef Py_buffer view
    for row in rows:
        try:
            PyObject_GetBuffer(row, &view, READ)
        except (TypeError, ValueError, BufferError) as exc:
            raise TypeError(f"a row is not a C-contiguous array: {exc}") from exc
        try:
            if view.ndim != 1 or _kind(&view) != b"i":
                raise TypeError("a row is not a vector of int32")
            _widen(&view, &least, &most)
        finally:
            PyBuffer_Release(&view)
    return None if most < 0 else (least, most)
