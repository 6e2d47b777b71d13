"""Replies held to grammars: by random choice among what is allowed, and by the engine."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance")
import jsonschema

import lfm2_fast
from lfm2_fast.engine.engine import Engine
from lfm2_fast.engine.request import Event, Request
from lfm2_fast.ops.sampling import SamplingParams
from lfm2_fast.text.grammar import Grammar, GrammarCompiler
from lfm2_fast.text.grammar_mask import GrammarError, GrammarMask
from lfm2_fast.text.reply_parser import ReplyParser
from tests.batches import events_by_request

VOCAB, EOS = 4096, 7
START, END, THINK, THOUGHT = 10, 11, 14, 15
TURN = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab_size=VOCAB, eos=[EOS, 2])


@pytest.fixture(scope="module")
def xml(tokenizer: Any) -> Any:
    """A tokenizer whose template writes calls in XML between tokens."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ '<tool_call><function=' }}" + tokenizer.chat_template
    changed.add_tokens(["<tool_call>", "</tool_call>"])
    return changed


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return lfm2_fast.load(tiny, device="cpu", dtype=torch.float32)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def allowed(mask: GrammarMask, written: Sequence[int], vocab: int = VOCAB) -> list[int]:
    words = mask.allowed(written)
    if words is None:
        return list(range(vocab))
    bits = (words[:, None] >> torch.arange(32)) & 1
    return bits.view(-1)[:vocab].nonzero()[:, 0].tolist()


def walked(grammar: Grammar, seed: int, most: int = 400, vocab: int = VOCAB) -> list[int]:
    """Tokens chosen at random from those allowed, with haste to come to an end."""
    chance, mask, written = random.Random(seed), grammar(), []
    while len(written) < most:
        may = allowed(mask, written, vocab)
        assert may
        if EOS in may and chance.random() < 0.3 + len(written) / most:
            return written
        choices = [token for token in may if token not in (EOS, 2)] or may
        # Longer tokens come more seldom, and so do quotes within strings end them.
        written.append(chance.choice(choices))
        if written[-1] in (EOS, 2):
            return written[:-1]
    return []


SCHEMAS: list[Any] = [
    {"type": "object"},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -3, "maximum": 12},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100, "multipleOf": 7},
    {"type": "number", "minimum": 0.5, "maximum": 1.5},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "pattern": "^[a-c]{2}-[0-9]{3}$"},
    {"type": "string", "enum": ["red", "green", 'with "quotes"', "é\n"]},
    {"const": {"a": [1, None, "x"]}},
    {"enum": [1, "1", None, [1], True]},
    {"type": ["integer", "null", "boolean"]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False},
    {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3},
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "integer", "maximum": 9}},
        "required": ["b"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "additionalProperties": {"type": "null"},
        "required": ["a", "z"],
    },
    {
        "type": "object",
        "patternProperties": {"^x_": {"type": "boolean"}},
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
        "allOf": [{"$ref": "#/$defs/node"}],
        "additionalProperties": False,
    },
    {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "leaf": {"type": "boolean"},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                },
                "required": ["leaf"],
                "additionalProperties": False,
            }
        },
    },
    {
        "title": "Person",
        "description": "As pydantic writes it.",
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6, "title": "Name"},
            "age": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 150}, {"type": "null"}]},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2, "default": []},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
]


@pytest.mark.parametrize("place", range(len(SCHEMAS)))
def test_any_allowed_tokens_make_json_of_the_schema(
    compiler: GrammarCompiler, tokenizer: Any, place: int
) -> None:
    schema = SCHEMAS[place]
    grammar = compiler.json_schema(schema)
    done = 0
    for seed in range(6):
        if ids := walked(grammar, seed, 120):
            jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)
            done += 1
    assert done >= 2


def request_of(tokenizer: Any, text: str, grammar: Any, **more: Any) -> Request:
    sampling = SamplingParams(do_sample=True, temperature=more.pop("temperature", 1.0))
    more = {"max_tokens": 160, "eos": (EOS, 2), "seed": 0, "sampling": sampling, **more}
    return Request(ids_of(tokenizer, text), constraint=grammar, **more)


def tokens_of(events: Sequence[Event]) -> list[int]:
    assert [event.error for event in events if event.error] == []
    tokens = [event.token for event in events if event.token is not None]
    return tokens[:-1] if tokens and tokens[-1] in (EOS, 2) else tokens


def test_an_engines_replies_are_json_of_their_schemas(
    compiler: GrammarCompiler, tokenizer: Any, model: Any
) -> None:
    engine = Engine(model, max_rows=8)
    pairs = [(schema, seed) for schema in SCHEMAS for seed in (0, 1)]
    grammars = [compiler.json_schema(schema) for schema, _ in pairs]
    requests = [
        request_of(tokenizer, f"Say {n}: ", grammar, seed=seed)
        for n, ((_, seed), grammar) in enumerate(zip(pairs, grammars, strict=True))
    ]
    ended = 0
    for (schema, _), events in zip(pairs, events_by_request(engine, requests), strict=True):
        assert events[-1].finish_reason in ("stop", "length")
        if events[-1].finish_reason == "stop":
            jsonschema.validate(json.loads(tokenizer.decode(tokens_of(events))), schema)
            ended += 1
    assert ended > 0.8 * len(pairs)


def test_a_reply_is_the_same_in_any_batch_and_after_preemption(
    compiler: GrammarCompiler, tokenizer: Any, model: Any
) -> None:
    items = {"type": "integer", "minimum": 0, "maximum": 999}
    grammar = compiler.json_schema(
        {"type": "array", "items": items, "minItems": 16, "maxItems": 20}
    )
    held = [
        request_of(tokenizer, f"List {n}:" + " and so on" * 12, grammar, seed=n, max_tokens=150)
        for n in range(3)
    ]
    free = [request_of(tokenizer, f"Free {n}", None, seed=n, max_tokens=150) for n in range(2)]
    model = model.network if hasattr(model, "network") else model
    alone = [
        tokens_of(events_by_request(Engine(model, max_rows=1), [one])[0]) for one in (*held, *free)
    ]
    few = Engine(model, max_rows=5, pages=8)
    together = [tokens_of(events) for events in events_by_request(few, [*held, *free])]
    assert few.statistics.preemptions > 0
    assert together == alone
    for tokens in together[:3]:
        assert len(json.loads(tokenizer.decode(tokens))) >= 16


def test_each_continuation_of_a_request_has_its_own_mask(
    compiler: GrammarCompiler, tokenizer: Any, model: Any
) -> None:
    schema = {"type": "array", "items": {"enum": [10, 20, 30]}, "minItems": 4, "maxItems": 4}
    one = request_of(tokenizer, "Numbers: ", compiler.json_schema(schema), n=3, temperature=3.0)
    (events,) = events_by_request(Engine(model), [one])
    texts = []
    for index in range(3):
        own = [event for event in events if event.index == index]
        texts.append(tokenizer.decode(tokens_of(own)))
        jsonschema.validate(json.loads(texts[-1]), schema)
    assert len(set(texts)) > 1


def test_the_end_is_allowed_where_the_grammar_accepts_alone(compiler: GrammarCompiler) -> None:
    mask, written = compiler.regex("ab(cd)?")(), []
    for token in compiler.tokenizer("ab", add_special_tokens=False).input_ids:
        assert EOS not in allowed(mask, written)
        written.append(token)
    assert {EOS, 2} < set(allowed(mask, written))
    written += compiler.tokenizer("cd", add_special_tokens=False).input_ids
    assert set(allowed(mask, written)) == {EOS, 2}
    # It still is where an engine goes on behind the end.
    assert set(allowed(mask, [*written, EOS])) == {EOS, 2}


def test_a_mask_follows_from_what_was_written(compiler: GrammarCompiler) -> None:
    grammar = compiler.json_schema(SCHEMAS[15])
    tokens = walked(grammar, 1)
    mask = grammar()
    by_step = [allowed(mask, tokens[:n]) for n in range(len(tokens) + 1)]
    assert allowed(grammar(), tokens) == by_step[-1]
    # Back again, as after a preemption that took tokens back.
    for n in (3, 1, len(tokens), 0):
        assert allowed(mask, tokens[:n]) == by_step[n]


def test_too_early_an_end_gives_way_to_the_grammar(
    compiler: GrammarCompiler, tokenizer: Any, model: Any
) -> None:
    long = request_of(tokenizer, "a", compiler.regex("[ab]{1,40}"), min_tokens=12)
    short = request_of(tokenizer, "a", compiler.choice(["yes"]), min_tokens=12)
    first, second = events_by_request(Engine(model), [long, short])
    assert len([event for event in first if event.token is not None]) >= 12
    assert tokenizer.decode(tokens_of(second)) == "yes" and second[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("make", "matches"),
    [
        (lambda c: c.json_object(), r"(?s)\{.*\}"),
        (lambda c: c.regex(r"\d{3}-[x-z]+"), r"\d{3}-[x-z]+"),
        (lambda c: c.choice(["red", 'a "b"\n', "é"]), 'red|a "b"\n|é'),
        (lambda c: c.lark('start: word ("," word)*\nword: /[ab]{1,3}/'), r"[ab]{1,3}(,[ab]{1,3})*"),
        (lambda c: c.gbnf('root ::= "x" num\nnum ::= [0-9]{1,2}'), r"x[0-9]{1,2}"),
        (lambda c: c.ebnf('root ::= "x" | "yz"'), "x|yz"),
        (lambda c: c.ebnf('start: "x" | "yz"'), "x|yz"),
    ],
)
def test_other_grammars_hold_too(
    compiler: GrammarCompiler, tokenizer: Any, make: Callable[[Any], Grammar], matches: str
) -> None:
    grammar, done = make(compiler), 0
    for seed in range(5):
        if ids := walked(grammar, seed, 80):
            assert re.fullmatch(matches, tokenizer.decode(ids))
            done += 1
    assert done


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda c: c.json_schema("{"), "the JSON schema is not JSON: "),
        (lambda c: c.json_schema([1]), "the JSON schema must be an object, got list"),
        (lambda c: c.json_schema({"type": "objct"}), "JSON schema cannot be used: .*objct"),
        (lambda c: c.json_schema({"enum": {1, 2}}), "not JSON: .*set"),
        (lambda c: c.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (lambda c: c.json_schema({"$ref": "#/$defs/a"}), "'/\\$defs/a' does not exist"),
        (lambda c: c.json_schema({"$ref": "http://x/y"}), "http://x/y"),
        (lambda c: c.json_schema({"minimum": 5, "maximum": 3, "type": "integer"}), "minimum"),
        (lambda c: c.json_schema({"type": "string", "pattern": "(?=a)"}), "look-around"),
        (lambda c: c.json_schema({"const": "x" * 300_000}), "bytes; it may have at most 262144"),
        (lambda c: c.regex("(a"), "regular expression cannot be used: .*unclosed group"),
        (lambda c: c.regex(""), "the regular expression must be a text that is not empty, got ''"),
        (lambda c: c.regex(3), "must be a text that is not empty, got 3"),
        (lambda c: c.lark("start: nothing"), "Lark grammar cannot be used: .*nothing"),
        (lambda c: c.lark("x" * 300_000), "has 300000 bytes; it may have at most 262144"),
        (lambda c: c.gbnf("root ::= ("), "GBNF grammar cannot be converted to Lark"),
        (lambda c: c.gbnf('x ::= "a"'), "GBNF grammar cannot be converted to Lark: No 'root' rule"),
        (lambda c: c.choice([]), "a choice must be a list of texts that are not empty"),
        (lambda c: c.choice(["a", ""]), "a choice must be a list of texts that are not empty"),
        (lambda c: c.tools([]), "tools is empty"),
        (lambda c: c.tools([{"type": "function"}]), r"tools\[0\] must be a function with a name"),
        (lambda c: c.tools([tool("f")], "g"), "names 'g', which is not a tool here: f"),
        (
            lambda c: c.tools([tool("f", parameters=[1])]),
            "parameters of tool 'f' must be an object",
        ),
    ],
)
def test_wrong_grammars_are_named(
    compiler: GrammarCompiler, make: Callable[[Any], Grammar], says: str
) -> None:
    with pytest.raises(ValueError, match=f"(?s){says}"):
        make(compiler)


def test_depth_is_bounded(compiler: GrammarCompiler) -> None:
    schema: Any = {"type": "null"}
    for _ in range(20):
        schema = {"type": "array", "items": schema}
    compiler.json_schema(schema)
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="the JSON schema is more than 48 values deep"):
        compiler.json_schema(schema)
    with pytest.raises(ValueError, match="the JSON schema is not JSON|values deep"):
        compiler.json_schema('{"items":' * 100_000)


def test_a_schema_that_is_not_strict_is_enforced_where_it_can_be(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    schema = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2}
    grammar = compiler.json_schema({**schema, "maxItems": 3}, strict=False)
    ids = next(ids for seed in range(9) if (ids := walked(grammar, seed)))
    assert set(json.loads(tokenizer.decode(ids))) <= {1, 2}


def test_a_vocabulary_may_be_larger_than_the_tokenizers(tokenizer: Any) -> None:
    compiler = GrammarCompiler(tokenizer, vocab_size=5000, eos=[EOS, 2])
    may = allowed(compiler.regex("(?s:.*)")(), [], 5000)
    assert max(may) < VOCAB and EOS in may
    with pytest.raises(ValueError, match="eos has no tokens"):
        GrammarCompiler(tokenizer, vocab_size=5000, eos=[])


def test_a_mask_says_where_its_grammar_gave_up(compiler: GrammarCompiler) -> None:
    mask = compiler.choice(["yes"])()
    with pytest.raises(GrammarError, match="the grammar cannot continue: .*satisfy the grammar"):
        allowed(mask, [100])


def test_without_the_library_an_error_says_what_to_install(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (compiler.json_object, lambda: compiler.gbnf('root ::= "a"')):
        with pytest.raises(ImportError, match=r"pip install 'lfm2-fast\[server\]'"):
            make()


# Tool calls.


def tool(name: str, *, strict: bool = True, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "strict": strict, **more}}


def properties(*required: str, **given: Any) -> dict[str, Any]:
    return {"type": "object", "properties": given, "required": list(required)}


TOOLS = [
    tool("now"),
    tool("get.time", parameters={}),
    tool(
        "weather",
        parameters=properties(
            "city",
            city={"type": "string", "maxLength": 5},
            days={"type": "integer", "minimum": 1, "maximum": 3},
            metric={"type": "boolean"},
        ),
    ),
    tool(
        "pick",
        parameters=properties("from", **{"from": {"enum": ["a", "b]"]}, "to": {"type": "null"}}),
    ),
    tool("3d-x y", parameters=properties("a b", **{"a b": {"type": "boolean"}})),
    tool(
        "nested",
        parameters={
            **properties("one", one={"$ref": "#/$defs/One"}, more={"type": "array", "maxItems": 1}),
            "$defs": {"One": {"type": "object", "maxProperties": 0}},
        },
    ),
    tool(
        "any",
        parameters={"anyOf": [properties("a", a={"const": 1}), properties("b", b={"const": 2})]},
    ),
]


def calls_of(tokenizer: Any, ids: Sequence[int], text: str | None = "") -> list[tuple[str, Any]]:
    parser = ReplyParser(tokenizer, tools=True, thinking=None, prompt_ids=[], functions=TOOLS)
    deltas = [*parser.feed(ids), *parser.finish()]
    if text is not None:
        assert "".join(d.text for d in deltas if d.kind == "text") == text
    return [(d.name, json.loads(d.arguments)) for d in deltas if d.kind == "tool_call"]


def check_call(name: str, arguments: Any) -> None:
    function = next(t["function"] for t in TOOLS if t["function"]["name"] == name)
    jsonschema.validate(arguments, function.get("parameters") or {})


@pytest.mark.parametrize("kind", ["tokenizer", "xml"])
def test_required_calls_are_calls_of_the_tools(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    vocab = len(tokenizer)
    compiler = GrammarCompiler(tokenizer, vocab_size=vocab, eos=[EOS, 2])
    seen = set()
    for grammar, most in ((compiler.tools(TOOLS), 9), (compiler.tools(TOOLS, parallel=False), 1)):
        assert grammar is not None
        for seed in range(8):
            ids = walked(grammar, seed, 300, vocab)
            if ids:
                calls = calls_of(tokenizer, ids)
                assert 1 <= len(calls) <= (most if most == 1 else 99)
                for name, arguments in calls:
                    check_call(name, arguments)
                    seen.add(name)
    assert len(seen) >= 4


@pytest.mark.parametrize("kind", ["tokenizer", "xml"])
@pytest.mark.parametrize("place", range(len(TOOLS)))
def test_a_named_tool_is_called(kind: str, place: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    vocab, name = len(tokenizer), TOOLS[place]["function"]["name"]
    compiler = GrammarCompiler(tokenizer, vocab_size=vocab, eos=[EOS, 2])
    grammar = compiler.tools(TOOLS, name, parallel=False)
    assert grammar is not None
    done = 0
    for seed in range(4):
        if ids := walked(grammar, seed, 300, vocab):
            ((called, arguments),) = calls_of(tokenizer, ids)
            assert called == name
            check_call(name, arguments)
            done += 1
    assert done


def test_an_engine_calls_tools(compiler: GrammarCompiler, tokenizer: Any, model: Any) -> None:
    grammar = compiler.tools(TOOLS, "weather", parallel=False)
    requests = [request_of(tokenizer, f"{n}", grammar, seed=n, max_tokens=80) for n in range(4)]
    for events in events_by_request(Engine(model), requests):
        assert events[-1].finish_reason == "stop"
        ((name, arguments),) = calls_of(tokenizer, tokens_of(events))
        check_call(name, arguments)


def test_auto_leaves_text_free_up_to_the_start_marker(
    compiler: GrammarCompiler, tokenizer: Any
) -> None:
    grammar = compiler.tools(TOOLS, "auto")
    assert grammar is not None
    mask = grammar()
    text = ids_of(tokenizer, "Let me see. ")
    assert len(allowed(mask, text)) == VOCAB
    written = [*text, START]
    assert allowed(mask, written) == sorted(allowed(mask, written))
    opening = {tokenizer.decode([token])[0] for token in allowed(mask, written)}
    assert opening == {"["}
    written += ids_of(tokenizer, "[now()]")
    assert END in allowed(mask, written) and EOS not in allowed(mask, written)
    written.append(END)
    assert len(allowed(mask, written)) == VOCAB
    written += [*text, START]
    assert len(allowed(mask, written)) < VOCAB
    once = compiler.tools(TOOLS, "auto", parallel=False)
    assert once is not None
    may = allowed(once(), [START, *ids_of(tokenizer, "[now()]"), END])
    assert len(may) == VOCAB - 1 and START not in may


def test_grammars_begin_behind_thinking(compiler: GrammarCompiler, tokenizer: Any) -> None:
    grammar = compiler.choice(["yes"])
    prompt = ids_of(tokenizer, f"{TURN}<think>")
    mask = grammar.for_reply(prompt)()
    thought = ids_of(tokenizer, "so <think> it is")
    assert len(allowed(mask, thought)) == VOCAB
    assert EOS not in allowed(mask, [*thought, THOUGHT])
    assert EOS in allowed(mask, [*thought, THOUGHT, *ids_of(tokenizer, "yes")])
    # The model may open it itself where that is asked for, at the beginning alone.
    plain = ids_of(tokenizer, TURN)
    assert THINK not in allowed(grammar.for_reply(plain)(), [])
    mask = grammar.for_reply(plain, may_think=True)()
    assert THINK in allowed(mask, [])
    assert len(allowed(mask, [THINK])) == VOCAB
    assert len(allowed(mask, [THINK, THOUGHT])) < 20
    assert THINK not in allowed(mask, [THINK, THOUGHT])
    auto = compiler.tools(TOOLS, "auto")
    assert auto is not None
    mask = auto.for_reply(prompt)()
    assert len(allowed(mask, [START])) == VOCAB  # a mention in thinking
    assert len(allowed(mask, [START, THOUGHT, START])) < VOCAB


def test_auto_without_a_marker_token_enforces_nothing(tokenizer: Any) -> None:
    spelling = copy.deepcopy(tokenizer)
    spelling.chat_template = "<tool_call>"
    compiler = GrammarCompiler(spelling, vocab_size=VOCAB, eos=[EOS, 2])
    assert compiler.tools(TOOLS, "auto") is None
    grammar = compiler.tools(TOOLS, "now")
    assert grammar is not None
    ids = walked(grammar, 1)
    assert calls_of(spelling, ids)[0] == ("now", {})


def test_compiled_grammars_are_kept(compiler: GrammarCompiler) -> None:
    one, two = compiler.regex("abc"), compiler.regex("abc")
    assert one.matcher is two.matcher
    for n in range(80):
        compiler.regex(f"x{n}")
    assert compiler.regex("abc").matcher is not one.matcher
