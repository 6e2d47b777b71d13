"""Stand-in for coremltools: notes what it is told to convert, in place of a package."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np

precision = SimpleNamespace(FLOAT32="float32")
target = SimpleNamespace(iOS18="iOS18")


class transform:
    class FP16ComputePrecision:
        def __init__(self, op_selector):
            square, mean, root, product = (
                SimpleNamespace(op_type=name, x=value("linear"), y=value("linear"))
                for name in ("mul", "reduce_mean", "rsqrt", "mul")
            )
            square.y = square.x
            sum = SimpleNamespace(op_type="add", x=value("reduce_mean"), y=value(None))
            assert not any(map(op_selector, (square, mean, sum, root))) and op_selector(product)

        def __str__(self):
            return "float16"


def value(made_by):
    return SimpleNamespace(op=made_by and SimpleNamespace(op_type=made_by))


class RangeDim:
    def __init__(self, lower_bound, upper_bound, default):
        assert lower_bound == default == 1
        self.upper_bound = upper_bound


class TensorType:
    def __init__(self, name=None, shape=None, dtype=None):
        self.name, self.shape, self.dtype = name, shape, np.dtype(dtype).name


class StateType:
    def __init__(self, wrapped_type, name):
        self.name, self.shape, self.dtype = name, wrapped_type.shape, wrapped_type.dtype


def convert(program, *, inputs, outputs, states, compute_precision, **options):
    assert options == {"minimum_deployment_target": "iOS18", "skip_model_load": True}
    for state in states:
        # A text begins with states of zeros, which coremltools does not take from the program.
        assert state.dtype == "float16" and not getattr(program, state.name).any()
        assert tuple(getattr(program, state.name).shape) == state.shape
    told = {each.name: each.dtype for each in (*inputs, *outputs)}
    told["precision"] = str(compute_precision)

    def save(path):
        Path(path).mkdir()
        (Path(path) / "told.json").write_text(json.dumps(told))

    return SimpleNamespace(save=save)
