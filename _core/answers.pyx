"""The tokens of an answer with their logprobs, in the JSON that inference servers write.

A server with simulated answers spends a quarter of its time on these lists if a Python object is
made of each token. Here it is one pass over the lists that a sequence consists of. The text of a
float stays the caller's affair: it is asked for once where neighbours share the very object, as
the tokens of scripted weights do.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.long cimport PyLong_AsLongLong
from libc.string cimport memcpy

cdef extern from *:
    """
    #include <charconv>
    #include <cstring>

    static inline char* arealtrio_put_text(char* at, const char* text) {
        const std::size_t size = std::strlen(text);  // of a literal: known to the compiler
        std::memcpy(at, text, size);
        return at + size;
    }

    static inline char* arealtrio_put_integer(char* at, char* end, long long value) {
        return std::to_chars(at, end, value).ptr;
    }
    """
    char* put_text "arealtrio_put_text"(char* at, const char* text) nogil
    char* put_integer "arealtrio_put_integer"(char* at, char* end, long long value) nogil

cdef enum:
    INTEGER_SIZE_MAX = 20  # of 64 bits with a sign
    FLOAT_SIZE_MAX = 32  # the longest of float64 has 24
    PAIR_SIZE_MAX = INTEGER_SIZE_MAX + FLOAT_SIZE_MAX + 16
    RECORD_SIZE_MAX = 2 * (2 * INTEGER_SIZE_MAX + FLOAT_SIZE_MAX) + 96


cdef inline char* put_bytes(char* at, bytes text) noexcept:
    memcpy(at, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    return at + PyBytes_GET_SIZE(text)


cdef inline char* put_id(char* at, object number) except NULL:
    return put_integer(at, at + INTEGER_SIZE_MAX, PyLong_AsLongLong(number))


cdef bytes float_text(object text_of, object value):
    cdef bytes text = text_of(value)
    if text is None:  # which Cython takes for bytes, too
        raise TypeError("the text of a logprob must be bytes, not None")
    if PyBytes_GET_SIZE(text) > FLOAT_SIZE_MAX:
        raise ValueError(f"the text of a logprob has more than {FLOAT_SIZE_MAX} bytes")
    return text


def write_records(
    list token_ids not None, list logprobs not None, list ranks not None, object text_of
):
    """Write each token as vLLM's generate route does where it has no other candidates."""
    cdef Py_ssize_t index, size = len(token_ids)
    if len(logprobs) != size or len(ranks) != size:
        raise ValueError("there must be one logprob and one rank for each token")
    cdef bytes result = PyBytes_FromStringAndSize(NULL, 2 + size * RECORD_SIZE_MAX)
    cdef char* begin = PyBytes_AS_STRING(result)
    cdef char* at = begin
    cdef char* chosen
    cdef Py_ssize_t chosen_size
    cdef object logprob = None
    cdef bytes text = b"null"
    for index in range(size):
        if logprobs[index] is not logprob:
            logprob = logprobs[index]
            text = float_text(text_of, logprob)
        at = put_text(at, b"," if index else b"[")
        chosen = at
        at = put_id(put_text(at, b'{"token_id":'), token_ids[index])
        at = put_bytes(put_text(at, b',"logprob":'), text)
        at = put_id(put_text(at, b',"rank":'), ranks[index])
        chosen_size = at - chosen
        at = put_text(at, b',"top_logprobs":[')
        memcpy(at, chosen, chosen_size)
        at = put_text(at + chosen_size, b"}]}")
    at = put_text(at, b"]" if size else b"[]")
    return result[: at - begin]


def write_pairs(list logprobs not None, list token_ids not None, object text_of):
    """Write each token as SGLang does: its logprob, its id, and null for its text."""
    cdef Py_ssize_t index, size = len(token_ids)
    if len(logprobs) != size:
        raise ValueError("there must be one logprob for each token")
    cdef bytes result = PyBytes_FromStringAndSize(NULL, 2 + size * PAIR_SIZE_MAX)
    cdef char* begin = PyBytes_AS_STRING(result)
    cdef char* at = begin
    cdef object logprob = None
    cdef bytes text = b"null"
    for index in range(size):
        if logprobs[index] is not logprob:
            logprob = logprobs[index]
            text = float_text(text_of, logprob)
        at = put_bytes(put_text(at, b",[" if index else b"[["), text)
        at = put_id(put_text(at, b","), token_ids[index])
        at = put_text(at, b",null]")
    at = put_text(at, b"]" if size else b"[]")
    return result[: at - begin]
