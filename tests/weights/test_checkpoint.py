"""Checkpoints on disk: what loads, what is refused and how, memory while loading, saving."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lfm2_fast
from lfm2_fast import CheckpointError
from lfm2_fast.weights import checkpoint


def load(folder: Path, **kwargs: object) -> lfm2_fast.Lfm2ForCausalLM:
    return lfm2_fast.load(folder, **{"device": "cpu", **kwargs})


@pytest.fixture
def broken(random_checkpoint, tmp_path: Path) -> Path:
    """A copy of a good checkpoint for a test to spoil."""
    return shutil.copytree(random_checkpoint(), tmp_path / "checkpoint")


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder: Path) -> list[str]:
    """Split the one file of ``folder`` into three with an index; the file names."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    places = {key: names[i % 3] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: tensors[k] for k, at in places.items() if at == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    return names


def test_one_file_and_shards_give_the_same_model(random_checkpoint, broken: Path) -> None:
    shard(broken)
    whole = load(random_checkpoint()).state_dict()
    parts = load(broken).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_weights_share_large_pages(random_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses are side by side, so far as they fit, but each weight is a storage of its own."""

    def loaded() -> dict[str, torch.Tensor]:
        return load(random_checkpoint(), quantization="int8").state_dict()

    together = loaded()
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in together.values())
    places = sorted({(t.data_ptr(), t.nbytes) for t in together.values()})
    gaps = [after - at - size for (at, size), (after, _) in pairwise(places)]
    assert len(gaps) > 20 and all(0 <= gap < checkpoint.LINE for gap in gaps)
    monkeypatch.setattr(checkpoint, "AREA", 1 << 14)
    apart = loaded()
    assert all(torch.equal(together[name], apart[name]) for name in together)


def test_saving_over_shards_is_what_loads(broken: Path) -> None:
    shard(broken)
    model = load(broken)
    model.network.embedding_norm.weight.zero_()
    model.save_pretrained(broken)
    assert not load(broken).network.embedding_norm.weight.any()


def test_without_a_generation_config_the_config_tells_the_end(broken: Path) -> None:
    (broken / "generation_config.json").unlink()
    assert load(broken).generation_defaults() == {
        "bos_token_id": 1,
        "eos_token_id": 7,
        "pad_token_id": 0,
    }


def test_a_stored_head_that_is_the_embedding_is_tied(random_checkpoint, broken: Path) -> None:
    rewrite(broken, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    network = load(broken).network
    assert network.lm_head.weight is network.embed_tokens.weight
    assert network.config.tie_word_embeddings


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_separate_head_is_used_against_the_config(
    broken: Path, caplog, quantization: str | None
) -> None:
    """Hugging Face's class uses it too. vLLM had ignored it (vllm-project/vllm#51665)."""
    from transformers import AutoModelForCausalLM

    rewrite(broken, lambda t: t.update({"lm_head.weight": -t["model.embed_tokens.weight"]}))
    model = load(broken, dtype="float32", quantization=quantization)
    assert "lm_head.weight differs from the embedding" in caplog.text
    assert not model.config.tie_word_embeddings
    ids = torch.tensor([[1, 42, 38, 83]])
    theirs = AutoModelForCausalLM.from_pretrained(broken, dtype=torch.float32)
    expected = theirs(ids).logits
    error = (model(ids).logits - expected).abs().max()
    # Of the embedding in its place the error is twice the largest logit.
    assert error < (1e-4 if quantization is None else 0.5) * expected.abs().max()


def test_a_checkpoint_of_the_class_without_a_head_is_the_same_model(
    random_checkpoint, tmp_path: Path
) -> None:
    from transformers import Lfm2Model

    folder = random_checkpoint()
    Lfm2Model.from_pretrained(folder).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("model.") for name in names), "they are without a prefix"
    whole, base = load(folder).state_dict(), load(tmp_path).state_dict()
    assert all(torch.equal(whole[name], base[name]) for name in whole)


def test_a_tensor_under_both_names_is_refused(broken: Path) -> None:
    rewrite(broken, lambda t: t.update({W1.removeprefix("model."): torch.zeros(150, 96)}))
    with pytest.raises(CheckpointError, match=f"holds {W1.removeprefix('model.')}, which"):
        load(broken)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", torch.float16, "torch.float64"])
def test_dtypes(broken: Path, dtype: str | torch.dtype) -> None:
    rewrite(broken, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    name = "bfloat16" if dtype == "auto" else str(dtype).removeprefix("torch.")
    assert load(broken, dtype=dtype).dtype == getattr(torch, name)


def untold(folder: Path) -> Path:
    """``folder`` with a config that tells no dtype."""
    config = json.loads((folder / "config.json").read_text())
    told = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def test_without_a_dtype_in_the_config_the_weights_tell(broken: Path, pair) -> None:
    norms = "model.embedding_norm.weight"
    rewrite(broken, lambda t: t.update({k: v.bfloat16() for k, v in t.items() if k != norms}))
    theirs, _ = pair(untold(broken), dtype="auto")
    assert theirs.dtype == torch.bfloat16
    model = load(broken)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_without_a_dtype_in_the_config_8_bits_go_with_their_norms(broken: Path) -> None:
    load(broken, dtype="float16", quantization="int8").save_pretrained(broken)
    assert load(untold(broken)).dtype == torch.float16


W1 = "model.layers.0.feed_forward.w1.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda f: rewrite(f, lambda t: t.pop(W1)),
            f"lacks {W1}, which its config.json asks for",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({"lora_A": torch.zeros(2)})),
            "model.safetensors holds lora_A, which an LFM2 of this config does not have",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({W1: torch.zeros(3, 96)})),
            rf"model.safetensors: {W1} has shape \[3, 96\], but config.json asks for \[150, 96\]",
        ),
        (
            lambda f: rewrite(f, lambda t: t.update({W1: t[W1].to(torch.int8)})),
            f"{W1} is stored as I8, which the config.json does not mention",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-100]
            ),
            "model.safetensors is truncated or corrupt",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4000),
            "model.safetensors is truncated or corrupt",
        ),
        (
            lambda f: (f / "model.safetensors").write_bytes(b""),
            "model.safetensors is truncated or corrupt",
        ),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "holds neither model.safetensors nor model.safetensors.index.json",
        ),
        (
            lambda f: (f / shard(f)[1]).unlink(),
            "lacks model-00002-of-00003.safetensors, which model.safetensors.index.json names",
        ),
        (
            lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{}")),
            "index.json has no weight_map",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
        (
            lambda f: (f / "generation_config.json").write_text("{nonsense"),
            "generation_config.json is not valid JSON",
        ),
    ],
)
def test_spoiled_checkpoints_are_named(
    broken: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(broken)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(broken)
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "tpu9"}, ValueError, "device='tpu9' is not a device"),
        ({"device": "mps"}, ValueError, "device='mps' is not available"),
        ({"device_map": "auto", "device": "cpu"}, ValueError, "device or device_map, not both"),
        ({"device": ["cpu"]}, ValueError, r"device=\"\['cpu'\]\" is not a device"),
        ({"dtype": "float16", "torch_dtype": "float32"}, ValueError, "dtype or torch_dtype, not"),
        ({"dtype": "int8"}, ValueError, "dtype='int8' is not supported"),
        ({"dtype": 16}, ValueError, "dtype=16 is not supported"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"backend": "magic"}, lfm2_fast.BackendError, "backend='magic' is not"),
    ],
)
def test_bad_arguments_are_named(
    random_checkpoint, arguments: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load(random_checkpoint(), **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_named(random_checkpoint) -> None:
    with pytest.raises(ValueError, match="device='cuda' is not available.*use device='cpu'"):
        load(random_checkpoint(), device="cuda")


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_hugging_faces_other_names_are_taken(random_checkpoint, device_map) -> None:
    model = lfm2_fast.load(random_checkpoint(), device_map=device_map, torch_dtype=torch.float16)
    assert model.device == torch.device("cpu") and model.dtype == torch.float16
    with pytest.raises(ValueError, match="names parts of the model"):
        lfm2_fast.load(random_checkpoint(), device_map={"model": device_map, "lm_head": "cpu"})


@pytest.mark.parametrize(
    "name", ["no/such/folder", "./nowhere", "/nowhere", "~/nowhere", "~nosuchuser/x", "gpt2"]
)
def test_a_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"there is no folder '{re.escape(name)}'"):
        lfm2_fast.load(name)


def test_a_file_is_not_a_folder(random_checkpoint) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        lfm2_fast.load(random_checkpoint() / "config.json")


@pytest.mark.parametrize(
    "changed", [{}, {"tie_word_embeddings": False}, {"conv_bias": True, "conv_L_cache": 4}]
)
def test_hugging_face_reads_what_we_save(
    random_checkpoint, pair, tmp_path: Path, changed: dict
) -> None:
    folder = random_checkpoint(**changed)
    original, ours = pair(folder)
    ours.save_pretrained(tmp_path / "saved")
    theirs, again = pair(tmp_path / "saved")
    expected, found = original.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.arange(8, 40)[None]
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert theirs.generation_config.eos_token_id == original.generation_config.eos_token_id
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.slow
def test_a_full_disk_leaves_the_old_checkpoint_whole(random_checkpoint, tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the write fails midway."""
    model = load(random_checkpoint())
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    program = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import lfm2_fast
model = lfm2_fast.load({str(random_checkpoint())!r}, device="cpu")
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    model.save_pretrained({str(tmp_path)!r})
except OSError as error:
    sys.exit(f"OSError: {{error}}")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1 and "OSError: " in result.stderr, result.stderr
    assert "model.safetensors" in result.stderr
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*partial"))
    load(tmp_path)


@pytest.fixture(scope="module")
def sharded_350m(true_350m: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sharded")
    for file in true_350m.iterdir():
        (folder / file.name).symlink_to(file)
    shard(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "quantization", "most", "left"),
    [
        ("true_350m", None, 1.25, 1.05),
        pytest.param("true_350m", "int8", 0.8, 0.6, marks=pytest.mark.nightly),
        pytest.param("sharded_350m", "int8", 0.8, 0.6, marks=pytest.mark.nightly),
        ("sharded_350m", "int4", 0.5, 0.4),
    ],
)
def test_loading_takes_little_more_memory_than_the_model(
    folder, quantization, most, left, request: pytest.FixtureRequest
) -> None:
    """Peak and final memory, compared with the file in bf16; mapped parts of it count."""
    program = (
        "import sys, json, torch, lfm2_fast; from lfm2_fast.cli.machine_load import memory\n"
        "before = memory()['resident']\n"
        "options = json.loads(sys.argv[2])\n"
        "model = lfm2_fast.load(sys.argv[1], device='cpu', **options)\n"
        "after = memory()\n"
        "print(json.dumps([after[name] - before for name in ('peak', 'resident')]))"
    )
    arguments = (request.getfixturevalue(folder), json.dumps({"quantization": quantization}))
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    size = 2 * 354_483_968
    peak, resident = (taken / size for taken in json.loads(done.stdout))
    assert resident <= peak < most and resident < left, (peak, resident)
