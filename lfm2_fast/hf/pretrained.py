"""Base class of Hugging Face's model classes: weights, config and caches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lfm2_fast.cache.kv_cache import Cache
from lfm2_fast.config import Config
from lfm2_fast.engine.model_runner import new_cache
from lfm2_fast.hf.adapters import AdapterMethods
from lfm2_fast.hf.compiling import is_own_method
from lfm2_fast.hf.configuration import FIELDS, Lfm2Config
from lfm2_fast.hf.drafter import DrafterMethods
from lfm2_fast.hf.load_args import check_load_args, check_save_args, quantization_of
from lfm2_fast.hf.loading import load_as
from lfm2_fast.hf.resizing import resized
from lfm2_fast.hf.saving import save
from lfm2_fast.hf.surface import PARTS, REFUSED_NAMES
from lfm2_fast.hf.workspace import Workspace
from lfm2_fast.models.lfm2 import Lfm2
from lfm2_fast.ops.base import Ops
from lfm2_fast.weights.formats import Projection
from lfm2_fast.weights.fusion import num_parameters, random_weights
from lfm2_fast.weights.hub import HUB_OPTIONS

INFERENCE = "lfm2_fast is for inference: train with transformers' class, and load the result"


class Lfm2PreTrainedModel(AdapterMethods, DrafterMethods):
    """LFM2 model, ready to run: ``network`` is LFM2 itself, ``config`` is for callers.

    ``config`` is any LFM2 config; the network is made from its present values. ``weights`` are the
    fused tensors of ``checkpoint.load_weights``; they are used without a copy. None means random
    ones. ``internal`` is the network's config, if it differs from ``config``. ``backend`` is one of
    ``ops.select.BACKENDS``. ``max_length`` limits the context in a cache of this model (default:
    the model's own limit).
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    model_tags: list[str] | None = None
    config_class = Lfm2Config
    # transformers' pipelines ask a model for this.
    input_modalities = "text"
    # Attributes of transformers' class: the model is on one device, runs no code of a checkpoint,
    # and cannot be trained.
    is_parallelizable = supports_gradient_checkpointing = is_gradient_checkpointing = False
    hf_quantizer: None = None

    def __init__(
        self,
        config: Any,
        weights: dict[str, torch.Tensor] | None = None,
        *,
        internal: Config | None = None,
        backend: str = "auto",
        max_length: int | None = None,
        generation_config: Any = None,
        name_or_path: str = "",
    ) -> None:
        super().__init__()
        if internal is None:
            internal = config if isinstance(config, Config) else Lfm2Config.of(config).to_internal()
        self.config = Lfm2Config.of(config)
        self._generation: Any = generation_config or {}
        self.name_or_path = name_or_path or self.config.name_or_path
        limit = internal.context_length
        self.max_length = min(max_length or limit, limit)
        if weights is None:
            dtype = getattr(torch, internal.dtype) if internal.dtype else torch.get_default_dtype()
            weights = random_weights(internal, dtype, torch.get_default_device())
        self.network = Lfm2(internal, weights, backend=backend)
        super().train(False)
        self.workspace = Workspace()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: Any = None,
        device: Any = "auto",
        dtype: Any = "auto",
        device_map: Any = None,
        torch_dtype: Any = None,
        max_length: int | None = None,
        backend: str = "auto",
        quantization: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        adapter_kwargs: Mapping[str, Any] | None = None,
        quantization_config: Any = None,
        load_in_8bit: bool | None = None,
        load_in_4bit: bool | None = None,
        generation_config: Any = None,
        **others: Any,
    ) -> Any:
        """Load a checkpoint as this class, with Hugging Face's arguments and ``load``'s.

        As with Hugging Face, the model is on the CPU without ``device_map`` or ``device``. Fields
        of the config may be given as arguments too. Raises as ``load`` does.
        """
        if model_args:
            raise TypeError(
                "from_pretrained() takes only the checkpoint by position: give other arguments "
                "by name"
            )
        if device == "auto" and device_map is None:
            device = "cpu"
        fields = {name: others.pop(name) for name in list(others) if name in FIELDS}
        asked = {name: others.pop(name) for name in list(others) if name in HUB_OPTIONS}
        asked["revision"] = asked.get("revision") or None
        if isinstance(config, str | os.PathLike):
            config = Lfm2Config.from_pretrained(config, **asked)
        if fields:
            source = config if config is not None else pretrained_model_name_or_path
            known = isinstance(source, str | os.PathLike)
            base = Lfm2Config.from_pretrained(source, **asked) if known else Lfm2Config.of(source)
            config = Lfm2Config.from_dict(base.to_dict(), **fields)
        return load_as(
            cls,
            pretrained_model_name_or_path,
            device=device,
            dtype="auto" if dtype is None else dtype,
            max_length=max_length,
            backend=backend,
            quantization=quantization_of(
                quantization, quantization_config, load_in_8bit, load_in_4bit
            ),
            adapter=adapter,
            adapter_kwargs=adapter_kwargs,
            config=config,
            generation_config=generation_config,
            device_map=device_map,
            torch_dtype=torch_dtype,
            hub_options=asked,
            others=others,
        )

    @classmethod
    def from_config(cls, config: Any, *, dtype: Any = None, **options: Any) -> Any:
        """Return a model with random weights, made of any LFM2 config.

        ``dtype`` replaces the config's, ``options`` are those of the class.
        """
        made = Lfm2Config.from_dict(Lfm2Config.of(config).to_dict())
        if dtype is not None:
            made.dtype = str(dtype).removeprefix("torch.")
        return cls(made, **options)

    @classmethod
    def _from_config(cls, config: Any, **options: Any) -> Any:
        """Return ``from_config``, as transformers' Auto classes call it."""
        known = {name: options.pop(name) for name in ("backend", "max_length") if name in options}
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        check_load_args(options)
        return cls.from_config(config, dtype=dtype, **known)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Projection:
        """Give the vocabulary ``new_num_tokens``, and return the embedding.

        New rows are the mean of the old ones, or random without ``mean_resizing``. Raises
        ValueError for quantized weights, and beside adapters.
        """
        if len(self.network.adapters):
            raise ValueError(
                "resize_token_embeddings() needs a model without adapters: call unload_adapter() "
                "for each of them first"
            )
        made = resized(self.network, new_num_tokens, pad_to_multiple_of, mean=mean_resizing)
        # With their hooks.
        made.layers = self.network.layers
        self.network = made
        self.config.vocab_size = made.config.vocab_size
        self.workspace = Workspace()
        return self.network.embed_tokens

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> Lfm2PreTrainedModel:
        super()._apply(fn, recurse)
        # Captured graphs point at the weights as they were.
        self.workspace = Workspace()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if is_own_method(self, name, value):
            # Setting the class's own method, compiled or not, removes an earlier replacement.
            self.__dict__.pop(name, None)
            return
        # torch's Module would keep a module beside the property of that name, and use neither.
        if isinstance(value, nn.Module) and hasattr(type(self), name):
            raise AttributeError(f"{name} cannot be replaced: {PARTS}")
        super().__setattr__(name, value)

    def compile(self, *_: Any, **__: Any) -> None:
        """Do nothing: the kernels are compiled already."""

    def __getattr__(self, name: str) -> Any:
        # Called for a missing name: a part of the module, or a name of Hugging Face's class.
        if name in REFUSED_NAMES:
            raise AttributeError(f"{name} is not supported by lfm2_fast: {REFUSED_NAMES[name]}")
        return super().__getattr__(name)

    @classmethod
    def can_generate(cls) -> bool:
        """Return True for the class that has ``generate``."""
        return hasattr(cls, "generate")

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Do nothing: attention is this package's own, with the same result."""

    def set_experts_implementation(self, experts_implementation: Any) -> None:
        """Do nothing: the model has no experts."""

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Note words about the model; they are kept in ``model_tags``."""
        given = [tags] if isinstance(tags, str) else tags
        self.model_tags = sorted({*(self.model_tags or ()), *given})

    def train(self, mode: bool = True) -> Lfm2PreTrainedModel:
        """Do nothing for ``mode=False``. Raises RuntimeError else: this is for inference."""
        if mode:
            raise RuntimeError(f"train() is not supported: {INFERENCE}")
        return self

    @property
    def vocab_size(self) -> int:
        """Number of tokens: rows of the embedding and of the head."""
        return self.network.config.vocab_size

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations and of the cache; quantized weights have their own."""
        return self.network.dtype

    @property
    def ops(self) -> Ops:
        """Operations that the network runs on."""
        return self.network.ops

    @property
    def base_model(self) -> Any:
        """Model without its head."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def generation_config(self) -> Any:
        """Checkpoint's generation parameters, as transformers' GenerationConfig."""
        if isinstance(self._generation, dict):
            from transformers import GenerationConfig

            self._generation = GenerationConfig.from_dict(self._generation)
        return self._generation

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._generation = {} if value is None else value

    def generation_defaults(self) -> dict[str, Any]:
        """Return the generation parameters as a mapping, without a need for transformers."""
        found = self._generation
        return found if isinstance(found, dict) else found.to_dict()

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters, a tied head counted once; none of them is trainable."""
        if only_trainable:
            return 0
        config = self.network.config
        embedding = config.vocab_size * config.hidden_size if exclude_embeddings else 0
        return num_parameters(config) - embedding

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the weights, a tied head counted once."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    def get_input_embeddings(self) -> Projection:
        """Return the embedding: ``weight [V, H]``, called with ids it gives their rows."""
        return self.network.embed_tokens

    def get_output_embeddings(self) -> Projection | None:
        """Return the head: ``weight [V, H]``."""
        return self.network.lm_head

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Make the head the embedding, if the network's config says that they are one."""
        self.network.tie_weights()

    def get_decoder(self) -> Any:
        """Return the model without its head."""
        return self.base_model

    def new_cache(self, slots: int, max_length: int | None = None, *, spare: int = 1) -> Cache:
        """Return an empty cache for ``slots`` sequences of at most ``max_length`` tokens each.

        ``spare`` is the number of tokens that ``rollback`` must be able to remove. If steps are
        captured, the cache has two additions. Several sequences that run together get a dummy slot.
        Each slot has one more conv row, for the step that is running when a text ends.
        """
        limit = min(max_length or self.max_length, self.max_length)
        return new_cache(self.network, slots, limit, spare=spare)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        *,
        safe_serialization: bool = True,
        **others: Any,
    ) -> None:
        """Write a checkpoint that Hugging Face loads, equal tensor for tensor.

        Shards are at most ``max_shard_size`` bytes ("2GB"). ``state_dict`` replaces the weights, by
        Hugging Face's names. ``variant`` is a word in the names of the weights' files. Raises
        ValueError for what is not supported, naming it, and while an adapter is active.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False is not supported: safetensors are written")
        if push_to_hub:
            raise ValueError("push_to_hub=True is not supported: upload the folder yourself")
        check_save_args(others)
        active = self.network.adapters.active
        if active is not None and state_dict is None:
            raise ValueError(
                f"save_pretrained() would write the weights without the active adapter "
                f"{active.name!r}: load the model with adapter= to save it merged, or call "
                "set_adapter(None) to save the base"
            )
        if not is_main_process:
            return
        names = ("pad_token_id", "bos_token_id", "eos_token_id", "use_cache")
        save(
            Path(save_directory),
            self.network,
            # Fields of the config on which no weight depends, as callers have set them.
            {name: getattr(self.config, name) for name in names},
            self.generation_defaults(),
            state_dict,
            variant=variant,
            max_shard_size=max_shard_size,
        )
