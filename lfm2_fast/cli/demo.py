"""``lfm2-fast demo``: text from the small checkpoint in the package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

import lfm2_fast
from lfm2_fast.cli import options as opt

TINY = Path(lfm2_fast.__file__).parent / "tiny"


def demo(
    prompt: Annotated[
        str, typer.Argument(metavar="[PROMPT]", callback=opt.text, help="The text to continue.")
    ] = "The database server",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of new tokens.")] = 160,
    seed: Annotated[
        int, typer.Option(min=0, max=opt.MOST_SEED, help="Another seed draws another text.")
    ] = 0,
) -> None:
    """Continue a text with the small LFM2 that this package carries."""
    import torch

    from lfm2_fast.cli.session import Session, summary
    from lfm2_fast.cli.terminal import Terminal, interruptible
    from lfm2_fast.text.tokenizer import load_tokenizer

    terminal = Terminal()
    terminal.note("A small LFM2 continues a text. It imitates manuals and knows no facts.")
    folder = min(str(TINY), os.path.relpath(TINY), key=len)
    model, tokenizer = lfm2_fast.load(folder), load_tokenizer(folder)
    arguments = {
        "do_sample": True,
        "temperature": 0.5,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "eos_token_id": tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]),
    }
    session = Session(model, tokenizer, arguments)
    terminal.note(f"{summary(model)}\n")
    torch.manual_seed(seed)
    terminal.write(prompt, style="bold")
    with interruptible() as stopped:
        answer = session.continuation(prompt, terminal.write, max_new_tokens, stopped)
    terminal.write("\n")
    terminal.note(f"\n{answer}\nTo talk with it: lfm2-fast chat {folder}")
    if answer.stopped:
        raise typer.Exit(130)
