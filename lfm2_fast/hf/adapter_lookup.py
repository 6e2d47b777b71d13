"""Adapter to merge while a checkpoint loads, and the weights below it: found by their names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm2_fast.weights import hub
from lfm2_fast.weights.adapter import holds_adapter, is_adapter
from lfm2_fast.weights.adapter_hub import ADAPTER_OPTIONS, find_adapter

# Name in ``adapter_kwargs`` of the adapter that transformers' Auto classes have found.
FOUND = "_adapter_model_path"
# Options that say where the adapter is.
PLACE = {"revision", "subfolder", "cache_dir"}


def adapter_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return Hugging Face's ``adapter_kwargs`` as options of ``find_adapter``.

    Raises ValueError for a name that is none of them, if it has a value.
    """
    options = {name: value for name, value in (given or {}).items() if value not in (None, "")}
    if unknown := sorted(options.keys() - {*ADAPTER_OPTIONS, FOUND}):
        name = unknown[0]
        raise ValueError(
            f"adapter_kwargs={{{name!r}: {options[name]!r}}} is not supported by lfm2_fast: of "
            "adapters it takes " + ", ".join(ADAPTER_OPTIONS)
        )
    return options


def find_adapter_and_base(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None,
    hub_options: Mapping[str, Any],
    adapter_kwargs: Mapping[str, Any] | None = None,
    *,
    from_auto: bool = False,
) -> tuple[Path | None, Path]:
    """Return the folder of the adapter to merge, or None, and that of the weights below it.

    ``adapter`` names one. Without it, the adapter is the one in ``model``, if there is one. Its
    base is ``model`` itself, if that is a local folder with weights, or the base that it names.
    ``hub_options`` are those of ``find_checkpoint``. ``adapter_kwargs`` replace them for the
    adapter, whose revision and subfolder are its own. ``from_auto`` says that one of transformers'
    Auto classes calls. Raises CheckpointError, and ValueError for two adapters.
    """
    own = adapter_options(adapter_kwargs)
    found = own.pop(FOUND, None)
    if from_auto and found is None and own.get("revision") == hub_options.get("revision"):
        # They add the checkpoint's revision, which is no choice of an adapter.
        own.pop("revision", None)
    if adapter is not None and found is None:
        folder = hub.find_checkpoint(model, **hub_options)
        if holds_adapter(folder):
            raise _two_adapters(folder, adapter)
        return find_adapter(adapter, **_options_of(hub_options, own)), folder
    if found is not None:
        if adapter is not None:
            raise _two_adapters(found, adapter)
        folder = find_adapter(found, **_options_of(hub_options, own))
        return folder, hub.find_checkpoint(model, **hub_options)
    return _own_adapter_and_base(model, hub_options, own)


def _own_adapter_and_base(
    model: str | os.PathLike[str], hub_options: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[Path | None, Path]:
    """Return the folder of the adapter in ``model``, or None, and that of its base."""
    if any(own[name] != hub_options.get(name) for name in PLACE & own.keys()):
        # The caller has named the adapter's place: it must be there.
        folder = find_adapter(model, **{**hub_options, **own})
        local = Path(model).expanduser()
        if (local / "config.json").is_file() and not is_adapter(local):
            return folder, hub.find_checkpoint(model, **hub_options)
        return folder, hub.find_base(folder, **hub_options)
    folder = hub.find_checkpoint(model, **{**own, **hub_options, "token": _token(hub_options, own)})
    if not holds_adapter(folder):
        return None, folder
    if Path(model).expanduser().is_dir() and not is_adapter(folder):
        return folder, folder
    return folder, hub.find_base(folder, **hub_options)


def _options_of(hub_options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an adapter in another place than its base."""
    return {**hub_options, "revision": None, "subfolder": "", **own}


def _token(hub_options: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    token = hub_options.get("token")
    return own.get("token") if token is None else token


def _two_adapters(folder: Any, adapter: Any) -> ValueError:
    return ValueError(f"{folder} holds an adapter itself: leave adapter={adapter!r} out")
