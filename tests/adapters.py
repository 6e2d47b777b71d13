"""LoRA adapters made with PEFT on transformers' class, saved, and their logits there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

IDS = torch.tensor([[1, 40, 41, 200, 17, 5, 90, 33, 2, 64, 8]])
ALL = ["q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"]


@dataclass(frozen=True)
class Made:
    """A saved adapter with PEFT's logits of IDS: in float64, in float32, and the base's."""

    folder: Path
    exact: torch.Tensor
    plain: torch.Tensor
    base: torch.Tensor

    def check(self, logits: torch.Tensor) -> None:
        """Raise AssertionError unless ``logits`` are as near to the exact ones as PEFT's are.

        Twice PEFT's error in float32 is allowed, plus one rounding step, as for operations.
        """
        assert (self.exact - self.base).abs().max() > 0.01, "the adapter does nothing"
        error = (logits.double() - self.exact).norm()
        allowed = 2 * (self.plain.double() - self.exact).norm()
        allowed += torch.finfo(torch.float32).eps * self.exact.norm()
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def make_adapter(
    base: Path, folder: Path, *, seed: int = 0, also: tuple[str, ...] = (), **options: Any
) -> Made:
    """Save a random adapter of the checkpoint ``base``; ``also`` are words in names to change."""
    peft = pytest.importorskip("peft", reason="PEFT comes with the extra 'test'")
    from transformers import Lfm2ForCausalLM

    model = Lfm2ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        before = model(IDS).logits
    options = {"r": 4, "lora_alpha": 6, "target_modules": ALL, **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in name:
                parameter.copy_(0.2 * noise)
            elif any(word in name for word in ("modules_to_save", *also)):
                parameter.add_(0.1 * noise * (1 if parameter.dim() == 1 else parameter.std()))
        adapted.eval().save_pretrained(folder)
        # What was saved counts: PEFT does not save the biases that bias="lora_only" trains.
        model = Lfm2ForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        adapted = peft.PeftModel.from_pretrained(model, folder).eval()
        plain = adapted(IDS).logits
        exact = adapted.double()(IDS).logits
    return Made(folder, exact, plain, before)
