"""The program that mends the head's input, on graphs that stand in for ONNX's."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from lfm2_fast.export.vendors import PROGRAMS


@pytest.fixture(scope="module")
def mend() -> Callable[[Any], str | None]:
    found = runpy.run_path(str(PROGRAMS / "mend_onnx.py"))["mend"]
    assert callable(found)
    return found


def graph(head: str) -> Any:
    def node(name: str, inputs: list[str], outputs: list[str]) -> Any:
        return SimpleNamespace(name=name, input=inputs, output=outputs)

    return SimpleNamespace(
        node=[
            node("/model/layers.0/ffn_layernorm/LayerNorm", ["x"], ["wrong", "", "", "sum"]),
            node("/model/layers.6/final_norm_layernorm/SkipLayerNorm", ["sum", "y"], ["right"]),
            node("/lm_head/Weight", [], ["w"]),
            node("/lm_head/MatMul", [head, "w"], ["middle"]),
            node("/lm_head/Cast", ["middle"], ["logits"]),
        ]
    )


def test_a_wrong_input_is_replaced(mend: Callable[[Any], str | None]) -> None:
    made = graph("wrong")
    assert mend(made) == "wrong"
    assert made.node[3].input == ["right", "w"]
    assert mend(made) is None


def test_a_graph_that_one_input_does_not_mend_is_refused(
    mend: Callable[[Any], str | None],
) -> None:
    made = graph("wrong")
    made.node[3].input.append("sum")
    with pytest.raises(ValueError, match="2 inputs lead into the head"):
        mend(made)
    del made.node[1]
    with pytest.raises(ValueError, match="0 nodes are the final norm"):
        mend(made)
