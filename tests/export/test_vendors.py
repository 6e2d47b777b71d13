from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lfm2_fast.config import Config
from lfm2_fast.export.rounding import Rounding
from lfm2_fast.export.vendors import ONNX, OPENVINO, group_of

PYTHON, SOURCE, MADE = Path("/env/bin/python"), Path("/in"), Path("/out/made")


@pytest.fixture(scope="module")
def config(tiny: Path) -> Config:
    return Config.from_file(tiny / "config.json")


def test_groups_divide_every_row(config: Config) -> None:
    assert (config.hidden_size, config.intermediate_size) == (192, 384)
    assert group_of(config, 128) == 64 and group_of(config, 32) == 32
    assert group_of(replace(config, intermediate_size=400), 128) == 16


@pytest.mark.parametrize(
    ("type", "options"),
    [
        ("f32", "--weight-format fp32"),
        ("f16", "--weight-format fp16"),
        ("int8", "--weight-format int8 --sym"),
        ("int4", "--weight-format int4 --sym --ratio 1.0 --group-size 64"),
    ],
)
def test_openvinos_command(config: Config, type: str, options: str) -> None:
    (command,) = OPENVINO.commands(PYTHON, SOURCE, MADE, type, config)
    program = f"{PYTHON} -m optimum.commands.optimum_cli export openvino --model {SOURCE}"
    task = "--task text-generation-with-past"
    assert " ".join(map(str, command)) == f"{program} {task} {options} {MADE}"
    assert OPENVINO.rounding("int4", config) == Rounding(4, 64, tables=8)
    assert OPENVINO.rounding("f32", config) is None


def test_onnxs_commands(config: Config) -> None:
    build, mend = ONNX.commands(PYTHON, SOURCE, MADE, "int4", config)
    words = " ".join(map(str, build))
    assert words.startswith(f"{PYTHON} -m onnxruntime_genai.models.builder -i {SOURCE} -o {MADE}")
    assert "-p int4 -e cpu" in words and "block_size=32" in words
    assert "algo_config=k_quant matmul_mixed_precision=last_matmul:int8" in words
    assert Path(mend[1]).is_file() and mend[2] == MADE / "model.onnx"
    assert ONNX.rounding("int4", config) == Rounding(4, 32, tables=8)
