"""Presets: Liquid AI's recommended sampling for each member of the LFM2 family.

The values are from Liquid AI's model cards and documentation of 2026. They have none for base
models; "base" is this package's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lfm2_fast.hf.generation_args import resolve_args
from lfm2_fast.ops.sampling import NEUTRAL, SamplingParams

PRESETS: dict[str, dict[str, Any]] = {
    "lfm2": {"temperature": 0.3, "min_p": 0.15, "repetition_penalty": 1.05},
    "lfm2-math": {"temperature": 0.6, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.05},
    "lfm2-vl": {"temperature": 0.1, "min_p": 0.15, "repetition_penalty": 1.05},
    "lfm2.5": {"temperature": 0.1, "top_k": 50, "repetition_penalty": 1.05},
    "lfm2.5-thinking": {"temperature": 0.05, "top_k": 50, "repetition_penalty": 1.05},
    "lfm2.5-large": {"temperature": 0.2, "top_k": 80, "repetition_penalty": 1.05},
    "base": {"temperature": 0.8, "min_p": 0.05},
    "greedy": {},
}
FILTERS = ("temperature", "top_k", "top_p", "min_p")
SAMPLING = ("do_sample", *FILTERS, "repetition_penalty")

# A member of the family by its name: generation, the part before the size, the part after it.
_NAME = re.compile(r"\blfm(2(?:\.5)?)-(\w+-)?(\d+(?:\.\d+)?)([bm])\b([\w.-]*)", re.IGNORECASE)
_GREEDY = re.compile(r"-(tool|extract|rag|mt)\b", re.IGNORECASE)


def preset_of(name: str) -> str | None:
    """Return the preset for a checkpoint of this name (hub id or path), or None.

    >>> preset_of("LiquidAI/LFM2.5-1.2B-Thinking")
    'lfm2.5-thinking'
    """
    found = _NAME.search(name)
    if found is None:
        return None
    generation, kind, size, unit, rest = found.groups()
    rest = rest.lower()
    if (kind or "").lower() == "vl-":
        return "lfm2-vl"
    if _GREEDY.search(rest):
        return "greedy"
    if "-base" in rest:
        return "base"
    if "-math" in rest:
        return "lfm2-math"
    if "-thinking" in rest:
        return "lfm2.5-thinking"
    if generation == "2" or "-jp" in rest:
        return "lfm2"
    return "lfm2.5-large" if unit.lower() == "b" and float(size) > 2 else "lfm2.5"


def sampling(
    name: str,
    *,
    preset: str | None = None,
    file: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], str]:
    """Return the sampling arguments for ``generate``, and a phrase with their values and origin.

    ``given`` has the options that were set. A temperature of 0 means greedy; any other of FILTERS
    means sampling. Other values come from the first of these that exists: the given preset,
    ``file`` (the checkpoint's generation config), the preset for ``name``, greedy decoding. The
    phrase has the final values, with Hugging Face's defaults. Raises ValueError for an unknown
    preset, for options that contradict each other, and for values out of range.
    """
    asked = {key: value for key, value in (given or {}).items() if value is not None}
    if asked.get("temperature") == 0:
        del asked["temperature"]
        if asked.setdefault("do_sample", False):
            raise ValueError("temperature 0 is greedy decoding; leave --do-sample out")
    filters = [key for key in FILTERS if key in asked]
    if filters and not asked.setdefault("do_sample", True):
        raise ValueError(f"{filters[0]} has no effect on greedy decoding; leave one of them out")

    stored = {key: value for key, value in (file or {}).items() if key in SAMPLING}
    found = preset or preset_of(name)
    if preset is None and any(value is not None for value in stored.values()):
        base, why = stored, "the checkpoint's generation_config.json"
    elif found is not None:
        base, why = _preset(found), f"preset {found}"
    else:
        base, why = _preset("greedy"), "no preset fits the name"
    arguments = {**base, **asked}
    if not arguments.get("do_sample"):
        arguments.update(dict.fromkeys(FILTERS))
    if asked:
        why = f"{why}; changed by options" if found or stored else "as the options say"
    holds = resolve_args(arguments, None, stored, vocab_size=1).sampling
    return arguments, f"{described(holds)} ({why})"


def described(params: SamplingParams) -> str:
    """Write sampling parameters in words: "temperature 0.3, min_p 0.15"."""
    words = [] if params.do_sample else ["greedy"]
    for name in SAMPLING[1:]:
        value = getattr(params, name)
        if value != getattr(NEUTRAL, name):
            words.append(f"{name} {value:g}")
    return ", ".join(words) or "temperature 1"


def _preset(name: str) -> dict[str, Any]:
    """Return a preset as arguments for all filters. None switches a filter off."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    values = PRESETS[name]
    return {**dict.fromkeys(SAMPLING), "do_sample": bool(values), **values}
