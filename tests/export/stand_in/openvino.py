"""Stand-in for OpenVINO: a model gives the logits of a table, if it gets the table's tokens."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np

__version__ = "2026.0-stand-in"


class Core:
    available_devices = os.environ.get("STAND_IN_DEVICES", "CPU").split()

    def read_model(self, path):
        table = np.load(Path(path).with_name("table.npz"))
        names = ("input_ids", "attention_mask", "beam_idx")
        inputs = [SimpleNamespace(names={name}) for name in names]
        return SimpleNamespace(ids=table["ids"], logits=table["logits"], inputs=inputs)

    def compile_model(self, model, device, settings):
        static = settings.get("NPU_USE_NPUW") == "YES"
        assert device == ("NPU" if static else "CPU")
        if static:
            assert settings["NPUW_LLM_PREFILL_HINT"] == "STATIC"
            assert settings["NPUW_LLM_OPTIMIZE_V_TENSORS"] == "NO"
            on_cpu = settings.get("NPUW_DEVICES") == "CPU"
            assert on_cpu or "NPU" in self.available_devices
            # A proof's arithmetic is float32, and a device's is its own.
            assert (settings.get("INFERENCE_PRECISION_HINT") == "f32") == on_cpu
        return SimpleNamespace(create_infer_request=lambda: Request(model, static))

    def get_property(self, device, name):
        assert device in self.available_devices and name == "FULL_DEVICE_NAME"
        return f"Stand-in {device}"


class Request:
    def __init__(self, model, static):
        self.model, self.static, self.length = model, static, 0

    def infer(self, given):
        assert given["attention_mask"].shape == (1, self.length + given["input_ids"].shape[1])
        begin, self.length = self.length, given["attention_mask"].shape[1]
        table = self.model.ids[begin : self.length]
        if given["input_ids"][0].tolist() != table.tolist():
            raise RuntimeError("these tokens are not in the table")
        self.logits = self.model.logits[begin : self.length]

    def get_tensor(self, name):
        assert name == "logits"
        return SimpleNamespace(data=self.logits[None, -1:] if self.static else self.logits[None])
