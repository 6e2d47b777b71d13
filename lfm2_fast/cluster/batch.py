"""Batches on Ray Data: files of requests, answered by many engines, each request once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfm2_fast.cluster.extra import check_extra, node_cores
from lfm2_fast.cluster.scale import Scale
from lfm2_fast.server.batch import answer_line, encoded, line_of, repeated
from lfm2_fast.server.run import ROWS, create_app

# Blocks that an engine works on at once, so that rows of the next take the place of ended ones.
AT_ONCE = 2
# Cores that Ray reserves for reading and writing files, and for the filter of answered requests.
# Without them engines that have all cores would wait for ever.
FILES = 2


class Answerer:
    """Engine that answers blocks of requests; Ray Data makes one in each actor."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._service = create_app(**options, max_queue=None).state.service

    def __call__(self, block: dict[str, Any]) -> dict[str, list[Any]]:
        """Return the columns of the answers to a block: ``custom_id``, ``status``, ``answer``."""
        lines = [line_of(*each) for each in zip(block["line"].tolist(), block["text"], strict=True)]
        for place in block["repeated"].nonzero()[0]:
            if lines[place].wrong is None:
                lines[place] = repeated(lines[place])

        async def work() -> list[dict[str, Any]]:
            return await asyncio.gather(*(answer_line(self._service, line) for line in lines))

        answers = asyncio.run(work())
        return {
            "custom_id": list(block["custom_id"]),
            "status": [(each["response"] or {}).get("status_code") for each in answers],
            "answer": [encoded(each).decode() for each in answers],
        }


def run_batch_on_ray(
    requests: str,
    output: str,
    options: Mapping[str, Any],
    scale: Scale,
    *,
    address: str | None = None,
    rows_per_block: int | None = None,
) -> None:
    """Answer files of requests, and write the answers into the folder ``output``.

    ``requests`` is a file, a folder or a URL, of JSON lines or, if it ends in ".parquet", a table
    with the columns ``custom_id``, ``url`` and ``body``. The first request of a custom_id is
    answered, and each other one gets an error. ``options`` are the arguments of ``create_app``. A
    block of ``rows_per_block`` requests is written when its last one is answered; None is four
    times the engine's rows. Its ids are then noted in the folder of the same name with "-done" at
    its end, so that the same call after a crash leaves them out. ``address`` is as in
    ``serve_replicas``. Raises ImportError without the extra "ray", and ValueError if there are no
    requests.
    """
    check_extra()
    import ray
    from ray.data.checkpoint import CheckpointConfig

    from lfm2_fast.cluster.batch_files import Answers, RequestLines, RequestTables

    requests, output = _absolute(requests), _absolute(output)
    if not ray.is_initialized():
        # They need little of the cores that they reserve: here the engines have all.
        more = {} if address else {"num_cpus": (os.cpu_count() or 1) + FILES}
        ray.init(address or "local", **more)
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="custom_id",
        checkpoint_path=f"{output.rstrip('/')}-done",
        delete_checkpoint_on_success=False,
    )
    parquet = requests.endswith(".parquet")
    found = ray.data.read_datasource((RequestTables if parquet else RequestLines)(requests))
    rows = options.get("max_rows") or ROWS
    per_block = rows_per_block or 4 * rows
    # Some cores of each node read and write the files.
    nodes = [max(cores - FILES, cores / 2) for cores in node_cores()]
    device = str(options.get("device") or "auto")
    resources = scale.resources(device, ray.cluster_resources(), nodes)
    options = {**options, "memory": options.get("memory") or scale.memory(resources)}
    low = scale.most if scale.max_replicas is None else scale.min_replicas or 1
    pool = ray.data.ActorPoolStrategy(
        min_size=low, max_size=scale.most, max_concurrent_calls_per_actor=AT_ONCE
    )
    found.repartition(target_num_rows_per_block=per_block).map_batches(
        Answerer,
        batch_size=per_block,
        compute=pool,
        fn_constructor_args=(options,),
        **resources,
    ).write_datasink(Answers(output, "parquet" if parquet else "jsonl"))


def _absolute(path: str) -> str:
    """Return a path that means the same in every process; a URL is not changed."""
    return path if "://" in path else str(Path(path).resolve())
