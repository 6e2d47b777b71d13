"""``import lfm2_fast`` is quick, and enough to run a model where torch is all there is."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lfm2_fast

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *args: str | Path) -> str:
    """What ``code`` prints, run by a fresh interpreter that must succeed."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0
    return done.stdout


def test_runs_where_torch_and_safetensors_are_all_there_is(tiny: Path) -> None:
    code = """
import sys
absent = "triton transformers tokenizers huggingface_hub jinja2 rich tqdm typer"
sys.modules.update(dict.fromkeys(absent.split()))
import torch, lfm2_fast
model = lfm2_fast.load(sys.argv[1], device="cpu")
ids = torch.tensor([[1, 2, 3]])
assert model(ids).logits.isfinite().all()
print(model.generate(ids, max_new_tokens=4).tolist())
"""
    (row,) = json.loads(python(code, tiny))
    assert row[:3] == [1, 2, 3]
    assert 1 <= len(row[3:]) <= 4


def test_import_adds_little_to_torchs() -> None:
    code = """
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
from lfm2_fast import *
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))
"""
    seconds, modules, initialized = json.loads(python(code))
    assert seconds < 0.3  # 0.03 on an idle core
    assert not {"triton", "transformers", "huggingface_hub", "rich", "typer"} & set(modules)
    assert not initialized


def test_the_command_line_imports_no_torch() -> None:
    code = """
import sys
import lfm2_fast.__main__
print(lfm2_fast.__version__, sorted({"torch", "transformers", "rich"} & set(sys.modules)))
"""
    assert python(code) == f"{lfm2_fast.__version__} []\n"


def test_what_is_imported_is_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = set(re.findall(r'^ +"(\w+)', listed, re.MULTILINE))
    optional = {"matplotlib"}  # of the extra "plot"; who asks for a picture is told
    imported = set()
    for file in (*(ROOT / "lfm2_fast").glob("*.py"), *(ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                imported.add(node.module.partition(".")[0])
    ours = {"lfm2_fast", *sys.stdlib_module_names}
    assert imported - ours - optional == declared


# Found as they are called, above the file that calls.
LOOKED_UP = {
    ("model", "forward"),
    ("model", "generation"),
    ("ops", "ops_native"),
    ("ops", "ops_triton"),
}


def test_imports_go_down_the_architectures_list() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = text.partition("A file imports only from lines below its own:\n\n")[2].partition("\n\n")
    lines = [re.findall(r"\w+", line[20:]) for line in block[0].splitlines()]
    rank = {name: len(lines) - i for i, names in enumerate(lines) for name in names}
    files = {file.stem: file for file in (ROOT / "lfm2_fast").glob("[!_]*.py")}
    assert rank.keys() == files.keys()
    for name, file in files.items():
        for other, late in imported_from(ast.parse(file.read_text(encoding="utf-8"))):
            if other == "kernels":
                assert name == "ops_triton"
            elif other in files and (name, other) in LOOKED_UP:
                assert late, (name, other)
            elif other in files:
                assert rank[other] < rank[name], (name, other)
    for file in (ROOT / "kernels").glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert {other for other, _ in imported_from(tree)} <= {"kernels"}, file.name


def imported_from(tree: ast.AST, late: bool = False) -> Iterator[tuple[str, bool]]:
    """The files of the package that are imported, but for types, and whether in a function."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            top, _, rest = node.module.partition(".")
            if top == "lfm2_fast":
                names = [rest] if rest else [alias.name for alias in node.names]
                yield from ((name.partition(".")[0], late) for name in names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield from imported_from(node, late or isinstance(node, ast.FunctionDef))


def test_public_names() -> None:
    assert set(lfm2_fast.__all__) <= set(dir(lfm2_fast))
    for name in lfm2_fast.__all__:
        assert getattr(lfm2_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'lfm2_fast' has no attribute 'laod'"):
        getattr(lfm2_fast, "laod")  # noqa: B009  (a type checker knows it too)
