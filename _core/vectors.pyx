# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What is asked of every vector of tokens, in one look.

NumPy needs two or three calls for each of these questions, and a temporary array between them: of
vectors as short as most answers are, that costs ten times what looking does, and every rollout
asks each question at least once.

The buffer protocol is the whole interface to arrays, so this island needs no numpy to compile.
"""

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS,
    PyBUF_FORMAT,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.list cimport PyList_GET_ITEM, PyList_GET_SIZE
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from libc.stdint cimport INT32_MAX, INT32_MIN, int32_t
from libc.string cimport memcpy, memset

import numpy as np

cdef object ndarray = np.ndarray
cdef object empty = np.empty
cdef object INT32 = np.dtype(np.int32)
cdef object FLOAT32 = np.dtype(np.float32)

cdef int READ = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT
cdef Py_ssize_t WORD = 4  # bytes of an int32 and of a float32


cdef bint holds(Py_buffer* view, char kind) noexcept:
    """Whether it is a vector of ``i`` (int32) or ``f`` (float32)."""
    cdef const char* form = view.format
    if view.ndim != 1 or view.itemsize != WORD or form is NULL or form[0] == 0 or form[1] != 0:
        return False
    return form[0] == kind or (form[0] == c"l" and kind == c"i")


cdef bint open_vector(object value, char kind, Py_buffer* view) except -1:
    """Whether it is a C-contiguous vector of that kind: then its buffer has to be released."""
    try:
        PyObject_GetBuffer(value, view, READ)
    except (TypeError, ValueError, BufferError):
        return False
    if holds(view, kind):
        return True
    PyBuffer_Release(view)
    return False


cdef Py_ssize_t refuse(str wanted) except -1:
    raise TypeError(f"expected a C-contiguous vector of {wanted}")


cdef bint none_is_negative(const int32_t* at, Py_ssize_t size) noexcept nogil:
    cdef int32_t signs = 0
    cdef Py_ssize_t i
    for i in range(size):
        signs |= at[i]
    return signs >= 0


cdef object ids_of_list(list values):
    """Of Python's own integers and no subclass, a truth value among them; None of all else."""
    cdef Py_ssize_t i, size = PyList_GET_SIZE(values)
    cdef object result = empty(size, INT32)
    cdef int overflow = 0
    cdef long long number
    cdef int32_t* at
    cdef Py_buffer view
    PyObject_GetBuffer(result, &view, PyBUF_WRITABLE)
    try:
        at = <int32_t*> view.buf
        for i in range(size):
            if not PyLong_CheckExact(<object> PyList_GET_ITEM(values, i)):
                return None
            number = PyLong_AsLongLongAndOverflow(<object> PyList_GET_ITEM(values, i), &overflow)
            if overflow or not 0 <= number <= INT32_MAX:
                return None
            at[i] = <int32_t> number
    finally:
        PyBuffer_Release(&view)
    return result


def token_ids(value):
    """Return token ids that are written as they nearly always are.

    Args:
        value: Anything.

    Returns:
        The same array, if it is a C-contiguous NumPy vector of int32, none negative; a fresh one of
        a list of Python integers from 0 to 2**31 - 1; None of everything else, which may be ids
        too, or not.
    """
    cdef Py_buffer view
    cdef bint usual
    if type(value) is list:
        return ids_of_list(value)
    if type(value) is not ndarray or not open_vector(value, c"i", &view):
        return None
    usual = none_is_negative(<const int32_t*> view.buf, view.len // WORD)
    PyBuffer_Release(&view)
    return value if usual else None


def are_alike(tuple vectors not None, bytes kinds not None):
    """Say whether arrays are what the columns of one row have to be.

    Args:
        vectors: Anything, one for each of ``kinds``.
        kinds: ``b"i"`` for int32, ``b"f"`` for float32.

    Returns:
        Whether each is a C-contiguous NumPy vector of its kind, and all are of one length, not 0.

    Raises:
        ValueError: If there are more of one than of the other.
    """
    cdef const char* kind = PyBytes_AS_STRING(kinds)
    cdef Py_ssize_t i, size = 0
    cdef Py_buffer view
    if len(vectors) != len(kinds):
        raise ValueError(f"{len(vectors)} vectors need as many kinds, not {len(kinds)}")
    for i in range(len(vectors)):
        if type(vectors[i]) is not ndarray or not open_vector(vectors[i], kind[i], &view):
            return False
        PyBuffer_Release(&view)
        if i == 0:
            size = view.len
        if size == 0 or view.len != size:
            return False
    return True


def largest(values):
    """Return the largest value.

    Args:
        values: int32, a C-contiguous vector.

    Raises:
        TypeError: If it is none.
        ValueError: If it is empty.
    """
    cdef Py_buffer view
    cdef int32_t found = INT32_MIN
    cdef Py_ssize_t i, size
    cdef const int32_t* at
    if not open_vector(values, c"i", &view):
        refuse("int32")
    at = <const int32_t*> view.buf
    size = view.len // WORD
    for i in range(size):
        found = max(found, at[i])
    PyBuffer_Release(&view)
    if size == 0:
        raise ValueError("an empty vector has no largest value")
    return found


def has_nan(values):
    """Say whether a value is no number.

    Args:
        values: float32, a C-contiguous vector.

    Raises:
        TypeError: If it is none.
    """
    cdef Py_buffer view
    cdef bint found = False
    cdef Py_ssize_t i
    cdef const float* at
    if not open_vector(values, c"f", &view):
        refuse("float32")
    at = <const float*> view.buf
    for i in range(view.len // WORD):
        found |= at[i] != at[i]
    PyBuffer_Release(&view)
    return found


def ascends(values, int32_t least):
    """Say whether no value is less than the one before it, nor the first less than ``least``.

    Args:
        values: int32, a C-contiguous vector; an empty one ascends.
        least: An int32.

    Raises:
        TypeError: If it is none.
        OverflowError: If ``least`` is beyond int32.
    """
    cdef Py_buffer view
    cdef bint falls = False
    cdef Py_ssize_t i
    cdef const int32_t* at
    if not open_vector(values, c"i", &view):
        refuse("int32")
    at = <const int32_t*> view.buf
    for i in range(view.len // WORD):
        falls |= at[i] < least
        least = at[i]
    PyBuffer_Release(&view)
    return not falls


cdef object fresh(Py_ssize_t size, object dtype, void** at):
    """An array, and where its memory begins, for as long as it is held."""
    cdef object array = empty(size, dtype)
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_WRITABLE)
    at[0] = view.buf
    PyBuffer_Release(&view)
    return array


cdef Py_ssize_t copy_of(object value, char kind, void* to, Py_ssize_t room) except -2:
    """How many values of a usual vector were copied; -1 of anything else, or beyond the room."""
    cdef Py_buffer view
    cdef Py_ssize_t size
    if type(value) is not ndarray or not open_vector(value, kind, &view):
        return -1
    size = view.len // WORD
    if size <= room:
        memcpy(to, view.buf, view.len)
    PyBuffer_Release(&view)
    return size if size <= room else -1


def columns(list parts not None):
    """Lay the parts of a row end to end.

    Args:
        parts: Of each its token ids, and the logprobs and versions of a model that made them: two
            vectors of as many, or None and None where no model did.

    Returns:
        Four fresh vectors of one length: ids, 1 for each token that a model made and 0 for others,
        logprobs (0 of others) and versions (-1 of others). None unless every vector is a C-contiguous
        NumPy vector, of float32 the logprobs and of int32 the rest.
    """
    cdef Py_ssize_t size = 0, at = 0, count, i
    cdef int32_t* ids
    cdef int32_t* mask
    cdef float* logprobs
    cdef int32_t* versions
    cdef bint made
    for tokens, _, _ in parts:
        size += len(tokens)
    result = (
        fresh(size, INT32, <void**> &ids),
        fresh(size, INT32, <void**> &mask),
        fresh(size, FLOAT32, <void**> &logprobs),
        fresh(size, INT32, <void**> &versions),
    )
    for tokens, told, by in parts:
        count = copy_of(tokens, c"i", &ids[at], size - at)
        if count < 0:
            return None
        made = told is not None
        for i in range(at, at + count):
            mask[i] = made
        if made:
            if copy_of(told, c"f", &logprobs[at], count) != count:
                return None
            if copy_of(by, c"i", &versions[at], count) != count:
                return None
        else:
            memset(&logprobs[at], 0, count * WORD)
            memset(&versions[at], 0xFF, count * WORD)  # -1
        at += count
    return result if at == size else None
