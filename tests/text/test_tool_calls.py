"""Tool calls read as data: what models write, what they write wrongly, and any text at all."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lfm2_fast.text.literals import LiteralError, LiteralReader
from lfm2_fast.text.tool_calls import Call, read_calls, written_calls
from lfm2_fast.text.xml_calls import read_xml_calls, written_xml_call

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.from_regex(r"[A-Za-z_]\w{0,8}", fullmatch=True)
CALLS = st.lists(
    st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3
)


def arguments(text: str, name: str = "f") -> Any:
    """The arguments of the only call in ``f(...)``, which must read as one."""
    calls, rest = read_calls(f"[{text}]")
    assert rest == [] and [each.name for each in calls] == [name]
    return json.loads(calls[0].arguments)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ('"Paris"', "Paris"),
        ("'Paris'", "Paris"),
        ("true", True),
        ("True", True),
        ("false", False),
        ("False", False),
        ("null", None),
        ("None", None),
        ("-3", -3),
        ("+5", 5),
        ("07", 7),
        ("1_000", 1000),
        ("0x1F", 31),
        ("-2.5e3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-1e999", -sys.float_info.max),
        ("9" * 5000, sys.float_info.max),
        ("[1, 'a', [True]]", [1, "a", [True]]),
        ("(1, 2)", [1, 2]),
        ("(1,)", [1]),
        ("()", []),
        ("(1)", 1),
        ("{1, 2}", [1, 2]),
        ("{}", {}),
        ('{"a": {"b": None}}', {"a": {"b": None}}),
        ("{1: 'x', True: 'y', None: 2.5}", {"1": "x", "true": "y", "null": 2.5}),
        ('"a\nb\tc\0d"', "a\nb\tc\0d"),
        (r'"a\nb\t\"c\" \\ \/ \x41 \u00e9 \101 \N{BULLET} \q"', 'a\nb\t"c" \\ / A é A • \\q'),
        (r'"\ud83d\ude00"', "😀"),
        (r'"\ud83d"', "\ufffd"),
        ('"one" "two"', "onetwo"),
        ('"""a "b" c"""', 'a "b" c'),
        ("r'a\\nb'", "a\\nb"),
        ("b'bytes'", "bytes"),
        ("u'text'", "text"),
        ("f'no {{placeholder}}'", "no {placeholder}"),
        ("'it's here'", "it's here"),
        ('"He said "hi" to me"', 'He said "hi" to me'),
        ('"He said "hi", then left"', 'He said "hi", then left'),
        ('["a "b" c", "d"]', ['a "b" c', "d"]),
        ('{"a "k" b": "c "d" e"}', {'a "k" b': 'c "d" e'}),
        ("'f(\"x\") and (y)'", 'f("x") and (y)'),
        ("'say <|tool_call_end|> ]'", "say <|tool_call_end|> ]"),
    ],
)
def test_a_value_is_read_as_what_it_says(written: str, meant: Any) -> None:
    read = arguments(f"f(x={written}, y=1)")
    assert read == {"x": meant, "y": 1}
    assert type(read["x"]) is type(meant)
    assert arguments(f"f(y=1, x = {written} , )") == {"x": meant, "y": 1}


@pytest.mark.parametrize("name", ["from", "class", "lambda", "None", "été", "_x1"])
def test_an_arguments_name_may_be_a_keyword(name: str) -> None:
    assert arguments(f"f({name}='a')") == {name: "a"}


@pytest.mark.parametrize("name", ["f", "Calendar.create", "a.b.c", "get-time", "mcp__x.get_y"])
def test_a_tools_name_may_be_dotted(name: str) -> None:
    assert arguments(f"{name}()", name) == {}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("", []),
        ("[]", []),
        (" [ ] ", []),
        ("f()", ["f"]),
        ("[f(), g(), f()]", ["f", "g", "f"]),
        ("[f()\n,\ng(),]", ["f", "g"]),
        ('[{"name": "f", "arguments": {"a": true}}, g()]', ["f", "g"]),
        ('{"name": "f", "parameters": {}}', ["f"]),
        ('[{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]', ["f"]),
        ('{"name": "f"}', ["f"]),
        ('{"name": "f", "arguments": null}', ["f"]),
    ],
)
def test_a_list_may_hold_any_number_of_calls(body: str, named: list[str]) -> None:
    calls, rest = read_calls(body)
    assert [each.name for each in calls] == named and rest == []


def test_json_arguments_keep_their_values() -> None:
    (one,), _ = read_calls('[{"name": "f", "arguments": "{\\"a\\": [1, null], \\"b\\": \\"é\\"}"}]')
    assert json.loads(one.arguments) == {"a": [1, None], "b": "é"}
    (one,), _ = read_calls("[f(**{'a': 1}, b=2)]")
    assert json.loads(one.arguments) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "bad",
    [
        "g(x=)",
        "g(x=1",
        "g(1)",
        "g(x=unknown)",
        "g(x=1 2)",
        "g(x=f'{y}')",
        "g(x=1+2)",
        "g(x=open('f'))",
        "g(x={(1, 2): 3})",
        "g(x={'a': 1, 2})",
        "g(x={1, 'a': 2})",
        "g(x='unclosed)",
        "g(x=" + "[" * 100 + "]" * 100 + ")",
        "g x=1)",
        "{'nome': 'g'}",
        "{'name': 'g', 'arguments': [1]}",
        "{'name': 'g', 'arguments': 'no'}",
        "g",
        "import os",
    ],
)
def test_a_bad_call_drops_no_sibling(bad: str) -> None:
    first, last = "a(x='1, (2')", 'c(y=["]", 2])'
    calls, rest = read_calls(f"[{first}, {bad}, {last}]")
    names = [each.name for each in calls]
    # An open bracket may hold all that follows. A quote without a second one opens no string.
    assert names == (["a"] if bad == "g(x=1" else ["a", "c"])
    assert len(rest) == 1 and rest[0].startswith(bad)
    assert read_calls(f"[{bad}]")[0] == []


def test_text_in_a_string_is_never_a_call() -> None:
    calls, _ = read_calls("""[write(text="x), rm(path='/'), ("), echo(text='a), rm(b=1')]""")
    assert [each.name for each in calls] == ["write", "echo"]
    calls, _ = read_calls("""[write(text=@"x), rm(path='/'), ("), echo()]""")
    assert [each.name for each in calls] == ["echo"]


@given(CALLS)
def test_written_calls_read_as_what_they_were(calls: list[tuple[str, dict[str, Any]]]) -> None:
    read, rest = read_calls(written_calls(calls))
    assert rest == []
    assert [(each.name, json.loads(each.arguments)) for each in read] == calls


@given(CALLS)
def test_python_writes_what_is_read(calls: list[tuple[str, dict[str, Any]]]) -> None:
    bodies = [f"{name}({', '.join(f'{k}={v!r}' for k, v in args.items())})" for name, args in calls]
    read, rest = read_calls(f"[{', '.join(bodies)}]")
    assert rest == []
    assert [(each.name, json.loads(each.arguments)) for each in read] == calls


PIECES = st.sampled_from(
    ["f(", ")", "x=", ",", "[", "]", "{", "}", '"', "'", '"""', "\\", "1", "True", ":", " ", "\n"]
    + ["f'", "{'name': 'f'}", "\\u12", "\\N{", "\0", "é", "<function=f>", "<parameter=x>", "**"]
    + ["</parameter>", "</function>", "-", ".", "e5", "_", "07", "a.b", "\ud800", "\\ud800"]
)


@example("\x1f")
@example(", \x1f,")
@given(st.lists(PIECES, max_size=30).map("".join) | st.text(max_size=30))
def test_any_text_gives_calls_or_text(text: str) -> None:
    for calls, rest in (read_calls(text), read_xml_calls(text)):
        assert all(isinstance(json.loads(each.arguments), dict) for each in calls)
        assert all(part.strip() for part in rest)
        # Commas only part the calls of a list, and so does any white space.
        if re.sub(r"[\s\[\],]", "", text) and not text.strip().startswith("["):
            assert calls or rest


@pytest.mark.parametrize("piece", ['"', "f(x='", 'f(x="a" b, ', "[", "(", "{", "\\", "f(), ", "1,"])
def test_long_text_is_read_in_a_short_time(piece: str) -> None:
    text = f"[f(x={piece * (100_000 // len(piece))}"
    began = time.process_time()
    read_calls(text)
    read_xml_calls(text)
    read_calls(text + "'\")]")
    assert time.process_time() - began < 2


def test_a_literal_says_where_it_ends() -> None:
    assert LiteralReader("  [1] rest").value(0) == ([1], 5)
    with pytest.raises(LiteralError, match="a value is missing at character 3") as caught:
        LiteralReader("[1 oops").value(3)
    assert caught.value.at == 3


XML = """
<function=get_weather>
<parameter=city>
Paris
 and "Rome"
</parameter>
<parameter=days>
3
</parameter>
<parameter=code>
42
</parameter>
<parameter=tags>
["a", true]
</parameter>
</function>
"""


def test_xml_values_follow_their_schemas() -> None:
    schema = {"properties": {"code": {"type": "string"}, "days": {"type": "integer"}}}
    read, rest = read_xml_calls(XML, {"get_weather": schema})
    (one,) = read
    assert rest == [] and one.name == "get_weather"
    assert json.loads(one.arguments) == {
        "city": 'Paris\n and "Rome"',
        "days": 3,
        "code": "42",
        "tags": ["a", True],
    }
    assert json.loads(read_xml_calls(XML)[0][0].arguments)["code"] == 42


def test_xml_is_read_where_its_ends_are_missing() -> None:
    cut = "<function=f><parameter=a>1<parameter=b>two</function><function=g></function>tail"
    read, rest = read_xml_calls(cut)
    assert read == [Call("f", '{"a": 1, "b": "two"}'), Call("g", "{}")] and rest == ["tail"]
    assert read_xml_calls('{"name": "f", "arguments": {"a": 1}}')[0] == [Call("f", '{"a": 1}')]


@given(NAMES, st.dictionaries(NAMES, st.text("ab c1\n\"'<", max_size=6), max_size=3))
def test_written_xml_reads_as_what_it_was(name: str, given: dict[str, str]) -> None:
    schema = {"properties": dict.fromkeys(given, {"type": "string"})}
    read, rest = read_xml_calls(written_xml_call(name, given), {name: schema})
    assert rest == [] and [each.name for each in read] == [name]
    assert json.loads(read[0].arguments) == given
