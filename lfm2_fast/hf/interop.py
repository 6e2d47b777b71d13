"""Bridges to transformers: models in memory, and its Auto classes."""

from __future__ import annotations

from typing import Any

from lfm2_fast.hf.causal_lm import Lfm2ForCausalLM, Lfm2Model
from lfm2_fast.hf.transformers_weights import fused_weights
from lfm2_fast.ops.cpu_threads import release_threads
from lfm2_fast.weights.fusion import HEAD


def from_transformers(
    model: Any,
    *,
    quantization: str | None = None,
    backend: str = "auto",
    max_length: int | None = None,
) -> Lfm2ForCausalLM | Lfm2Model:
    """Return our model of transformers' LFM2 model in memory, as it is now.

    Takes ``Lfm2ForCausalLM`` or ``Lfm2Model``. Tensors that both classes store in the same way are
    shared: embedding, head, norms, taps, biases, in_proj, out_proj and down_proj. Fused ones (q, k
    and v; gate and up) are copies, at the published sizes 46 to 53 % of the weights. With
    ``quantization`` all matrices are copies in that format. The call allocates only the copies and
    a few megabytes, so its peak of memory is ``model`` and the copies.

    ``model`` is not changed and stays usable. A later change in place affects both models if the
    tensor is shared, and only one if it was copied: after an edit, call this again. After ``model``
    is deleted, the weights are in memory once.

    Raises TypeError for another model, ValueError for one that is quantized, has an adapter or lies
    on several devices, and for options that ``load`` refuses.
    """
    ours, weights = fused_weights(model, quantization, backend, max_length)
    kind = Lfm2ForCausalLM if HEAD in model.state_dict() else Lfm2Model
    settings = getattr(model, "generation_config", None)
    made = kind(
        ours,
        weights,
        backend=backend,
        max_length=max_length,
        generation_config=None if settings is None else settings.to_dict(),
        name_or_path=getattr(model, "name_or_path", ""),
    )
    release_threads()  # as after ``load``
    return made


def register() -> None:
    """Make transformers' Auto classes give this package's models for LFM2 checkpoints.

    ``AutoModelForCausalLM`` and ``AutoModel`` then load them in every framework that uses those
    classes. ``unregister`` undoes it.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers import Lfm2Config as Theirs

    AutoModelForCausalLM.register(Theirs, Lfm2ForCausalLM, exist_ok=True)
    AutoModel.register(Theirs, Lfm2Model, exist_ok=True)


def unregister() -> None:
    """Give transformers' Auto classes their own LFM2 models again."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers import Lfm2Config as Theirs

    for auto in (AutoModelForCausalLM, AutoModel):
        auto._model_mapping._extra_content.pop(Theirs, None)
