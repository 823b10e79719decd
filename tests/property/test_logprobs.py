"""The compiled scanner against the standard library's json: the same values, or both refuse."""

from __future__ import annotations

import json
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arealtrio._core.logprobs import Scanner, encode_ids

from ..models import logprobs as model

WANTED: dict[str, str] = {
    "choices.0.token_ids": "ids",
    "choices.0.logprobs.token_logprobs": "floats",
    "choices.0.logprobs.tokens": "token_strings",
    "choices.0.logprobs.content": "records",
    "choices.0.text": "drop",
    "meta_info.pairs": "pairs",
    "ids": "ids",
}
SCANNER = Scanner(WANTED)
MANY = 3 * settings().max_examples  # an example is cheap here, and a scanner's corners are many


def agree(body: bytes, scanner: Scanner = SCANNER, wanted: dict[str, str] = WANTED) -> bool:
    """Whether both accept; where one refuses, so must the other."""
    try:
        expected, expected_rest = model.scan(wanted, body)
    except ValueError:
        with pytest.raises(ValueError, match=r"^expected .* at byte \d+$"):
            scanner.scan(body)
        return False
    columns, rest = scanner.scan(body)
    assert columns.keys() == expected.keys()
    for path, column in columns.items():
        same_column(column, expected[path])
    assert json.loads(rest) == expected_rest
    return True


def same_column(column: Any, expected: model.Column) -> None:
    assert (column is None) == (expected is None)
    if column is None or expected is None:
        return
    for array, values, dtype in zip(column, expected, (np.int32, np.float32), strict=True):
        assert (array is None) == (values is None)
        if array is not None:
            assert array.dtype == dtype
            np.testing.assert_array_equal(array, np.array(values, dtype=dtype))


# --- documents of the right shape, written in every way that JSON allows ------------------------

ids = st.integers(0, 2**31 - 1)
logprobs = st.none() | st.floats(-(2.0**99), 0, width=32) | st.integers(-5, 5)
texts = st.text(max_size=6) | st.sampled_from(['"ids":[9]', "]", '"', "\\", "token_id:3", "\ud800"])
# Of what nobody asked for; a wanted one would have to hold what it is wanted for.
names = texts.filter(lambda name: name not in {step for path in WANTED for step in path.split(".")})
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
tokens = st.lists(ids.map(lambda i: f"token_id:{i}"), max_size=5) | st.lists(texts, max_size=3)
record = st.fixed_dictionaries(
    {"token_id": ids, "logprob": logprobs}, optional={"rank": junk, "top_logprobs": junk}
)


def usual(token_id: int, logprob: float | None, rank: int) -> dict[str, Any]:
    """A record as vLLM writes it, which repeats itself."""
    chosen = {"token_id": token_id, "logprob": logprob, "rank": rank}
    return chosen | {"top_logprobs": [chosen]}


usual_record = st.builds(usual, ids, logprobs, st.integers(-1, 200_000))
pair = st.tuples(logprobs, ids, junk).map(list) | st.tuples(logprobs, ids).map(list)


def with_junk(fields: dict[str, Any]) -> st.SearchStrategy[Any]:
    """An object with any of the fields, among others, in any order."""
    strategies = [st.tuples(st.just(name), value) for name, value in fields.items()]
    strategies += [st.tuples(names, junk)]
    return st.permutations(strategies).flatmap(lambda chosen: st.tuples(*chosen).map(dict))


document = with_junk(
    {
        "choices": st.lists(
            with_junk(
                {
                    "token_ids": st.none() | st.lists(ids, max_size=5),
                    "text": texts,
                    "logprobs": st.none()
                    | with_junk(
                        {
                            "token_logprobs": st.none() | st.lists(logprobs, max_size=5),
                            "tokens": st.none() | tokens,
                            "content": st.none() | st.lists(usual_record | record, max_size=3),
                        }
                    ),
                }
            ),
            max_size=2,
        ),
        "meta_info": with_junk({"pairs": st.none() | st.lists(pair, max_size=4)}) | junk,
        "ids": st.none() | st.lists(ids, max_size=3),
    }
)


@st.composite
def written(draw: st.DrawFn) -> bytes:
    indent = draw(st.sampled_from([None, 0, 1, "\t"]))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\r\n", "\t: ")]))
    ascii_only = draw(st.booleans())
    text = json.dumps(draw(document), indent=indent, separators=separators, ensure_ascii=ascii_only)
    return draw(st.sampled_from(["", " ", "\n"])).encode() + text.encode("utf-8", "replace")


@given(written())
@settings(max_examples=MANY)
def test_a_document_gives_what_json_gives(body: bytes) -> None:
    assert agree(body)


@given(
    written(), st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 2)))
)
@settings(max_examples=MANY)
def test_a_damaged_document_is_read_alike_or_refused_by_both(
    body: bytes, damage: list[tuple[int, bytes, int]]
) -> None:
    for place, new, removed in damage:
        at = place % (len(body) + 1)
        body = body[:at] + new + body[at + removed :]
    agree(body)


@given(written(), st.integers(0, 10**6))
def test_a_document_that_is_cut_short_is_refused(body: bytes, place: int) -> None:
    assert not agree(body[: place % len(body.rstrip())])


usual_answer = st.lists(usual_record, min_size=1, max_size=4).map(
    lambda records: json.dumps(
        {"choices": [{"logprobs": {"content": records}}]}, separators=(",", ":")
    ).encode()
)


@given(usual_answer)
@settings(max_examples=MANY)
def test_usual_records_give_what_json_gives(body: bytes) -> None:
    assert agree(body)


@given(usual_answer, st.integers(0, 10**6), st.sampled_from(b'0123456789-.e,:{}[]"n \\'))
@settings(max_examples=MANY)
def test_usual_records_with_one_wrong_byte_are_read_alike_or_refused_by_both(
    body: bytes, place: int, byte: int
) -> None:
    at = place % len(body)
    agree(body[:at] + bytes([byte]) + body[at + 1 :])
    agree(body[:at] + bytes([byte]) + body[at:])
    agree(body[:at] + body[at + 1 :])


@given(usual_answer, st.integers(0, 10**6))
def test_usual_records_that_are_cut_short_are_refused(body: bytes, place: int) -> None:
    assert not agree(body[: place % len(body)])


FRAGMENTS = [
    "{", "}", "[", "]", ",", ":", '"', "\\", " ", "\n", "0", "1", "9", "-", "+", ".", "e", "E", "x",
    "null", "true", "false", "NaN", "Infinity", "nul", '"ids"', '"meta_info"', '"pairs"',
    '"token_id:5"', "\\u0041", "\\ud800", "\u00e9", "\u2028", "\x00", "\x1f", "\x7f", '"\\u0069ds"',
    '{"ids":[', '{"meta_info":{"pairs":[[', '"choices":[{"token_ids":[', "1e400", "-1e-400",
    "2147483647", "2147483648", "0.1e-3", '"token_id":1', '"logprob":-1',
]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))
@settings(max_examples=MANY)
@example('{"ids":[1,2]}')
@example('{"\\u0069ds":[1,2]}')
@example('{"ids":[1],"\\u0069ds":[2]}')
@example('{"ids":[0x1]}')
@example('{"ids":[-0]}')
@example('{"ids":[-1]}')
@example('{"ids":[01]}')
@example('{"ids":[1,]}')
@example('{"ids":[1] ,}')
@example('{"ids":[2147483648]}')
@example('{"ids":[1.0]}')
@example('{"ids":[1e0]}')
@example('{"ids":[true]}')
@example('{"ids":["1"]}')
@example('{"ids":{}}')
@example('{"ids" :[1]}')
@example('{"x":{"ids":["nested"]},"ids":[1]}')
@example('{"x":"\\"ids\\":[9]","ids":[1]}')
@example('{"x":1,"x":2,"ids":[1]}')
@example('{"choices":[{"token_ids":[1]},{"token_ids":[2]}]}')
@example('{"choices":{"0":{"token_ids":[1]}}}')
@example('{"choices":[],"choices":[]}')
@example('{"choices":[{"logprobs":{"content":[{"token_id":1,"logprob":-1,"token_id":1}]}}]}')
@example('{"choices":[{"logprobs":{"content":[{"token_id":1}]}}]}')
@example('{"choices":[{"logprobs":{"content":[{"token\\u005fid":1,"logprob":-1}]}}]}')
@example(
    '{"choices":[{"logprobs":{"content":[{"token_id":1,"logprob":-1,"rank":1,"top_logprobs":['
    '{"token_id":1,"logprob":-1,"rank":12}]}]}}]}'
)
@example(
    '{"choices":[{"logprobs":{"content":[{"token_id":1,"logprob":-1,"rank":1,"top_logprobs":['
    '{"token_id":1,"logprob":-1,"rank":1}],"token_id":1}]}}]}'
)
@example('{"choices":[{"logprobs":{"tokens":["token_id:1","token\\u005fid:2"]}}]}')
@example('{"choices":[{"logprobs":{"tokens":["token_id:1","token_id:01"]}}]}')
@example('{"choices":[{"logprobs":{"tokens":["token_id:1","token_id:-0"]}}]}')
@example('{"choices":[{"logprobs":{"tokens":["token_id:2147483648"]}}]}')
@example('{"choices":[{"logprobs":{"tokens":["token_id:99999999999999999999"]}}]}')
@example('{"choices":[{"logprobs":{"tokens":["token_id:"]}}]}')
@example('{"meta_info":{"pairs":[[-0.5]]}}')
@example('{"meta_info":{"pairs":[[]]}}')
@example('{"meta_info":{"pairs":[[1,2,]]}}')
@example("\ufeff{}")
@example("")
@example("1")
@example("{}{}")
def test_any_text_is_read_alike_or_refused_by_both(text: str) -> None:
    agree(text.encode())


@given(st.binary(max_size=8))
@settings(max_examples=MANY)
@example(b"\xc0\x80")
@example(b"\xed\xa0\x80")
@example(b"\xf4\x90\x80\x80")
@example(b"\xf0\x8f\xbf\xbf")
@example(b"\xe0\x9f\xbf")
@example(b"\xf0\x9f\x98\x80")
@example(b"\xf0\x9f\x98")
def test_any_bytes_in_a_string_are_read_alike_or_refused_by_both(inside: bytes) -> None:
    agree(b'{"a":"' + inside + b'","ids":[7]}')
    agree(b'{"a":"0123456' + inside + b'0123456789abcdef","ids":[7]}')


# --- numbers -----------------------------------------------------------------------------------

number_texts = (
    st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr)
    | st.floats(allow_nan=False, allow_infinity=False).map(lambda x: f"{x:.30e}")
    | st.integers(-(10**50), 10**50).map(str)
    | st.tuples(
        st.sampled_from(["", "-"]), st.integers(0, 10**20), st.from_regex(r"\A[0-9]{1,40}\Z"),
        st.integers(-420, 420),
    ).map(lambda t: f"{t[0]}{t[1]}.{t[2]}e{t[3]}")
    | st.from_regex(r"\A-?[0-9]{0,3}\.?[0-9]{0,3}([eE][-+]?[0-9]{0,3})?\Z")
)  # fmt: skip


@given(number_texts)
@settings(max_examples=MANY)
@example("1e-400")
@example("-1e-99999999999999999999")
@example("1e99999999999999999999")
@example("0e99999999999999999999")
@example("0.0000000000000000000000000001e-300")
@example("0." + "0" * 400 + "1e405")
@example("1" + "0" * 400 + "e-405")
@example("1" + "0" * 400 + "e-300")
@example("4.9e-324")
@example("2.4703282292062328e-324")
@example("1.7976931348623157e308")
@example("3.4028235677973366e38")  # just rounds to float32's infinity
@example("3.4028235677973362e38")
@example("-1.7080516815185547")
@example("9007199254740993")
@example("1.")
@example(".5")
@example("00")
@example("-")
@example("0x10")
@example("1e")
@example("inf")
def test_a_number_is_rounded_as_json_and_numpy_round_it(text: str) -> None:
    body = b'{"meta_info":{"pairs":[[%s,1]]}}' % text.encode()
    if agree(body):
        (_, values) = SCANNER.scan(body)[0]["meta_info.pairs"] or (None, None)
        assert values is not None
        assert values[0] == np.float32(json.loads(text))


@given(st.lists(st.floats(-1e4, 0, width=32), max_size=2000))
def test_a_long_list_is_whole(values: list[float]) -> None:
    column = SCANNER.scan(json.dumps({"ids": list(range(len(values))), "choices": [
        {"logprobs": {"token_logprobs": values}}]}).encode())[0]  # fmt: skip
    same_column(column["choices.0.logprobs.token_logprobs"], (None, values))
    same_column(column["ids"], (list(range(len(values))), None))


# --- refusals and bounds -----------------------------------------------------------------------


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_is_bounded(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"

    def nested(depth: int) -> bytes:
        return b'{"x":' + opening * depth + b"1" + closing * depth + b"}"

    SCANNER.scan(nested(126))
    with pytest.raises(ValueError, match="less nesting"):
        SCANNER.scan(nested(127))
    with pytest.raises(ValueError, match="less nesting"):
        SCANNER.scan(nested(1_000_000))


@pytest.mark.parametrize("where", ["meta_info.pairs", "choices.0.logprobs.content"])
def test_nesting_is_bounded_inside_a_wanted_list_too(where: str) -> None:
    deep = b"[" * 1_000_000
    item = b"[1,2," + deep if where.startswith("meta") else b'{"x":' + deep
    body = {
        "meta_info.pairs": b'{"meta_info":{"pairs":[' + item,
        "choices.0.logprobs.content": b'{"choices":[{"logprobs":{"content":[' + item,
    }[where]
    with pytest.raises(ValueError, match="less nesting"):
        SCANNER.scan(body)


@pytest.mark.parametrize("body", ["{}", bytearray(b"{}"), None])
def test_only_bytes_are_scanned(body: Any) -> None:
    with pytest.raises(TypeError):
        SCANNER.scan(body)


def test_an_error_repeats_nothing_of_the_document() -> None:
    with pytest.raises(ValueError, match=r"^expected a number at byte 30$") as caught:
        SCANNER.scan(b'{"meta_info":{"pairs":[[1,2],["secret",2]]}}')
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "wanted",
    [
        {"a": "nothing"},
        {"": "ids"},
        {"a..b": "ids"},
        {"a.": "ids"},
        {"a": "ids", "a.b": "ids"},
        {"a.b": "ids", "a": "ids"},
        {"ä": "ids"},
    ],
)
def test_a_path_or_kind_that_can_not_be_used_is_refused(wanted: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Scanner(wanted)


@pytest.mark.parametrize("body", [b"{}", b"[1,2]", b'"x"', b"null", b"-1.5e3", b" true "])
def test_a_document_without_anything_wanted_is_all_rest(body: bytes) -> None:
    columns, rest = SCANNER.scan(body)
    assert set(columns.values()) == {None}
    assert rest == body


def test_nothing_wanted_is_a_validator() -> None:
    assert Scanner({}).scan(b"[1, 2]") == ({}, b"[1, 2]")


def test_the_root_may_be_a_list() -> None:
    wanted: dict[str, str] = {"0.ids": "ids", "2": "floats"}
    scanner = Scanner(wanted)
    assert agree(b'[{"ids":[1]},{"ids":[2]},[-0.5]]', scanner, wanted)


def test_threads_share_a_scanner() -> None:
    bodies = [json.dumps({"ids": list(range(n))}).encode() for n in (10, 5000, 20000)]
    wrong: list[int] = []

    def read(body: bytes, size: int) -> None:
        for _ in range(30):
            column = SCANNER.scan(body)[0]["ids"]
            if column is None or column[0] is None or column[0].tolist() != list(range(size)):
                wrong.append(size)

    threads = [
        threading.Thread(target=read, args=(body, size))
        for body, size in zip(bodies, (10, 5000, 20000), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- ids to JSON -------------------------------------------------------------------------------


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=300))
@example([])
@example([-(2**31)] * 100)
def test_ids_are_written_as_json_reads_them(values: list[int]) -> None:
    encoded = encode_ids(np.array(values, dtype=np.int32))
    assert encoded == json.dumps(values, separators=(",", ":")).encode()


def test_ids_that_can_not_be_written_to_are_written_out() -> None:
    array = np.arange(3, dtype=np.int32)
    array.flags.writeable = False
    assert encode_ids(array) == b"[0,1,2]"


@pytest.mark.parametrize(
    "array",
    [
        np.arange(4, dtype=np.int64),
        np.arange(4, dtype=np.float32),
        np.arange(8, dtype=np.int32)[::2],
        np.zeros((2, 2), dtype=np.int32),
    ],
)
def test_only_a_vector_of_int32_is_written(array: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode_ids(array)
