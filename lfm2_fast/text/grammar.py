"""Grammars of replies (JSON, a regex, Lark, calls of tools), compiled by llguidance."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from lfm2_fast.text.grammar_mask import GrammarMask, Phases
from lfm2_fast.text.markers import markers_of, open_passage, writes_xml
from lfm2_fast.text.tool_grammar import checked_schema, options, tools_grammar

# Largest text of a grammar in bytes.
MAX_BYTES = 1 << 18
# Limits: the work of a step (some 20 ms), and the states of a grammar's automaton (2 kB each).
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
# Number of newest compiled grammars to keep: agents send the same tools with every request.
KEPT = 64
SCHEMA = "the JSON schema"


@dataclass(frozen=True)
class Grammar:
    """Compiled grammar, for ``Request.constraint``: a call makes the mask of a continuation."""

    matcher: Any
    phases: Phases
    compiler: GrammarCompiler

    def __call__(self) -> GrammarMask:
        compiler = self.compiler
        matcher = self.matcher.deep_copy()
        return GrammarMask(matcher, self.phases, compiler.pool, compiler.vocab_size)

    def for_reply(self, prompt_ids: Sequence[int], *, may_think: bool = False) -> Grammar:
        """Return this grammar for the reply to a prompt.

        If the prompt opens thinking, the grammar begins after the thinking. With ``may_think`` the
        reply may open thinking itself.
        """
        compiler = self.compiler
        opened, _ = open_passage(compiler.tokenizer, prompt_ids, compiler.markers)
        closer = None
        if opened is not None and opened.kind == "thinking" and opened.id is not None:
            closer = compiler.thinking.get(opened.id)
        openers = compiler.thinking if may_think and opened is None else {}
        return replace(self, phases=replace(self.phases, closer=closer, openers=openers))


class GrammarCompiler:
    """Compiles grammars for one tokenizer; any thread may use it.

    ``vocab_size`` is that of the model's logits. ``eos`` are the tokens that end a reply. They are
    allowed where the grammar accepts the text so far. A grammar has at most 256 KiB of text, and a
    schema at most 48 levels. Methods raise ValueError, which names the fault, for a wrong grammar,
    and ImportError without llguidance.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, eos: Sequence[int]) -> None:
        if not eos:
            raise ValueError("eos has no tokens: a grammar needs one to end a reply with")
        self.tokenizer, self.vocab_size, self.eos = tokenizer, vocab_size, list(eos)
        self.markers = markers_of(tokenizer)
        ids = {marker.text: marker.id for marker in self.markers}
        pairs = {(m.id, ids[n.text]) for m in self.markers for n in self.markers if _pair(m, n)}
        # The tokens that open thinking, and those that close it.
        self.thinking = {a: b for a, b in pairs if a is not None and b is not None}
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="lfm2_fast grammar")
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def json_object(self) -> Grammar:
        """Return the grammar of any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Any, *, strict: bool = True) -> Grammar:
        """Return the grammar of JSON that is valid by ``schema``, an object or its text.

        Parts that cannot be enforced raise ValueError. Without ``strict`` they are ignored.
        """
        schema = checked_schema(schema, SCHEMA)
        return self._grammar("JSON schema", "json_schema", schema, overrides=options(strict))

    def regex(self, pattern: str) -> Grammar:
        """Return the grammar of texts that match a regular expression from end to end.

        Its syntax is that of Rust's regex crate: without look-around and backreferences.
        """
        return self._grammar("regular expression", "regex", pattern)

    def choice(self, texts: Sequence[str]) -> Grammar:
        """Return the grammar that allows exactly one of ``texts``."""
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"a choice must be a list of texts that are not empty, got {texts!r}")
        rules = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return self._grammar("choice", "lark", f"start: {rules}")

    def lark(self, text: str) -> Grammar:
        """Return the grammar of ``text``, in llguidance's dialect of Lark."""
        return self._grammar("Lark grammar", "lark", text)

    def gbnf(self, text: str) -> Grammar:
        """Return the grammar of ``text`` in GBNF, llama.cpp's form of BNF."""
        what = "GBNF grammar"
        _check_size(text, what)
        _library()
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            lark = gbnf_to_lark(text)
        except Exception as error:
            raise ValueError(f"the {what} cannot be converted to Lark: {error}") from error
        return self._grammar(what, "lark", lark)

    def ebnf(self, text: str) -> Grammar:
        """Return the grammar of a text in GBNF if it has "::=", or else in Lark."""
        return self.gbnf(text) if "::=" in text else self.lark(text)

    def tools(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str = "required",
        *,
        parallel: bool = True,
        answer: Any = None,
        strict: bool = True,
    ) -> Grammar | None:
        """Return the grammar of calls of ``tools``, as the model writes them.

        ``choice`` "required" asks for calls from the first token on. A tool's name asks for calls
        of that tool only. With "auto" text is free before the marker of calls; the grammar is None
        if this marker is not a token. Without ``parallel`` there is one call. The schemas of
        "strict" tools are enforced. Those of others are enforced as far as possible.

        With a schema ``answer``, an "auto" reply is calls or JSON of that schema, from the first
        token on; ``strict`` is that of ``json_schema``.
        """
        start, end = (marker for marker in self.markers if marker.kind == "call")
        auto = choice == "auto" and answer is None
        if auto and (start.id is None or end.id is None):
            return None
        lark = tools_grammar(
            tools,
            None if choice in ("auto", "required") else choice,
            (start, end),
            xml=writes_xml(self.tokenizer),
            parallel=parallel and not auto,
            answer=None if choice != "auto" or answer is None else checked_schema(answer, SCHEMA),
            strict=strict,
        )
        grammar = self._grammar("grammar of the tools", "lark", lark)
        if not auto:
            return grammar
        phases = Phases(start=start.id, end=end.id, again=parallel)
        return replace(grammar, phases=phases)

    def close(self) -> None:
        """End the threads that compute masks. A second call does nothing."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _grammar(self, what: str, kind: str, given: Any, **more: Any) -> Grammar:
        _check_size(given if kind != "json_schema" else json.dumps(given), what)
        library = _library()
        try:
            text: str = getattr(library.LLMatcher, f"grammar_from_{kind}")(given, **more)
        except ValueError as error:
            raise ValueError(f"the {what} cannot be used: {error}") from error
        with self._lock:
            matcher = self._compiled.get(text)
            if matcher is not None:
                self._compiled.move_to_end(text)
                return Grammar(matcher, Phases(), self)
            if self._vocabulary is None:
                from llguidance.hf import from_tokenizer

                self._vocabulary = from_tokenizer(self.tokenizer, self.vocab_size, self.eos)
        limits = library.LLParserLimits(**LIMITS)
        matcher = library.LLMatcher(self._vocabulary, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"the {what} cannot be used: {matcher.get_error().strip()[:500]}")
        with self._lock:
            self._compiled[text] = matcher
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return Grammar(matcher, Phases(), self)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(
            "grammars need llguidance, which is not installed: pip install 'lfm2-fast[server]'"
        ) from error
    return llguidance


def _pair(opener: Any, closer: Any) -> bool:
    """Return True if two markers open and close the same kind of thinking."""
    same = opener.kind == closer.kind == "thinking" and opener.partner == closer.partner
    return same and closer.closes and not opener.closes


def _check_size(text: Any, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the {what} must be a text that is not empty, got {text!r}")
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise ValueError(f"the {what} has {size} bytes; it may have at most {MAX_BYTES}")
