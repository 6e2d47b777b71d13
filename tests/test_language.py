"""Language of the package, the kernels and the benchmarks: the first words of docstrings."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A docstring begins with a verb or a noun: CONTRIBUTING.md, "Language".
FORBIDDEN = re.compile(r"(What|Whether|Which|How|Where|True)\b")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("folder", ["lfm2_fast", "kernels", "bench"])
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    found, wrong = 0, []
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            found += text is not None
            if text is not None and FORBIDDEN.match(text):
                wrong.append(f"{file.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found and not wrong, "\n".join(wrong)
