"""Connects the head of an ONNX model with the final norm, if the builder connected it elsewhere.

Imports nothing of the package. Usage: ``mend_onnx.py MODEL.onnx``. ONNX Runtime GenAI 0.18 takes
the first matrix with as many rows as the vocabulary for the head. If that is one of the first
layer's, the head gets that layer's norm. Prints the change.
"""

from __future__ import annotations

import sys
from typing import Any

HEAD, NORM = "/lm_head/", "/final_norm_layernorm/"


def mend(graph: Any) -> str | None:
    """Connect the head's first node with the output of the final norm. Return its old input.

    Return None if it had that output already. Raises ValueError if the graph has no final norm, or
    no head that one input connects.
    """
    norms = [node for node in graph.node if NORM in node.name]
    if len(norms) != 1:
        raise ValueError(f"{len(norms)} nodes are the final norm, by their names")
    norm = norms[0].output[0]
    head = [node for node in graph.node if HEAD in node.name]
    made = {name for node in head for name in node.output}
    # Inputs that some other node computes; weights and constants have no node, or no input.
    computed = {name for node in graph.node if node.input for name in node.output} - made
    places = [
        (node, place) for node in head for place, name in enumerate(node.input) if name in computed
    ]
    if len(places) != 1:
        raise ValueError(f"{len(places)} inputs lead into the head")
    ((node, place),) = places
    before = node.input[place]
    if before == norm:
        return None
    node.input[place] = norm
    return before


def main() -> None:
    import onnx

    (path,) = sys.argv[1:]
    model = onnx.load(path, load_external_data=False)
    before = mend(model.graph)
    if before is None:
        print("the head is connected with the final norm")
        return
    onnx.save(model, path)
    print(f"mended: the head was connected with {before}, and now is with the final norm")


if __name__ == "__main__":
    main()
