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
    """Return the output of ``code`` in a new interpreter, which must succeed."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    assert done.returncode == 0
    return done.stdout


@pytest.mark.slow
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


@pytest.mark.slow
def test_import_adds_little_to_torchs() -> None:
    """A collection of torch's objects, which any import may set off, does not count."""
    code = """
import gc, json, sys, time, torch
gc.freeze()
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


def test_imported_packages_are_declared() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    declared = set(re.findall(r'^ +"(\w+)', listed, re.MULTILINE))
    # Of the extras "plot", "server", "ray" and "gguf": an error says which to install.
    optional = {"matplotlib", "fastapi", "llguidance", "prometheus_client", "pydantic"}
    optional |= {"starlette", "uvicorn", "gguf", "numpy", "ray", "pyarrow"}
    imported = set()
    package = [file for file in (ROOT / "lfm2_fast").rglob("*.py") if file.parent != VENDOR]
    for file in (*package, *(ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                imported.add(node.module.partition(".")[0])
    ours = {"lfm2_fast", *sys.stdlib_module_names}
    assert imported - ours - optional == declared


# Programs that run in the environments of vendors' exporters.
VENDOR = ROOT / "lfm2_fast" / "export" / "vendor"
# From left to right, as docs/architecture.md draws them: a room imports from those after it only.
ROOMS = "cli, cluster, export server, text, hf, engine, models, ops, cache weights".split(", ")
FILES = ["config", "config_values"]
RANK = {name: place for place, names in enumerate(ROOMS + FILES) for name in names.split()}


def modules() -> dict[str, ast.Module]:
    """Every file of the package by its dotted name, but those that import only by name.

    Programs of other environments are not among them.
    """
    folder = ROOT / "lfm2_fast"
    files = [file for file in folder.rglob("*.py") if not file.stem.startswith("__")]
    files = [file for file in files if file.parent != VENDOR]
    return {
        ".".join(file.relative_to(folder).with_suffix("").parts): ast.parse(
            file.read_text(encoding="utf-8")
        )
        for file in files
    }


def imported(tree: ast.AST) -> Iterator[str]:
    """Files of the package that a file imports anywhere, in functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (n.partition(".")[2] for n in names if n.partition(".")[0] == "lfm2_fast")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are absolute"
            top, _, rest = node.module.partition(".")
            if top == "lfm2_fast":
                names = [f"{rest}.{alias.name}".lstrip(".") for alias in node.names]
                yield from names if rest in RANK.keys() - {*FILES} or not rest else [rest]


def arrows() -> set[tuple[str, str]]:
    """Every pair of files of which the first imports the second."""
    every = modules()
    found = set()
    for name, tree in every.items():
        for other in imported(tree):
            if other.partition(".")[0] == "kernels":
                assert name == "ops.triton_ops", f"{name} imports a kernel"
            elif other in every:
                found.add((name, other))
            else:
                assert name.startswith(("cli.", "server.")), (
                    f"{name} imports {other!r}, which is not a file"
                )
    return found


def test_a_room_imports_from_its_right_only() -> None:
    for name, other in arrows():
        here, there = name.partition(".")[0], other.partition(".")[0]
        assert here == there or RANK[here] < RANK[there], f"{name} imports {other}"


def test_files_do_not_import_one_another_in_a_circle() -> None:
    left = arrows()
    while left:
        bottom = {other for _, other in left} - {name for name, _ in left}
        assert bottom, f"these import one another: {sorted(left)}"
        left = {(name, other) for name, other in left if other not in bottom}


def test_the_architecture_page_draws_these_rooms() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = page.partition("\n    cli -> ")[2].partition("\n")[0]
    rooms = [name.replace(" ", ", ") for name in ROOMS] + [f"{name}.py" for name in FILES]
    assert f"cli -> {drawn}" == " -> ".join(rooms)


def test_the_table_of_files_lists_each_file_of_the_package() -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    listed, room = set(), ""
    table = page.partition("| folder | file | holds |\n")[2].partition("\n\n")[0]
    for line in table.splitlines()[1:]:
        folder, files = (cell.strip() for cell in line.split("|")[1:3])
        room = folder.strip("`/") or room
        at = "" if room == "lfm2_fast" else f"{room}."
        listed |= {f"{at}{name}" for name in re.findall(r"`(\w+)\.py`", files)}
    assert {name for name in listed if not name.startswith("__")} == modules().keys()


def test_a_folders_own_file_holds_a_sentence_alone() -> None:
    for file in (ROOT / "lfm2_fast").glob("*/__init__.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree) and len(tree.body) == 1, file


def test_programs_of_other_environments_import_nothing_of_the_package() -> None:
    for file in VENDOR.glob("*.py"):
        assert not list(imported(ast.parse(file.read_text(encoding="utf-8")))), file.name


def test_kernels_import_kernels_alone() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        for other in imported(ast.parse(file.read_text(encoding="utf-8"))):
            assert other.partition(".")[0] == "kernels", file.name


@pytest.mark.slow
def test_a_checkout_lends_the_package_its_kernels_alone() -> None:
    code = """
import importlib.util, lfm2_fast
for name in ("setup", "lfm2_fast", "tests", "bench", "csrc", "docs"):
    assert importlib.util.find_spec(f"lfm2_fast.{name}") is None, name
import lfm2_fast.kernels.tiling
print(lfm2_fast.kernels.tiling.__name__)
"""
    assert python(code) == "lfm2_fast.kernels.tiling\n"


def test_public_names() -> None:
    assert set(lfm2_fast.__all__) <= set(dir(lfm2_fast))
    for name in lfm2_fast.__all__:
        assert getattr(lfm2_fast, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'lfm2_fast' has no attribute 'laod'"):
        getattr(lfm2_fast, "laod")  # noqa: B009  (a type checker knows it too)
