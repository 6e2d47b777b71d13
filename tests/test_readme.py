"""README's code runs as it stands, on the small checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lfm2_fast

README = Path(__file__).resolve().parent.parent / "README.md"
BEFORE = """import lfm2_fast

lfm2_fast.register()  # from here on, transformers' Auto classes give this package's LFM2

"""


@pytest.mark.filterwarnings("ignore:temperature, min_p without do_sample=True")
def test_hugging_faces_example_runs_unchanged_or_with_one_line_changed(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After ``register``, with the short example's line of ``load``, and with transformers' class.

    The tokens are the same in float32, greedy. Both of ours draw the same in bfloat16 too.
    """
    text = README.read_text(encoding="utf-8")
    short, example = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert example.startswith(BEFORE)
    theirs = example.removeprefix(BEFORE)
    assert "lfm2_fast" not in theirs
    (changed,) = re.findall(r"^model = .*\n", short, re.MULTILINE)
    ours, count = re.subn(r"^model = .*\n", lambda _: changed, theirs, flags=re.MULTILINE)
    assert count == 1 and "lfm2_fast.load" in changed and "from_pretrained" not in changed

    def run(code: str, *replaced: tuple[str, str]) -> tuple[str, str]:
        for old, new in (("LiquidAI/LFM2-1.2B", tiny.as_posix()), ("=512", "=8"), *replaced):
            assert old in code
            code = code.replace(old, new)
        torch.manual_seed(0)
        names: dict[str, Any] = {"lfm2_fast": lfm2_fast}
        exec(code, names)
        return type(names["model"]).__module__.partition(".")[0], capsys.readouterr().out

    exact = (("bfloat16", "float32"), ("do_sample=True", "do_sample=False"))
    try:
        unchanged = [run(example), run(example, *exact)]
    finally:
        lfm2_fast.unregister()
    # With device_map, transformers asks for the package accelerate. What its version 5 returns from
    # the chat template is a mapping, which its own generate does not take.
    tensor = ("tokenize=True", "tokenize=True, return_dict=False")
    plain = run(theirs, *exact, (', device_map="auto"', ""), tensor)
    assert [name for name, _ in unchanged] == ["lfm2_fast"] * 2 and plain[0] == "transformers"
    assert unchanged == [run(ours), run(ours, *exact)]
    assert unchanged[1][1] == plain[1]
    assert "What is C. elegans?<|im_end|>" in plain[1]
    name, text = run(short)
    assert name == "lfm2_fast" and "What is C. elegans?<|im_end|>" in text
