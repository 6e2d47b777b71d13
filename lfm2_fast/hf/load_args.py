"""Further arguments of Hugging Face's ``from_pretrained``: accepted or refused by name.

Model cards and frameworks pass them. An argument that cannot change a result is accepted; its
reason is beside it. An argument that could change a result is refused, with advice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

# Name -> the reason why no value of it changes anything here.
ACCEPTED = {
    "trust_remote_code": "nothing of a checkpoint is ever executed",
    "code_revision": "nothing of a checkpoint is ever executed",
    "attn_implementation": "attention is this package's own, with the same result",
    "experts_implementation": "the model has no experts",
    "low_cpu_mem_usage": "weights are always read straight to their place",
    "weights_only": "safetensors hold only weights",
    "disable_mmap": "files are mapped one tensor at a time",
    "max_memory": "the whole model lies on one device",
    "offload_folder": "nothing is offloaded",
    "offload_state_dict": "nothing is offloaded",
    "offload_buffers": "nothing is offloaded",
    "tqdm_class": "the progress bar is this package's own",
    "allow_all_kernels": "kernels are this package's own",
    "fusion_config": "projections are always fused",
    "_fast_init": "weights are never initialized and then replaced",
    "_from_auto": "it names the caller",
    "_from_pipeline": "it names the caller",
    "_commit_hash": "the commit is found by revision",
}
# Name -> its values without effect, and advice for the others.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_safetensors": ((True,), "lfm2_fast reads safetensors only"),
    "ignore_mismatched_sizes": ((False,), "every tensor must fit the config"),
    "output_loading_info": ((False,), "load() raises for what does not fit"),
    "state_dict": ((), "use lfm2_fast.from_transformers(model) for weights in memory"),
    "from_tf": ((False,), "lfm2_fast reads safetensors only"),
    "from_flax": ((False,), "lfm2_fast reads safetensors only"),
    "proxies": ((), "set the environment variable HTTPS_PROXY"),
    "mirror": ((), "set the environment variable HF_ENDPOINT"),
    "resume_download": ((True, False), "downloads always continue where they stopped"),
    "adapter_name": (("default",), "use adapter=, or load_adapter() of the loaded model"),
    "key_mapping": ((), "rename the tensors in the checkpoint"),
    "use_kernels": ((False,), "choose the implementation with backend="),
    "kernel_config": ((), "choose the implementation with backend="),
    "tp_plan": ((), "the model runs on one device"),
    "tp_size": ((), "the model runs on one device"),
    "device_mesh": ((), "the model runs on one device"),
    "distributed_config": ((), "the model runs on one device"),
}


# The same for ``save_pretrained``.
SAVE_ACCEPTED = {
    "token": "nothing is sent to the hub",
    "save_peft_format": "there is no adapter to save",
    "save_original_format": "tensors are always saved by their published names",
    "save_function": "safetensors are written",
}
SAVE_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "distributed_checkpoint": ((False,), "the model lies on one device"),
    "repo_id": ((), "upload the folder with the hub's own command"),
    "commit_message": ((), "upload the folder with the hub's own command"),
    "create_pr": ((False,), "upload the folder with the hub's own command"),
    "private": ((False,), "upload the folder with the hub's own command"),
}

Refused = Mapping[str, tuple[tuple[Any, ...], str]]


def check_load_args(given: Mapping[str, Any]) -> None:
    """Check arguments that ``load`` does not use; see ``_check``."""
    _check("load", given, ACCEPTED, REFUSED)


def check_save_args(given: Mapping[str, Any]) -> None:
    """Check arguments that ``save_pretrained`` does not use; see ``_check``."""
    _check("save_pretrained", given, SAVE_ACCEPTED, SAVE_REFUSED)


def _check(
    call: str, given: Mapping[str, Any], accepted: Mapping[str, str], refused: Refused
) -> None:
    """Log the arguments without effect.

    Raises ValueError for a value that is refused, TypeError for an unknown name.
    """
    for name, value in given.items():
        if name in accepted:
            if value:
                logger.info("%s=%r has no effect: %s", name, value, accepted[name])
        elif name in refused:
            neutral, advice = refused[name]
            if value is not None and value not in neutral:
                raise ValueError(f"{name}={value!r} is not supported by lfm2_fast: {advice}")
        else:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


def quantization_of(
    quantization: str | None, config: Any, load_in_8bit: bool | None, load_in_4bit: bool | None
) -> str | None:
    """Return the format that Hugging Face's spellings of quantization ask for.

    ``config`` is a quantization_config, an object or a mapping. bitsandbytes' 8 bits become "int8",
    its 4 bits "int4". Raises ValueError for other methods, and for arguments that contradict each
    other.
    """
    values: dict[str, Any] = {}
    if config is not None:
        values = dict(config) if isinstance(config, Mapping) else dict(config.to_dict())
        method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
        own = values.get("format") if method == "lfm2_fast" else None
        if (
            own is None
            and method != "bitsandbytes"
            and not (values.get("load_in_8bit") or values.get("load_in_4bit"))
        ):
            raise ValueError(
                f"quantization_config of method {method!r} is not supported by lfm2_fast: use "
                "quantization='int8' or 'int4'"
            )
        if own is not None:
            return _one(quantization, str(own))
    if load_in_4bit or values.get("load_in_4bit"):
        logger.warning(
            "4 bits are this package's own format int4, GGUF's Q4_0 beside an embedding and a head "
            "in int8, not bitsandbytes'"
        )
        return _one(quantization, "int4")
    if load_in_8bit or values.get("load_in_8bit"):
        logger.warning(
            "8 bits are this package's own format int8, a scale for each row, not bitsandbytes'"
        )
        return _one(quantization, "int8")
    return quantization


def _one(quantization: str | None, asked: str) -> str:
    if quantization not in (None, asked):
        raise ValueError(
            f"quantization={quantization!r} and quantization_config, which asks for {asked!r}, "
            "differ: give one"
        )
    return asked
