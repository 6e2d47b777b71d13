"""Facts about a service: health, models, properties and slots."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import lfm2_fast
from lfm2_fast.engine.engine import Engine
from lfm2_fast.server.service import Service


async def health(service: Service) -> dict[str, Any]:
    """Return "ok" if the engine takes requests. Raises ApiError if it does not."""
    await service.ask(lambda engine: None)
    return {"status": "ok"}


async def models(service: Service) -> dict[str, Any]:
    """Return the served names."""
    data = [
        {
            "id": name,
            "object": "model",
            "created": service.began,
            "owned_by": "lfm2_fast",
            "root": service.name,
            "parent": service.name if service.adapter_of(name) else None,
            "max_model_len": service.max_length,
        }
        for name in service.names
    ]
    return {"object": "list", "data": data}


async def properties(service: Service) -> dict[str, Any]:
    """Return the properties of llama.cpp's server, as far as they exist here."""
    tokenizer = service.tokenizer
    return {
        "default_generation_settings": {
            "n_ctx": service.max_length,
            "params": asdict(service.defaults.sampling),
        },
        "total_slots": service.rows,
        "model_alias": service.name,
        "chat_template": service.template,
        "bos_token": tokenizer.bos_token or "",
        "eos_token": tokenizer.eos_token or "",
        "build_info": f"lfm2_fast {lfm2_fast.__version__}",
        "modalities": {"vision": False, "audio": False},
    }


async def slots(service: Service) -> list[dict[str, Any]]:
    """Return the rows of the engine in the form of llama.cpp's server, without texts."""

    def look(engine: Engine) -> list[dict[str, Any]]:
        rows = {row.slot: row for row in engine.rows if row.slot >= 0}
        found = []
        for slot in range(engine.max_rows):
            row = rows.get(slot)
            state: dict[str, Any] = {"id": slot, "n_ctx": engine.max_length}
            state["is_processing"] = row is not None
            if row is not None:
                state["id_task"] = row.id
                state["n_prompt_tokens"] = row.start
                state["n_prompt_tokens_cache"] = row.cached_tokens
                state["next_token"] = [{"n_decoded": len(row.written)}]
            found.append(state)
        return found

    return await service.ask(look)
