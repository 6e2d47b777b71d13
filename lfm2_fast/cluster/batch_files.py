"""Files of requests and of answers, as Ray Data reads and writes them. Needs Ray."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink, FileBasedDatasource

from lfm2_fast.server.batch import line_of

# Lines of a block that is read.
READ = 256


class RequestLines(FileBasedDatasource):
    """Lines of files of requests: columns ``custom_id``, ``line`` and ``text``.

    The custom_id of a line without one is its place. Empty lines are left out.
    """

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        for number, text in enumerate(_lines(f), 1):
            if not text.strip():
                continue
            id = line_of(number, text).id
            if id is None or not _is_text(id):
                id = f"line {number} of {path}"
            rows.append({"custom_id": id, "line": number, "text": text})
            if len(rows) == READ:
                yield pa.Table.from_pylist(rows, SCHEMA)
                rows = []
        if rows:
            yield pa.Table.from_pylist(rows, SCHEMA)


SCHEMA = pa.schema({"custom_id": pa.string(), "line": pa.int64(), "text": pa.binary()})


def _lines(file: Any) -> Iterator[bytes]:
    """Yield the lines of a stream that can only be read in pieces."""
    rest = b""
    while piece := file.read(1 << 20):
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest


def _is_text(id: str) -> bool:
    try:
        id.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_of(row: dict[str, Any]) -> bytes:
    """Return a row of a table of requests as the line of a file. ``body`` may be JSON as text."""
    told = {name: row[name] for name in ("custom_id", "method", "url") if row.get(name) is not None}
    body = row.get("body")
    try:
        told["body"] = json.loads(body) if isinstance(body, str | bytes) else _without_nulls(body)
    except ValueError:
        told["body"] = body
    return json.dumps(told, default=str).encode()


def _without_nulls(value: Any) -> Any:
    """Return a nested value of a table without the fields that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


class Answers(BlockBasedFileDatasink):
    """Folder of answers, a file for each block: lines of JSON, or a table."""

    def __init__(self, path: str, file_format: str) -> None:
        super().__init__(path, file_format=file_format)
        self._format = file_format

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        """Write a block."""
        table = block.to_arrow()
        if self._format == "parquet":
            pq.write_table(table, file)
        else:
            for answer in table["answer"]:
                file.write(answer.as_py().encode() + b"\n")
