"""Conversations: sound after any kind of end, and nothing run twice that the cache holds."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast
from lfm2_fast.cli.chat import converse, piped
from lfm2_fast.cli.terminal import Terminal, interruptible
from lfm2_fast.text.conversation import Answer, Conversation, stream_answer
from lfm2_fast.text.reply_parser import Delta

QUESTIONS = ["What is a generator?", "How do I create an index?", "What does it return?"]


@pytest.fixture(scope="module")
def model(tiny: Path) -> lfm2_fast.Lfm2ForCausalLM:
    return lfm2_fast.load(tiny, device="cpu", dtype="float32")


@pytest.fixture
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def conversation(model: lfm2_fast.Lfm2ForCausalLM, tokenizer: Any) -> Conversation:
    return Conversation(model, tokenizer, max_new_tokens=20)


def ignore(delta: Delta) -> None:
    """Show nothing."""


def after(tokens: int) -> Callable[[], bool]:
    """Return a function that is True from the call of that number on."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= tokens


def afresh(conversation: Conversation) -> str:
    """Return the greedy answer to the messages so far, without a cache."""
    ids = conversation._prompt()
    answer = stream_answer(
        conversation.model,
        conversation.tokenizer,
        ids,
        lambda text: None,
        max_new_tokens=conversation.max_new_tokens,
        arguments=conversation.arguments,
    )
    return answer.text


def ask(conversation: Conversation, message: str, **kwargs: Any) -> Answer:
    """Ask; what is shown is the answer, and it is that of a model without a cache."""
    shown: list[Delta] = []
    answer = conversation.ask(message, shown.append, **kwargs)
    assert "".join(delta.text for delta in shown).strip() == answer.text.strip()
    if not answer.stopped:
        said = conversation.messages.pop()
        assert answer.text == afresh(conversation)
        conversation.messages.append(said)
    return answer


def test_a_conversation_answers_as_if_afresh_and_runs_only_what_is_new(
    conversation: Conversation,
) -> None:
    before = 0
    for question in QUESTIONS:
        answer = ask(conversation, question)
        assert answer.kept_tokens >= before
        before = answer.prompt_tokens
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3


def test_a_stopped_answer_stays_as_far_as_it_got(conversation: Conversation) -> None:
    whole = ask(conversation, QUESTIONS[0]).text
    conversation.reset(None)
    answer = ask(conversation, QUESTIONS[0], stopped=after(5))
    assert answer.stopped and answer.timing.tokens == 5
    assert whole.startswith(answer.text) and 0 < len(answer.text) < len(whole)
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}
    following = ask(conversation, QUESTIONS[1])
    assert following.kept_tokens >= answer.prompt_tokens


@pytest.mark.parametrize("moment", ["first token", "later", "prompt"])
def test_after_an_exception_the_message_was_never_sent(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    ask(conversation, QUESTIONS[0])
    before = list(conversation.messages)
    tokens = iter(range(100))

    def interrupt(*args: Any, **kwargs: Any) -> bool:
        if moment != "later" or next(tokens) == 3:
            raise KeyboardInterrupt
        return False

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if moment == "prompt":
            patch.setattr(conversation.model.ops, "linear_add", interrupt)
        conversation.ask(QUESTIONS[1], ignore, interrupt)
    assert conversation.messages == before
    ask(conversation, QUESTIONS[1])


def test_a_cut_answer_says_so(conversation: Conversation) -> None:
    conversation.max_new_tokens = 3
    assert str(ask(conversation, QUESTIONS[0])).endswith("; cut at 3 tokens")
    conversation.max_new_tokens = 500
    assert not ask(conversation, QUESTIONS[0]).end


@pytest.mark.parametrize("ends", [False, True])
def test_only_an_end_token_is_no_cut(
    model: lfm2_fast.Lfm2ForCausalLM, tokenizer: Any, ends: bool
) -> None:
    """The text ends with a special token, where the budget ends too."""
    ids = tokenizer("What is a list?").input_ids
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        likeliest = model(torch.tensor([ids])).logits[0, -1].argmax()
    changed = lfm2_fast.load(model.name_or_path, device="cpu", dtype="float32")
    rows = changed.network.embed_tokens.weight
    rows[special] = 2 * rows[likeliest]
    arguments = {"eos_token_id": [special if ends else 5]}
    texts: list[str] = []
    answer = stream_answer(
        changed, tokenizer, ids, texts.append, max_new_tokens=1, arguments=arguments
    )
    assert (answer.text, answer.timing.tokens) == ("", 1)
    assert answer.end == ("" if ends else "cut at 1 tokens")


def test_arguments_without_effect_or_support(
    model: lfm2_fast.Lfm2ForCausalLM, tokenizer: Any
) -> None:
    """A setting that has no effect is warned of once; what is not supported is refused by name."""
    ids = tokenizer("What is a list?").input_ids
    refused: dict[str, Any] = {"logits_processor": []}
    with pytest.raises(TypeError, match="logits_processor"):
        stream_answer(model, tokenizer, ids, print, max_new_tokens=2, arguments=refused)
    arguments = {"seed": 3, "top_k": 5, "do_sample": False}
    with pytest.warns(UserWarning, match="top_k without do_sample") as seen:
        answer = stream_answer(
            model, tokenizer, ids, lambda text: None, max_new_tokens=2, arguments=arguments
        )
    assert (answer.end, len(seen)) == ("cut at 2 tokens", 1)
    ends = {"generation_config": {"eos_token_id": list(range(2, 4000)), "do_sample": False}}
    written: list[str] = []
    assert not stream_answer(
        model, tokenizer, ids, written.append, max_new_tokens=1, arguments=ends
    ).end


def test_a_full_context(tiny: Path, tokenizer: Any) -> None:
    model = lfm2_fast.load(tiny, device="cpu", dtype="float32", max_length=40)
    conversation = Conversation(model, tokenizer)
    conversation.arguments["eos_token_id"] = [5]
    answer = conversation.ask(QUESTIONS[0], ignore)
    assert answer.prompt_tokens + answer.timing.tokens == 40
    assert str(answer).endswith("; the context is full")
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="tokens fill the context of 40"):
        conversation.ask(QUESTIONS[1], ignore)
    assert conversation.messages == before


THINKING = """
{{- bos_token -}}
{%- for message in messages -%}
    {{- "<|im_start|>" ~ message.role ~ "\n" ~ message.content.split("</think>")[-1] -}}
    {{- "<|im_end|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\n<think>" -}}
{%- endif -%}
"""


def test_a_template_that_opens_the_thinking(
    model: lfm2_fast.Lfm2ForCausalLM, tokenizer: Any
) -> None:
    tokenizer.chat_template = THINKING
    conversation = Conversation(model, tokenizer, max_new_tokens=10)
    shown: list[Delta] = []
    before = 0
    for question in QUESTIONS:
        answer = conversation.ask(question, shown.append)
        # What the next prompt begins with, all but the opening marker, was not run again.
        assert answer.kept_tokens >= before
        before = answer.prompt_tokens - 1
        message = conversation.messages.pop()
        assert message["content"] == f"<think>{answer.text}</think>"
        assert answer.text == afresh(conversation)
        conversation.messages.append(message)
    assert {delta.kind for delta in shown} == {"reasoning"}
    answer = conversation.ask("Stopped while it thinks", ignore, after(3))
    assert str(answer).endswith("; stopped; the message is removed")
    assert len(conversation.messages) == 2 * len(QUESTIONS)


def test_a_tool_call_that_was_cut_off_stays_open_in_the_history(
    model: lfm2_fast.Lfm2ForCausalLM, tokenizer: Any
) -> None:
    tokenizer.chat_template = THINKING.replace("<think>", "<|tool_call_start|>")
    conversation = Conversation(model, tokenizer, max_new_tokens=5)
    shown: list[Delta] = []
    answer = conversation.ask(QUESTIONS[0], shown.append)
    assert answer.end == "cut at 5 tokens"
    assert conversation.messages[-1]["content"] == f"<|tool_call_start|>{answer.text}"
    assert [delta.kind for delta in shown] == ["text"]


def test_a_missing_template_is_named(model: lfm2_fast.Lfm2ForCausalLM, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    with pytest.raises(ValueError, match="the chat template refuses .*: system first"):
        Conversation(model, tokenizer).ask("Hello", ignore)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="tiny has no chat template"):
        Conversation(model, tokenizer)


def test_commands(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "What is a list?",
        "/help",
        "/system Be brief.",
        "/reset",
        "/nope x",
        "/etc/passwd is?",
    ]
    converse(conversation, Terminal(), [*lines, "/exit", "not read"])
    out, err = capsys.readouterr()
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    assert conversation.messages[:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "/etc/passwd is?"},
    ]
    assert len(out.splitlines()) == 2
    assert "/reset          start again" in err
    assert "a new conversation; system prompt: Be brief.\na new conversation\n" in err
    assert "there is no command /nope; /help lists them" in err
    assert err.count("first token after") == 2
    converse(conversation, Terminal(), ["/system"])
    assert conversation.messages == []


@pytest.mark.parametrize("moment", ["answer", "prompt"])
def test_interrupt_ends_a_conversation_without_a_terminal(
    conversation: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    def interrupted(message: str, show: Callable[[Delta], None], stopped: Any) -> Answer:
        if moment == "answer":
            assert not stopped()  # the answer has begun
        signal.raise_signal(signal.SIGINT)
        return real(message, show, stopped)

    real = conversation.ask
    monkeypatch.setattr(conversation, "ask", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        converse(conversation, Terminal(), QUESTIONS)
    assert capsys.readouterr().err.count("stopped") == 1


def test_messages_from_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n  \n two \nlast"))
    assert list(piped()) == ["one", " two ", "last"]


def test_the_first_interrupt_stops_and_the_second_breaks_off() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)  # nothing has come yet: there is nothing to stop
    with pytest.raises(KeyboardInterrupt), interruptible() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_seeds_repeat_a_conversation(model: lfm2_fast.Lfm2ForCausalLM, tokenizer: Any) -> None:
    def talk() -> list[str]:
        torch.manual_seed(3)
        arguments = {"do_sample": True, "temperature": 1.5}
        conversation = Conversation(model, tokenizer, max_new_tokens=10, arguments=arguments)
        return [conversation.ask(question, ignore).text for question in QUESTIONS]

    assert talk() == talk()
