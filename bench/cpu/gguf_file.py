"""A checkpoint as a GGUF file, for llama.cpp's programs.

GGUF's names and keys for LFM2 are those of llama.cpp's ``src/models/lfm2.cpp`` and of the package
``gguf``. Q8_0 and Q4_0 files are made by llama.cpp's own quantiser from the BF16 one.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0", "Q4_0": "MOSTLY_Q4_0"}
LONGEST = 900


class GGUFError(RuntimeError):
    """A GGUF file cannot be made: the reason, and the remedy."""


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


def write_vocabulary(writer: Any, config: dict[str, Any]) -> None:
    """Add a token ``t<id>`` for every id, since the server aborts without texts."""
    size = config["vocab_size"]
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("lfm2")
    writer.add_token_list([f"t{i}" for i in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def write_gguf(folder: Path, out: Path, kind: str = "BF16") -> None:
    """Write a checkpoint's weights as a GGUF file, of kind BF16 or Q8_0.

    In Q8_0 every matrix is, as llama.cpp's quantiser has it. The vocabulary is made up, for
    checkpoints of random weights have none: callers pass token ids, and ignore texts.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = read_safetensors(folder / "model.safetensors")
    kinds = config["layer_types"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, len(kinds))
    writer = gguf.GGUFWriter(out, "lfm2")
    writer.add_name(folder.name)
    writer.add_file_type(getattr(gguf.LlamaFileType, KINDS[kind]))
    write_vocabulary(writer, config)
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


def gguf_file(folder: Path, kind: str, quantiser: Path) -> Path:
    """Path of a checkpoint's GGUF file of a kind of ``KINDS``, made beside it where it is missing.

    ``quantiser`` is the program ``llama-quantize``. Without it BF16 and Q8_0 are written by the
    package ``gguf``. Raises GGUFError where the file cannot be made.
    """
    path = folder / f"{folder.name}-{kind}.gguf"
    if path.is_file():
        return path
    partial = path.with_suffix(".partial")
    try:
        if kind != "BF16" and quantiser.is_file():
            command = [quantiser, gguf_file(folder, "BF16", quantiser), partial, kind]
            subprocess.run(
                [str(word) for word in command],
                capture_output=True,
                text=True,
                check=True,
                timeout=LONGEST,
            )
        elif kind == "Q4_0":
            raise GGUFError(f"no {path.name}: there is no {quantiser}: run `make peers`")
        else:
            write_gguf(folder, partial, kind)
    except ImportError as error:
        raise GGUFError(f"no {path.name}: {error}: install the package gguf") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or error.stdout.strip() or "nothing").splitlines()[-1]
        raise GGUFError(f"no {path.name}: {quantiser.name} failed and said: {said}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise GGUFError(f"no {path.name}: {error}") from error
    partial.replace(path)
    return path
