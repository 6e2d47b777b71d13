"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, as vLLM's server has them."""

from __future__ import annotations

from typing import Any

from lfm2_fast.server.protocol import Body, Text, parse
from lfm2_fast.server.service import Service


class LoadAdapterBody(Body):
    """Body of /v1/load_lora_adapter."""

    lora_name: Text
    lora_path: Text


class UnloadAdapterBody(Body):
    """Body of /v1/unload_lora_adapter."""

    lora_name: Text


async def load_adapter(service: Service, data: bytes) -> dict[str, Any]:
    """Load an adapter, which clients then name as ``model``. Raises ApiError."""
    body = parse(LoadAdapterBody, data)
    await service.load_adapter(body.lora_name, body.lora_path)
    return {"status": "loaded", "lora_name": body.lora_name}


async def unload_adapter(service: Service, data: bytes) -> dict[str, Any]:
    """Unload an adapter; requests that run with it end with it. Raises ApiError."""
    body = parse(UnloadAdapterBody, data)
    await service.unload_adapter(body.lora_name)
    return {"status": "unloaded", "lora_name": body.lora_name}
