"""The tables of docs/usage/huggingface.md, the names in transformers' code, what is the same."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parents[2] / "docs" / "usage" / "huggingface.md"

IDS = torch.tensor([[1, 40, 41, 300, 7, 90], [1, 8, 9, 10, 11, 12]])


def table(title: str) -> dict[str, tuple[str, str]]:
    """Return what the page says of each name in the table under a title, and its note."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+?) \|(?: ([^|]*))?\|$", text, re.MULTILINE)
    return {
        name: (said, note.strip())
        for names, said, note in rows
        for name in re.findall(r"`(\w+)`", names)
    }


def names(title: str, *said: str) -> set[str]:
    """Return the names in a table of which the page says one of these words."""
    return {name for name, (word, _) in table(title).items() if word in said}


def parameters(function: Callable[..., Any]) -> set[str]:
    """Return the names of a function's parameters, without ``self``."""
    return set(inspect.signature(inspect.unwrap(function)).parameters) - {"self"}


def keywords_read(function: Callable[..., Any]) -> set[str]:
    """Return the names that a function takes out of its ``**kwargs``.

    A name may stand in the call, or in a list that is looped over. Raises AssertionError for one
    that stands elsewhere: it would be missed.
    """
    code = getattr(inspect.unwrap(function), "__code__")  # noqa: B009  (mypy: not of a Callable)
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    lists: dict[str, set[str]] = {}

    def strings(node: ast.expr) -> set[str] | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return {node.value}
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            found = [strings(each) for each in node.elts]
            return set().union(*(each or set() for each in found)) if all(found) else None
        return lists.get(node.id) if isinstance(node, ast.Name) else None

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            lists.setdefault(node.targets[0].id, set()).update(strings(node.value) or set())
    for node in ast.walk(tree):
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            lists.setdefault(node.target.id, set()).update(strings(node.iter) or set())
    read = set()
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr in ("pop", "get", "setdefault"):
                key, of = node.args[0], node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            key, of = node.slice, node.value
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
            key, of = node.left, node.comparators[0]
        if key is not None and isinstance(of, ast.Name) and of.id == "kwargs":
            found = strings(key)
            assert found, f"line {node.lineno}: {ast.unparse(node)} reads a name unknown here"
            read |= found
    return read


def same(ours: Any, theirs: Any) -> bool:
    """Equal; floats within 2e-5 of the largest, as float32 is compared everywhere here."""
    if isinstance(theirs, torch.Tensor):
        if not theirs.is_floating_point():
            return torch.equal(ours, theirs)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        return bool((ours - theirs).abs().max() <= 2e-5 * theirs.abs().max())
    if isinstance(theirs, tuple | list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs
