"""llama.cpp as an engine, through llama-cpp-python's C interface, and the files that it reads.

GGUF's names and keys for LFM2 are those of llama.cpp's ``src/models/lfm2.cpp`` and of the package
``gguf``. Q8_0 and Q4_0 files are made by llama.cpp's own quantiser from the BF16 one.
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.cpu.engines import installed, prompt

KINDS = {"BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Tensors of a bfloat16 file as uint16, mapped."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    whole = np.memmap(path, np.uint8, "r", 8 + size)
    found = {}
    for name, entry in header.items():
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        first, last = entry["data_offsets"]
        found[name] = whole[first:last].view(np.uint16).reshape(entry["shape"])
    return found


def write_gguf(folder: Path, out: Path, kind: str = "BF16") -> None:
    """Write a checkpoint's weights as a GGUF file without a vocabulary, of kind BF16 or Q8_0.

    In Q8_0 every matrix is, as llama.cpp's quantiser has it.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = read_safetensors(folder / "model.safetensors")
    kinds = config["layer_types"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, len(kinds))
    writer = gguf.GGUFWriter(out, "lfm2")
    writer.add_name(folder.name)
    writer.add_file_type(getattr(gguf.LlamaFileType, KINDS[kind]))
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(len(kinds))
    inner = tensors["model.layers.0.feed_forward.w1.weight"].shape[0]
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config["num_attention_heads"])
    heads = config["num_key_value_heads"]
    writer.add_head_count_kv([0 if kind == "conv" else heads for kind in kinds])
    writer.add_layer_norm_rms_eps(config["norm_eps"])
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_rope_freq_base(float(theta))
    writer.add_shortconv_l_cache(config["conv_L_cache"])
    for name, tensor in tensors.items():
        place = names.get_name(name, try_suffixes=(".weight",))
        assert place is not None, name
        if tensor.ndim == 2 and kind == "BF16":
            writer.add_tensor(
                place, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
            continue
        wide = (tensor.astype(np.uint32) << 16).view(np.float32)
        if tensor.ndim == 2:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(place, gguf.quants.quantize(wide, q8), raw_dtype=q8)
        else:  # norms and convolutions, which llama.cpp keeps in float32
            writer.add_tensor(place, wide.squeeze(1) if wide.ndim == 3 else wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp with weights of one kind: BF16, Q8_0 or Q4_0."""

    def __init__(self, kind: str) -> None:
        import gguf  # noqa: F401  (missing, it is said at once)
        import llama_cpp

        self.lib, self.kind, self.context = llama_cpp, kind, None
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()

    def file(self, folder: Path, kind: str) -> Path:
        """The GGUF file beside the checkpoint, made where it is not there yet."""
        path = folder / f"{kind}.gguf"
        if not path.is_file():
            partial = path.with_suffix(".partial")
            if kind == "BF16":
                write_gguf(folder, partial)
            else:
                base = self.file(folder, "BF16")
                params = self.lib.llama_model_quantize_default_params()
                params.ftype = getattr(self.lib, f"LLAMA_FTYPE_{KINDS[kind]}")
                made = self.lib.llama_model_quantize(
                    str(base).encode(), str(partial).encode(), ctypes.byref(params)
                )
                assert made == 0, f"llama.cpp could not make {path.name}"
            partial.replace(path)
        return path

    def load(self, folder: Path, threads: int) -> None:
        params = self.lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_mmap = False  # in memory of its own, which nobody takes back between turns
        self.threads = threads
        path = str(self.file(folder, self.kind)).encode()
        self.model = self.lib.llama_model_load_from_file(path, params)
        assert self.model, "llama.cpp could not load the file"
        vocab = self.lib.llama_model_get_vocab(self.model)
        self.size = self.lib.llama_vocab_n_tokens(vocab)

    def start(self, batch: int, context: int, room: int) -> float:
        self._open(batch, context + room)
        self.at = [0] * batch
        begin = time.perf_counter()
        self.tokens = [
            self._run([(token, row) for token in prompt(row, context)], [row])[0]
            for row in range(batch)
        ]
        return time.perf_counter() - begin

    def decode(self, steps: int) -> list[float]:
        times = [time.perf_counter()]
        rows = range(len(self.tokens))
        for _ in range(steps):
            self.tokens = self._run(list(zip(self.tokens, rows, strict=True)), rows)
            times.append(time.perf_counter())
        return np.diff(times).tolist()

    def logits(self, tokens: list[int], steps: int) -> np.ndarray:
        self._open(1, len(tokens) + steps)
        self.at = [0]
        found = []
        for _ in range(steps):
            self._run([(token, 0) for token in tokens], [0])
            found.append(self._last(-1).copy())
            tokens = [1]
        return np.stack(found)

    def _open(self, batch: int, length: int) -> None:
        wanted = (batch, length)
        if self.context is not None and self.wanted == wanted:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            self.lib.llama_free(self.context)
        params = self.lib.llama_context_default_params()
        params.n_ctx = batch * (-(-length // 256) * 256)
        params.n_seq_max = batch
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        params.no_perf = True
        self.wanted = wanted
        self.context = self.lib.llama_init_from_model(self.model, params)
        assert self.context, "llama.cpp could not make a context"

    def _run(self, tokens: list[tuple[int, int]], rows: Sequence[int]) -> list[int]:
        """Run ``(token, sequence)`` pairs; the likeliest next token of each of ``rows``."""
        for first in range(0, len(tokens), 2048):
            chunk = tokens[first : first + 2048]
            end = first + len(chunk) == len(tokens)
            batch = self.lib.llama_batch_init(len(chunk), 0, 1)
            batch.n_tokens = len(chunk)
            for i, (token, row) in enumerate(chunk):
                batch.token[i] = token
                batch.pos[i] = self.at[row]
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = row
                batch.logits[i] = end and i >= len(chunk) - len(rows)
                self.at[row] += 1
            code = self.lib.llama_decode(self.context, batch)
            self.lib.llama_batch_free(batch)
            assert code == 0, f"llama_decode returned {code}"
        count = len(rows)
        return [int(self._last(i - count).argmax()) for i in range(count)]

    def _last(self, index: int) -> np.ndarray:
        row = self.lib.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(row, (self.size,))

    def versions(self) -> dict[str, str]:
        return installed("llama_cpp_python", "gguf")
