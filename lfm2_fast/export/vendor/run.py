"""Runs an export in the environment of its runtime, for a process of this package.

Imports nothing of the package. Usage: ``run.py RUNTIME PATH DEVICE CONTEXT EXACT``. Each line of
stdin is a JSON object:

- ``{"op": "open"}`` opens the export, and answers with facts about the runtime;
- ``{"op": "feed", "ids": [...], "restart": bool, "all": bool}`` runs tokens after those before, or
  after none, and answers with logits: of every token, or of the last one.

An answer is a line of JSON. After the one of "feed" come ``rows * columns`` float32. An answer with
the key "error" says why there is no other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np


class OpenVINO:
    """Stateful OpenVINO model, as optimum-intel writes it.

    The device STATIC is the CPU with the static shapes that an NPU gets: the NPU's plugin makes
    them, and needs no NPU for it. It gives logits of the last token alone.
    """

    # Arithmetic of the file alone: no bfloat16, no integers in place of activations or the cache.
    EXACT = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    }
    # Static shapes: parts of the graph hand each other float32.
    EXACT_STATIC = {"NPUW_F16IC": "NO"}

    def __init__(self, folder: str, device: str, context: int, exact: bool) -> None:
        import openvino

        core = openvino.Core()
        devices = core.available_devices
        self.is_static = device in ("NPU", "STATIC")
        if device != "STATIC" and not any(name.startswith(device) for name in devices):
            raise LookupError(f"OpenVINO finds {', '.join(devices)} here, and no {device}")
        settings: dict[str, str] = dict(self.EXACT) if exact else {}
        if self.is_static:
            settings |= static_settings(context) | (self.EXACT_STATIC if exact else {})
        if device == "STATIC":
            settings["NPUW_DEVICES"] = "CPU"
        model = core.read_model(Path(folder) / "openvino_model.xml")
        self.names = {name for port in model.inputs for name in port.names}
        self.compiled = core.compile_model(model, "NPU" if self.is_static else device, settings)
        self.request = self.compiled.create_infer_request()
        self.length = 0
        found = "CPU" if device == "STATIC" else device
        self.facts = {
            "runtime": f"openvino {openvino.__version__.partition('-')[0]}",
            "device": core.get_property(found, "FULL_DEVICE_NAME"),
        }
        if self.is_static:
            self.facts["longest_prompt"] = longest_prompt(context)

    def feed(self, ids: list[int], restart: bool, every: bool) -> np.ndarray:
        if restart and self.length:
            # Static shapes know a new text by position_ids alone, which this model does not have.
            self.request = self.compiled.create_infer_request()
            self.length = 0
        end = self.length + len(ids)
        given = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "beam_idx": np.zeros(1, np.int32),
        }
        self.request.infer({name: given[name] for name in self.names})
        self.length = end
        logits = self.request.get_tensor("logits").data[0]
        return logits if every else logits[-1:]


def static_settings(context: int) -> dict[str, str]:
    """Return the settings with which the NPU's plugin makes all shapes static.

    Two of its defaults are wrong for LFM2. A prompt in chunks applies the mask of the first chunk
    to the convolutions of all. Transposed values give NaN.
    """
    prompt = longest_prompt(context)
    return {
        "NPU_USE_NPUW": "YES",
        "NPUW_LLM": "YES",
        "NPUW_LLM_MAX_PROMPT_LEN": str(prompt),
        "NPUW_LLM_MIN_RESPONSE_LEN": str(context - prompt),
        "NPUW_LLM_PREFILL_HINT": "STATIC",
        "NPUW_LLM_OPTIMIZE_V_TENSORS": "NO",
    }


def longest_prompt(context: int) -> int:
    """Return the tokens that a static shape has room for in one call."""
    return context // 2


class OnnxGenAI:
    """ONNX Runtime GenAI model, as its model builder writes it."""

    PROVIDERS = {"CPU": None, "GPU": "dml", "NPU": "qnn"}

    def __init__(self, folder: str, device: str, context: int, exact: bool) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        config = onnxruntime_genai.Config(folder)
        config.clear_providers()
        provider = self.PROVIDERS[device]
        if provider is not None:
            config.append_provider(provider)
        try:
            self.model = onnxruntime_genai.Model(config)
        except RuntimeError as error:
            if provider is None:
                raise
            raise LookupError(f"ONNX Runtime has no {device} by {provider} here: {error}") from (
                error
            )
        self.context = context
        self.generator: Any = None
        self.facts = {
            "runtime": f"onnxruntime-genai {onnxruntime_genai.__version__}",
            "device": self.model.device_type,
        }

    def feed(self, ids: list[int], restart: bool, every: bool) -> np.ndarray:
        if restart or self.generator is None:
            params = self.library.GeneratorParams(self.model)
            params.set_search_options(max_length=self.context, batch_size=1)
            self.generator = self.library.Generator(self.model, params)
        self.generator.append_tokens(np.array([ids], np.int32))
        if every:
            return np.array(self.generator.get_output("logits"), np.float32)[0]
        return np.array(self.generator.get_logits(), np.float32)[0]


class CoreML:
    """Program that coremltools converted, run by torch; Core ML itself runs on Apple's alone."""

    STATES = ("k_cache", "v_cache", "conv_cache")

    def __init__(self, folder: str, device: str, context: int, exact: bool) -> None:
        import torch

        self.torch = torch
        self.program = torch.jit.load(f"{folder}.program.pt")
        self.length = 0
        self.facts = {"runtime": f"torch {torch.__version__}", "device": "CPU"}

    def feed(self, ids: list[int], restart: bool, every: bool) -> np.ndarray:
        if restart:
            self.length = 0
            for name in self.STATES:
                getattr(self.program, name).zero_()
        begin, self.length = self.length, self.length + len(ids)
        shape = (1, 1, len(ids), self.length)
        mask = self.torch.full(shape, -1e4).triu(begin + 1)
        with self.torch.no_grad():
            given = self.torch.tensor([ids], dtype=self.torch.int32)
            logits = self.program(given, mask)[0].numpy()
        return logits if every else logits[-1:]


RUNTIMES = {"openvino": OpenVINO, "onnx": OnnxGenAI, "coreml": CoreML}


def main() -> None:
    runtime, path, device, context, exact = sys.argv[1:]
    # A terminal's Ctrl-C reaches this process too. The caller decides what it means, and the end of
    # stdin ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the libraries print goes to stderr, so that stdout has answers alone.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    opened: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        data = b""
        try:
            if asked["op"] == "open":
                opened = RUNTIMES[runtime](path, device, int(context), exact == "exact")
                answer: dict[str, Any] = opened.facts
            else:
                logits = opened.feed(asked["ids"], asked["restart"], asked["all"])
                data = np.ascontiguousarray(logits, np.float32).tobytes()
                answer = {"rows": logits.shape[0], "columns": logits.shape[1]}
        except Exception as error:
            kind = "" if type(error) is LookupError else f"{type(error).__name__}: "
            answer = {"error": f"{kind}{error}"}
        answers.write(json.dumps(answer).encode() + b"\n" + data)
        answers.flush()


if __name__ == "__main__":
    main()
