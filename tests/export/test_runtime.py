from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lfm2_fast.export.errors import ExportError
from lfm2_fast.export.runtime import Runtime


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    logits = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savez(tmp_path / "table.npz", ids=np.array([5, 6, 7, 8]), logits=logits)
    return tmp_path


def test_logits_come_back(environment: Path, folder: Path) -> None:
    python = environment / "bin" / "python"
    with Runtime(python, "openvino", folder, context=8) as runtime:
        assert runtime.facts["device"] == "Stand-in CPU"
        assert runtime.feed([5, 6], restart=True, every=True).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert runtime.feed([7]).tolist() == [[6, 7, 8]]
        assert runtime.feed([5, 6, 7], restart=True).tolist() == [[6, 7, 8]]
        with pytest.raises(ExportError, match="openvino refuses: .* not in the table"):
            runtime.feed([9])


def test_a_missing_device_says_what_is_there(environment: Path, folder: Path) -> None:
    python = environment / "bin" / "python"
    with pytest.raises(ExportError, match="OpenVINO finds CPU here, and no NPU"):
        Runtime(python, "openvino", folder, device="NPU", context=8)


def test_a_runtime_that_ends_is_quoted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of luck >&2\nexit 7\n")
    python.chmod(0o755)
    with pytest.raises(ExportError, match="ended with code 7: out of luck"):
        Runtime(python, "openvino", tmp_path, context=8)
