# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Token ids and logprobs, from a JSON answer straight into arrays, and ids back into JSON.

An answer of 4,096 tokens is a quarter of a megabyte, nearly all of it one or two lists of numbers.
Turning those into Python objects first costs more than everything else a client does for them, and
holds the interpreter while it does. So this island reads the whole document once, without the
interpreter lock: it checks every byte against RFC 8259, parses the lists that were asked for into
C buffers, and hands back what remains, a few hundred bytes, for an ordinary decoder.

Roads not taken. Searching the bytes for the key (twice as fast) takes a key inside a string for a
key. Decoding the rest with msgspec.Raw fields first, and scanning the raw list after, reads the
list twice. A general parser that builds a tree (simdjson) builds what nobody reads.

Numbers are rounded correctly to float64 by std::from_chars, and then to float32, so that a value
equals ``numpy.float32(json.loads(text))`` to the last bit.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.math cimport NAN
from libc.stdint cimport INT32_MAX, int32_t, int64_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy

import numpy as np

cdef extern from *:
    """
    #include <charconv>
    #include <cmath>
    #include <cstdint>
    #include <cstdlib>
    #include <cstring>
    #if !defined(__cpp_lib_to_chars) || __cpp_lib_to_chars < 201611L
    #include <locale.h>
    #if defined(__APPLE__)
    #include <xlocale.h>
    #endif
    #endif

    // A number out of float64's range is either nearly 0 or too large: what decides is the power of
    // ten of its first digit that is not 0.
    static bool arealtrio_is_tiny(const char* at, const char* end) {
        long long order = 0, exponent = 0;
        bool point = false, digit_seen = false, negative = false;
        for (; at < end && *at != 'e' && *at != 'E'; ++at) {
            if (*at == '.') { point = true; continue; }
            if (*at == '-') continue;
            if (*at != '0') digit_seen = true;
            if (!point && digit_seen) ++order;
            if (point && !digit_seen) --order;
        }
        if (!digit_seen) return true;
        if (at < end) ++at;
        if (at < end && (*at == '-' || *at == '+')) negative = *at++ == '-';
        for (; at < end && exponent < (1LL << 50); ++at) exponent = exponent * 10 + (*at - '0');
        return order + (negative ? -exponent : exponent) <= 0;
    }

    // Parse the number at begin as far as it goes. False where it is beyond float64.
    static inline bool arealtrio_to_double(const char* begin, const char* limit, double* value,
                                           const char** end) {
    #if defined(__cpp_lib_to_chars) && __cpp_lib_to_chars >= 201611L
        auto parsed = std::from_chars(begin, limit, *value);
        *end = parsed.ptr;
        if (parsed.ec == std::errc()) return true;
        if (parsed.ec != std::errc::result_out_of_range) return false;
    #else  // a C++ library whose from_chars has no floats; a bytes object ends with a 0
        static locale_t c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
        char* stop;
        *value = strtod_l(begin, &stop, c_locale);
        *end = stop;
        (void)limit;
        if (std::isfinite(*value) && *value != 0.0) return true;
    #endif
        if (!arealtrio_is_tiny(begin, *end)) return false;
        *value = *begin == '-' ? -0.0 : 0.0;
        return true;
    }

    // How many of the 8 bytes at ``at``, from the first on, are digits, or are plain characters of a
    // JSON string (no quote, backslash, control character, nor above 127). The arithmetic sets the
    // high bit of each byte that is not; a borrow reaches only bytes behind the first of those.
    static inline int arealtrio_first(uint64_t marks) {
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        return marks ? __builtin_ctzll(marks) >> 3 : 8;
    #else
        return marks ? 0 : 8;  // the loop behind goes byte by byte
    #endif
    }
    static inline uint64_t arealtrio_load8(const unsigned char* at) {
        uint64_t word;
        std::memcpy(&word, at, 8);
        return word;
    }
    static const uint64_t ONES = 0x0101010101010101ULL;
    static inline int arealtrio_digits8(const unsigned char* at) {
        const uint64_t value = arealtrio_load8(at) ^ 0x30 * ONES;
        return arealtrio_first((((value & 0x7F * ONES) + 0x76 * ONES) | value) & 0x80 * ONES);
    }
    static inline int arealtrio_plain8(const unsigned char* at) {
        const uint64_t word = arealtrio_load8(at);
        const uint64_t quote = word ^ 0x22 * ONES, backslash = word ^ 0x5C * ONES;
        return arealtrio_first((((quote - ONES) & ~quote) | ((backslash - ONES) & ~backslash)
                                | ((word - 0x20 * ONES) & ~word) | word) & 0x80 * ONES);
    }

    static inline char* arealtrio_write_int(char* at, char* end, int value) {
        return std::to_chars(at, end, value).ptr;
    }
    """
    bint to_double "arealtrio_to_double"(
        const char* begin, const char* limit, double* value, const char** end
    ) nogil
    int digits8 "arealtrio_digits8"(const unsigned char* at) nogil
    int plain8 "arealtrio_plain8"(const unsigned char* at) nogil
    char* write_int "arealtrio_write_int"(char* at, char* end, int value) nogil

cdef extern from "<cmath>" namespace "std" nogil:
    bint isfinite(float value)

ctypedef const unsigned char* Bytes

cdef int DEPTH_MAX = 128  # of nesting, so of recursion; a real answer has fewer than ten levels
cdef int ID_DIGITS_MAX = 10
cdef int ID_SIZE_MAX = 12  # of one id in JSON: a sign, ten digits, a comma

cdef enum Kind:
    INNER  # leads to something wanted
    IDS
    FLOATS
    TOKEN_STRINGS
    PAIRS
    RECORDS
    DROP

_KINDS = {
    "ids": IDS,
    "floats": FLOATS,
    "token_strings": TOKEN_STRINGS,
    "pairs": PAIRS,
    "records": RECORDS,
    "drop": DROP,
}

# One step of a wanted path. Nodes form a tree, in one array; node 0 is the document.
cdef struct Node:
    Kind kind
    const char* key  # the object's key that leads here
    Py_ssize_t key_size
    Py_ssize_t index  # or the array's index; -1 where it is a key
    int first_child  # 0: none, since nobody's child is the document
    int next_sibling

# What one scan found at one node.
cdef struct Found:
    bint seen
    bint is_list  # False: absent or null
    bint has_ids
    int32_t* ids
    float* values
    Py_ssize_t size
    Py_ssize_t room

# What is left out of the rest.
cdef struct Cut:
    Bytes begin
    Bytes end

cdef struct Scan:
    Bytes at
    Bytes end
    const char* expected  # NULL while all is well
    bint out_of_memory
    const Node* nodes
    Found* found
    Cut* cuts  # in the document's order; one for each node is the most
    int cut_count


# --- the grammar of RFC 8259 -------------------------------------------------------------------
# Every function reads from ``scan.at``, moves it, and returns whether all is well. None asks whether
# the document has ended: CPython puts a 0 behind the last byte of a bytes object, and no rule below
# goes past a 0. Hot loops move a local pointer, since a char may alias ``scan.at`` itself, which
# keeps the compiler from holding it in a register.

cdef inline bint fail(Scan* scan, const char* expected) noexcept nogil:
    scan.expected = expected
    return False


cdef inline void skip_space(Scan* scan) noexcept nogil:
    cdef Bytes at = scan.at
    if at[0] > c" ":
        return
    while at[0] == c" " or at[0] == c"\n" or at[0] == c"\r" or at[0] == c"\t":
        at += 1
    scan.at = at


cdef inline bint next_is(Scan* scan, unsigned char wanted) noexcept nogil:
    return scan.at[0] == wanted


cdef inline bint take(Scan* scan, unsigned char wanted, const char* expected) noexcept nogil:
    if scan.at[0] != wanted:
        return fail(scan, expected)
    scan.at += 1
    return True


cdef inline bint pass_text(Scan* scan, const char* text, Py_ssize_t size) noexcept nogil:
    """Go behind ``text`` where it is what comes next."""
    if scan.end - scan.at < size or memcmp(scan.at, text, size) != 0:
        return False
    scan.at += size
    return True


cdef bint skip_word(Scan* scan, const char* word, Py_ssize_t size) noexcept nogil:
    return pass_text(scan, word, size) or fail(scan, b"a JSON value")


cdef inline bint is_digit(unsigned char char) noexcept nogil:
    return c"0" <= char <= c"9"


cdef inline bint skip_digits(Scan* scan) noexcept nogil:
    cdef Bytes at = scan.at
    cdef int run = 8
    if not is_digit(at[0]):
        return fail(scan, b"a digit")
    while run == 8 and scan.end - at >= 8:
        run = digits8(at)
        at += run
    while is_digit(at[0]):
        at += 1
    scan.at = at
    return True


cdef bint skip_number(Scan* scan) noexcept nogil:
    if next_is(scan, c"-"):
        scan.at += 1
    if next_is(scan, c"0"):
        scan.at += 1
    elif not skip_digits(scan):
        return False
    if next_is(scan, c"."):
        scan.at += 1
        if not skip_digits(scan):
            return False
    if next_is(scan, c"e") or next_is(scan, c"E"):
        scan.at += 1
        if next_is(scan, c"+") or next_is(scan, c"-"):
            scan.at += 1
        return skip_digits(scan)
    return True


cdef inline bint is_hex(unsigned char char) noexcept nogil:
    return is_digit(char) or c"a" <= char <= c"f" or c"A" <= char <= c"F"


cdef bint skip_escape(Scan* scan) noexcept nogil:
    """At the character behind a backslash. A lone surrogate is accepted, as json does."""
    cdef int digit
    cdef unsigned char char = scan.at[0]
    scan.at += 1
    if char == c"u":
        for digit in range(4):
            if not is_hex(scan.at[0]):
                return fail(scan, b"four hexadecimal digits")
            scan.at += 1
        return True
    if (
        char == c'"' or char == c"\\" or char == c"/" or char == c"b" or char == c"f"
        or char == c"n" or char == c"r" or char == c"t"
    ):
        return True
    return fail(scan, b"an escape")


cdef bint skip_utf8(Scan* scan) noexcept nogil:
    """At a byte above 127: one well-formed sequence, by the table of RFC 3629 §4."""
    cdef unsigned char lead = scan.at[0], low = 0x80, high = 0xBF
    cdef int size, index
    if 0xC2 <= lead <= 0xDF:
        size = 2
    elif 0xE0 <= lead <= 0xEF:
        size = 3
        if lead == 0xE0:
            low = 0xA0
        elif lead == 0xED:
            high = 0x9F
    elif 0xF0 <= lead <= 0xF4:
        size = 4
        if lead == 0xF0:
            low = 0x90
        elif lead == 0xF4:
            high = 0x8F
    else:
        return fail(scan, b"UTF-8")
    if not low <= scan.at[1] <= high:
        return fail(scan, b"UTF-8")
    for index in range(2, size):
        if not 0x80 <= scan.at[index] <= 0xBF:
            return fail(scan, b"UTF-8")
    scan.at += size
    return True


cdef bint skip_special(Scan* scan) noexcept nogil:
    """At what is not a plain character of a string, nor its end."""
    if scan.at[0] == c"\\":
        scan.at += 1
        return skip_escape(scan)
    if scan.at[0] >= 0x80:
        return skip_utf8(scan)
    if scan.at == scan.end:
        return fail(scan, b"the end of a string")
    return fail(scan, b"no control character in a string")


cdef bint skip_string(Scan* scan) noexcept nogil:
    cdef Bytes at
    cdef int run
    if not take(scan, c'"', b"a string"):
        return False
    while True:
        at = scan.at
        run = 8
        while run == 8 and scan.end - at >= 8:
            run = plain8(at)
            at += run
        while 0x20 <= at[0] < 0x80 and at[0] != c'"' and at[0] != c"\\":
            at += 1
        scan.at = at
        if at[0] == c'"':
            scan.at += 1
            return True
        if not skip_special(scan):
            return False


cdef inline bint next_key(Scan* scan, bint first, bint* done) noexcept nogil:
    """Go to the next key of an object, or behind its end; ``scan.at`` is behind ``{`` or a value."""
    done[0] = False
    skip_space(scan)
    if next_is(scan, c"}"):
        scan.at += 1
        done[0] = True
        return True
    if not first:
        if not take(scan, c",", b"a comma or the end of an object"):
            return False
        skip_space(scan)
    return True


cdef inline bint after_key(Scan* scan) noexcept nogil:
    skip_space(scan)
    if not take(scan, c":", b"a colon"):
        return False
    skip_space(scan)
    return True


cdef inline bint next_item(Scan* scan, bint first, bint* done) noexcept nogil:
    """Go to the next item of an array, or behind its end; ``scan.at`` is behind ``[`` or an item."""
    done[0] = False
    skip_space(scan)
    if next_is(scan, c"]"):
        scan.at += 1
        done[0] = True
        return True
    if not first:
        if not take(scan, c",", b"a comma or the end of an array"):
            return False
        skip_space(scan)
    return True


cdef bint skip_object(Scan* scan, int depth) noexcept nogil:
    cdef bint done, first = True
    scan.at += 1
    while next_key(scan, first, &done):
        if done:
            return True
        first = False
        if not (skip_string(scan) and after_key(scan) and skip_value(scan, depth + 1)):
            return False
    return False


cdef bint skip_array(Scan* scan, int depth) noexcept nogil:
    cdef bint done, first = True
    scan.at += 1
    while next_item(scan, first, &done):
        if done:
            return True
        first = False
        if not skip_value(scan, depth + 1):
            return False
    return False


cdef bint skip_value(Scan* scan, int depth) noexcept nogil:
    """Check one value of any kind and go behind it."""
    if depth > DEPTH_MAX:
        return fail(scan, b"less nesting")
    cdef unsigned char char = scan.at[0]
    if char == c'"':
        return skip_string(scan)
    if char == c"-" or is_digit(char):
        return skip_number(scan)
    if char == c"{":
        return skip_object(scan, depth)
    if char == c"[":
        return skip_array(scan, depth)
    if char == c"t":
        return skip_word(scan, b"true", 4)
    if char == c"f":
        return skip_word(scan, b"false", 5)
    if char == c"n":
        return skip_word(scan, b"null", 4)
    return fail(scan, b"a JSON value")


# --- numbers and names -------------------------------------------------------------------------

cdef bint read_id(Scan* scan, int32_t* value) noexcept nogil:
    """A token id: an integer in 0 … 2³¹-1. (-0 is 0, as everywhere in JSON.)"""
    cdef Bytes at = scan.at
    cdef Bytes begin
    cdef uint64_t number = 0  # wraps round where there are too many digits, which are counted
    if at[0] == c"-" and at[1] == c"0":
        at += 1
    if not is_digit(at[0]):
        return fail(scan, b"a token id")
    if at[0] == c"0":
        at += 1
    else:
        begin = at
        while is_digit(at[0]):
            number = number * 10 + (at[0] - c"0")
            at += 1
        if number > INT32_MAX or at - begin > ID_DIGITS_MAX:
            return fail(scan, b"a token id below 2**31")
    value[0] = <int32_t>number
    scan.at = at
    return True  # a fraction or an exponent stops whoever expects a comma next


cdef bint starts_number(Bytes at) noexcept nogil:
    """Whether what C would take too (``01``, ``.5``, ``5.``, ``inf``, ``0x1``) is ruled out."""
    if at[0] == c"-":
        at += 1
    if at[0] == c"0":
        at += 1
        if is_digit(at[0]) or at[0] == c"x" or at[0] == c"X":
            return False
    elif not is_digit(at[0]):
        return False
    while is_digit(at[0]):
        at += 1
    return at[0] != c"." or is_digit(at[1])


cdef bint read_float(Scan* scan, float* value) noexcept nogil:
    """A finite float32; null is NaN."""
    cdef double number
    cdef const char* end
    if scan.at[0] == c"n":
        value[0] = NAN
        return skip_word(scan, b"null", 4)
    if not starts_number(scan.at):
        return fail(scan, b"a number")
    if not to_double(<const char*>scan.at, <const char*>scan.end, &number, &end):
        return fail(scan, b"a number that float64 can hold")
    value[0] = <float>number
    if not isfinite(value[0]):
        return fail(scan, b"a number that float32 can hold")
    scan.at = <Bytes>end
    return True


cdef int hex_value(unsigned char char) noexcept nogil:
    if is_digit(char):
        return char - c"0"
    return (char | 0x20) - c"a" + 10


cdef int next_char(Bytes* at) noexcept nogil:
    """One character of a checked string; -1 for any that is not ASCII (no name of ours has one)."""
    cdef unsigned char char = at[0][0]
    cdef int code = 0, index
    at[0] += 1
    if char >= 0x80:
        return -1
    if char != c"\\":
        return char
    char = at[0][0]
    at[0] += 1
    if char == c"u":
        for index in range(4):
            code = code * 16 + hex_value(at[0][index])
        at[0] += 4
        return code if code < 0x80 else -1
    if char == c'"' or char == c"\\" or char == c"/":
        return char
    return -1  # a control character


cdef inline bint is_name(Bytes begin, Bytes end, const char* name, Py_ssize_t size) noexcept nogil:
    """Whether a checked string, without its quotes, is ``name`` once its escapes are undone."""
    cdef Py_ssize_t index = 0
    if end - begin == size:  # nearly always, and then nearly always without escapes
        if memcmp(begin, name, size) == 0:
            return True
    while begin < end:
        if index >= size or next_char(&begin) != name[index]:
            return False
        index += 1
    return index == size


cdef bint read_token_string(Scan* scan, int32_t* value, bint* is_token) noexcept nogil:
    """``"token_id:123"``; ``is_token`` is False for any other string."""
    cdef Bytes begin = scan.at
    is_token[0] = True
    if scan.end - begin > 10 and memcmp(begin, b'"token_id:', 10) == 0 and begin[10] != c"-":
        scan.at += 10
        if read_id(scan, value) and scan.at[0] == c'"':
            scan.at += 1
            return True
    scan.at = begin
    scan.expected = NULL
    return read_any_string(scan, value, is_token)


cdef bint read_any_string(Scan* scan, int32_t* value, bint* is_token) noexcept nogil:
    """The same for strings that are other text, or write themselves with escapes."""
    cdef const char* prefix = b"token_id:"
    cdef Bytes at = scan.at + 1
    cdef Bytes end
    cdef int64_t number = 0
    cdef int index, char, digits = 0, first = 0
    if not skip_string(scan):
        return False
    end = scan.at - 1
    is_token[0] = False
    for index in range(9):
        if at >= end or next_char(&at) != prefix[index]:
            return True
    while at < end:
        char = next_char(&at)
        if char < c"0" or char > c"9" or (digits and first == c"0") or digits == 10:
            return True
        if digits == 0:
            first = char
        number = number * 10 + (char - c"0")
        digits += 1
    is_token[0] = digits > 0 and number <= INT32_MAX
    value[0] = <int32_t>number
    return True


# --- the wanted lists --------------------------------------------------------------------------

cdef bint grow(Scan* scan, Found* found) noexcept nogil:
    """Make room for twice as many; both buffers, since one check an item is cheaper than two."""
    cdef Py_ssize_t room = 2 * found.room if found.room else 512
    cdef void* ids = realloc(found.ids, room * sizeof(int32_t))
    if ids != NULL:
        found.ids = <int32_t*>ids
    cdef void* values = realloc(found.values, room * sizeof(float))
    if values != NULL:
        found.values = <float*>values
    if ids == NULL or values == NULL:
        scan.out_of_memory = True
        return fail(scan, b"memory")
    found.room = room
    return True


cdef bint read_pair(Scan* scan, int32_t* token, float* value) noexcept nogil:
    """``[logprob, id, …]``; what follows is checked and passed over."""
    cdef bint done
    if not take(scan, c"[", b"a pair of logprob and id"):
        return False
    skip_space(scan)
    if not read_float(scan, value):
        return False
    skip_space(scan)
    if not take(scan, c",", b"a comma"):
        return False
    skip_space(scan)
    if not read_id(scan, token):
        return False
    while next_item(scan, False, &done):
        if done:
            return True
        if not skip_value(scan, 0):
            return False
    return False


cdef bint read_field(Scan* scan, Bytes begin, int32_t* token, float* value, int* got) noexcept nogil:
    """One value of a record, whose key lies at ``begin`` and is followed by ``scan.at``."""
    cdef Bytes end = scan.at - 1
    cdef int field
    if is_name(begin, end, b"token_id", 8):
        field = 1
    elif is_name(begin, end, b"logprob", 7):
        field = 2
    else:
        return after_key(scan) and skip_value(scan, 0)
    if got[0] & field:
        return fail(scan, b"no key twice")
    got[0] |= field
    if not after_key(scan):
        return False
    return read_id(scan, token) if field == 1 else read_float(scan, value)


cdef bint read_usual_record(Scan* scan, int32_t* token, float* value) noexcept nogil:
    """The record to the letter as vLLM writes it; False at any other, read as if it were not there.

    Where the chosen token alone is asked for, ``top_logprobs`` repeats it: of bytes that were
    checked, the same bytes need no check but that they are the same.
    """
    cdef Bytes begin = scan.at
    cdef Py_ssize_t size
    if (
        pass_text(scan, b'{"token_id":', 12) and read_id(scan, token)
        and pass_text(scan, b',"logprob":', 11) and read_float(scan, value)
        and pass_text(scan, b',"rank":', 8) and skip_number(scan)
    ):
        size = scan.at - begin
        if (
            pass_text(scan, b',"top_logprobs":[', 17)
            and pass_text(scan, <const char*>begin, size) and pass_text(scan, b"}]}", 3)
        ):
            return True
    scan.at = begin
    scan.expected = NULL
    return False


cdef bint read_record(Scan* scan, int32_t* token, float* value) noexcept nogil:
    """``{"token_id": …, "logprob": …, …}`` in any order, each exactly once."""
    cdef bint done, first = True
    cdef int got = 0
    cdef Bytes begin
    if read_usual_record(scan, token, value):
        return True
    if not take(scan, c"{", b"a record of token_id and logprob"):
        return False
    while next_key(scan, first, &done):
        if done:
            return got == 3 or fail(scan, b"a token_id and a logprob in each record")
        first = False
        begin = scan.at + 1
        if not (skip_string(scan) and read_field(scan, begin, token, value, &got)):
            return False
    return False


cdef bint read_item(Scan* scan, Kind kind, Found* found) noexcept nogil:
    cdef bint is_token = True
    cdef int32_t* token = &found.ids[found.size]
    cdef float* value = &found.values[found.size]
    if kind == IDS:
        return read_id(scan, token)
    if kind == FLOATS:
        return read_float(scan, value)
    if kind == PAIRS:
        return read_pair(scan, token, value)
    if kind == RECORDS:
        return read_record(scan, token, value)
    if not read_token_string(scan, token, &is_token):
        return False
    found.has_ids = found.has_ids and is_token
    return True


cdef bint read_list(Scan* scan, Kind kind, Found* found) noexcept nogil:
    cdef bint done, first = True
    found.has_ids = kind != FLOATS
    if not take(scan, c"[", b"a list or null"):
        return False
    while next_item(scan, first, &done):
        if done:
            found.is_list = True
            return True
        first = False
        if found.size == found.room and not grow(scan, found):
            return False
        if not read_item(scan, kind, found):
            return False
        found.size += 1
    return False


cdef bint take_wanted(Scan* scan, int node, int depth) noexcept nogil:
    """At the value of a leaf: read or drop it, and remember where it lay."""
    cdef Found* found = &scan.found[node]
    cdef Kind kind = scan.nodes[node].kind
    cdef Bytes begin = scan.at
    if next_is(scan, c"n"):
        return skip_word(scan, b"null", 4)
    if kind == DROP:
        if not skip_value(scan, depth):
            return False
    elif not read_list(scan, kind, found):
        return False
    scan.cuts[scan.cut_count].begin = begin
    scan.cuts[scan.cut_count].end = scan.at
    scan.cut_count += 1
    return True


cdef int child_by_key(Scan* scan, int node, Bytes begin, Bytes end) noexcept nogil:
    cdef int child = scan.nodes[node].first_child
    while child:
        if scan.nodes[child].index < 0 and is_name(
            begin, end, scan.nodes[child].key, scan.nodes[child].key_size
        ):
            return child
        child = scan.nodes[child].next_sibling
    return 0


cdef int child_by_index(Scan* scan, int node, Py_ssize_t index) noexcept nogil:
    cdef int child = scan.nodes[node].first_child
    while child:
        if scan.nodes[child].index == index:
            return child
        child = scan.nodes[child].next_sibling
    return 0


cdef bint walk_child(Scan* scan, int child, int depth) noexcept nogil:
    """Read the value at ``scan.at``: a wanted one, one that leads to it, or any other (0)."""
    if not child:
        return skip_value(scan, depth)
    if scan.nodes[child].kind == INNER:
        return walk(scan, child, depth)
    return take_wanted(scan, child, depth)


cdef bint walk_object(Scan* scan, int node, int depth) noexcept nogil:
    cdef bint done, first = True
    cdef int child
    cdef Bytes begin
    scan.at += 1
    while next_key(scan, first, &done):
        if done:
            return True
        first = False
        begin = scan.at + 1
        if not skip_string(scan):
            return False
        child = child_by_key(scan, node, begin, scan.at - 1)
        if child:
            if scan.found[child].seen:  # which one would count is anyone's guess (RFC 8259 §4)
                return fail(scan, b"no key twice")
            scan.found[child].seen = True
        if not (after_key(scan) and walk_child(scan, child, depth + 1)):
            return False
    return False


cdef bint walk_array(Scan* scan, int node, int depth) noexcept nogil:
    cdef bint done, first = True
    cdef Py_ssize_t index = 0
    scan.at += 1
    while next_item(scan, first, &done):
        if done:
            return True
        first = False
        if not walk_child(scan, child_by_index(scan, node, index), depth + 1):
            return False
        index += 1
    return False


cdef bint walk(Scan* scan, int node, int depth) noexcept nogil:
    """At a value on the way to something wanted; one of another shape leads nowhere."""
    if next_is(scan, c"{"):
        return walk_object(scan, node, depth)
    if next_is(scan, c"["):
        return walk_array(scan, node, depth)
    return skip_value(scan, depth)


cdef bint scan_document(Scan* scan) noexcept nogil:
    skip_space(scan)
    if not walk(scan, 0, 1):
        return False
    skip_space(scan)
    return scan.at == scan.end or fail(scan, b"the end of the document")


# --- the Python side ---------------------------------------------------------------------------

cdef object empty = np.empty
cdef object INT32 = np.dtype(np.int32)
cdef object FLOAT32 = np.dtype(np.float32)


cdef inline char* copy(char* to, Bytes begin, Py_ssize_t size) noexcept nogil:
    """Return where the copy ends."""
    memcpy(to, begin, size)
    return to + size


cdef object array(const void* items, Py_ssize_t size, object dtype):
    """A fresh array of ``size`` items, which have four bytes each."""
    cdef Py_buffer view
    result = empty(size, dtype)
    PyObject_GetBuffer(result, &view, PyBUF_WRITABLE)
    if size:  # of none there is no memory to copy from
        memcpy(view.buf, items, view.len)
    PyBuffer_Release(&view)
    return result


cdef object column(Kind kind, Found* found):
    """``(ids, values)``, each None where the kind has none; None where no list was found."""
    if not found.is_list:
        return None
    return (
        array(found.ids, found.size, INT32) if found.has_ids else None,
        None if kind == IDS or kind == TOKEN_STRINGS else array(found.values, found.size, FLOAT32),
    )


cdef class Scanner:
    """Lifts the long lists out of JSON documents. Immutable; any number of threads may share it."""

    cdef Node* nodes
    cdef int node_count
    cdef tuple paths  # (path, node) of each list that is returned
    cdef list keys  # keeps the bytes alive that the nodes point into

    def __cinit__(self, wanted):
        steps = 1 + sum(path.count(".") + 1 for path in wanted)
        self.nodes = <Node*>calloc(steps, sizeof(Node))
        if self.nodes == NULL:
            raise MemoryError
        self.node_count = 1
        self.keys = []
        returned = []
        for path, kind in wanted.items():
            if kind not in _KINDS:
                raise ValueError(f"{kind!r} is not one of {', '.join(_KINDS)}")
            node = self._add(path, _KINDS[kind])
            if kind != "drop":
                returned.append((path, node))
        self.paths = tuple(returned)

    def __dealloc__(self):
        free(self.nodes)

    cdef int _add(self, str path, Kind kind) except -1:
        cdef int node = 0
        for step in path.split("."):
            if node and self.nodes[node].kind != INNER:
                raise ValueError(f"{path!r} leads through a list that is wanted itself")
            node = self._child(node, step)
        if self.nodes[node].kind != INNER or self.nodes[node].first_child:
            raise ValueError(f"{path!r} is wanted twice, or leads to something that is wanted")
        self.nodes[node].kind = kind
        return node

    cdef int _child(self, int parent, str step) except -1:
        """The child of that name, added if it is new."""
        cdef bytes key = step.encode("ascii")
        cdef Py_ssize_t index = int(step) if step.isdigit() else -1
        cdef int child = self.nodes[parent].first_child
        if not key:
            raise ValueError("a path has an empty step")
        while child:
            if self.nodes[child].key[: self.nodes[child].key_size] == key:
                return child
            child = self.nodes[child].next_sibling
        child = self.node_count
        self.node_count += 1
        self.keys.append(key)
        self.nodes[child].key = PyBytes_AS_STRING(key)
        self.nodes[child].key_size = PyBytes_GET_SIZE(key)
        self.nodes[child].index = index
        self.nodes[child].next_sibling = self.nodes[parent].first_child
        self.nodes[parent].first_child = child
        return child

    def scan(self, bytes body not None):
        """Read one document; the interpreter lock is released meanwhile."""
        cdef Scan scan
        cdef Bytes begin = <Bytes>PyBytes_AS_STRING(body)
        cdef int node
        scan.at = begin
        scan.end = begin + PyBytes_GET_SIZE(body)
        scan.expected = NULL
        scan.out_of_memory = False
        scan.nodes = self.nodes
        scan.found = <Found*>calloc(self.node_count, sizeof(Found))
        scan.cuts = <Cut*>calloc(self.node_count, sizeof(Cut))
        scan.cut_count = 0
        try:
            if scan.found == NULL or scan.cuts == NULL:
                raise MemoryError
            with nogil:
                scan_document(&scan)
            if scan.out_of_memory:
                raise MemoryError
            if scan.expected != NULL:
                expected = (<bytes>scan.expected).decode()
                raise ValueError(f"expected {expected} at byte {scan.at - begin}")
            return self._columns(&scan), self._rest(&scan, body)
        finally:
            if scan.found != NULL:
                for node in range(self.node_count):
                    free(scan.found[node].ids)
                    free(scan.found[node].values)
            free(scan.found)
            free(scan.cuts)

    cdef dict _columns(self, Scan* scan):
        cdef int node
        columns = {}
        for path, node in self.paths:
            columns[path] = column(self.nodes[node].kind, &scan.found[node])
        return columns

    cdef bytes _rest(self, Scan* scan, bytes body):
        """The document with ``null`` in the place of everything wanted."""
        cdef Bytes at = <Bytes>PyBytes_AS_STRING(body)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(body)
        cdef int index
        for index in range(scan.cut_count):
            size += 4 - (scan.cuts[index].end - scan.cuts[index].begin)
        cdef bytes rest = PyBytes_FromStringAndSize(NULL, size)
        cdef char* to = PyBytes_AS_STRING(rest)
        for index in range(scan.cut_count):
            to = copy(to, at, scan.cuts[index].begin - at)
            to = copy(to, <Bytes>"null", 4)
            at = scan.cuts[index].end
        copy(to, at, scan.end - at)
        return rest


def encode_ids(const int32_t[::1] ids not None):
    """Write ids as a JSON array, without a Python object for each."""
    cdef Py_ssize_t index, size = ids.shape[0]
    cdef object result = PyBytes_FromStringAndSize(NULL, 2 + size * ID_SIZE_MAX)
    cdef char* begin = PyBytes_AS_STRING(result)
    cdef char* at = begin + 1
    begin[0] = c"["
    with nogil:
        for index in range(size):
            at = write_int(at, at + ID_SIZE_MAX, ids[index])
            at[0] = c","
            at += 1
    if size:
        at -= 1  # the last comma
    at[0] = c"]"
    return result[: at + 1 - begin]
