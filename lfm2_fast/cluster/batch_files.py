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
SCHEMA = pa.schema(
    {
        "custom_id": pa.string(),
        "line": pa.int64(),
        "text": pa.binary(),
        "repeated": pa.bool_(),
    }
)


class RequestLines(FileBasedDatasource):
    """Lines of files of requests: columns ``custom_id``, ``line``, ``text`` and ``repeated``.

    Each row has a custom_id of its own. A line without one, or with that of a line before it, which
    is ``repeated``, has its place instead. Empty lines are left out.
    """

    def __init__(self, paths: str, **options: Any) -> None:
        super().__init__(paths, **options)
        # Where each custom_id stands first: a file that is read again must find the same.
        self._places: dict[str, tuple[str, int]] = {}

    def get_read_tasks(self, parallelism: int, *arguments: Any, **options: Any) -> Any:
        """Return one task, which therefore knows every custom_id that stands before a line."""
        return super().get_read_tasks(1, *arguments, **options)

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        for number, (text, id) in enumerate(self._requests(f), 1):
            if not text.strip():
                continue
            place = path, number
            again = id is not None and self._places.setdefault(id, place) != place
            if id is None or again or not _is_text(id):
                id = f"line {number} of {path}"
            rows.append({"custom_id": id, "line": number, "text": text, "repeated": again})
            if len(rows) == READ:
                yield pa.Table.from_pylist(rows, SCHEMA)
                rows = []
        if rows:
            yield pa.Table.from_pylist(rows, SCHEMA)

    def _requests(self, file: Any) -> Iterator[tuple[bytes, str | None]]:
        """Yield the lines of a file, each with its custom_id, None without one."""
        for text in _lines(file):
            yield text, line_of(0, text).id


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


class RequestTables(RequestLines):
    """Rows of Parquet files of requests, as lines. A wrong request keeps its custom_id.

    Raises ValueError without that column.
    """

    def __init__(self, paths: str) -> None:
        super().__init__(paths, file_extensions=["parquet"])
        with self._open_input_source(self._filesystem, self._paths()[0]) as file:
            if "custom_id" not in pq.read_schema(file).names:
                raise ValueError(f"{paths} has no column custom_id; add one, different in each row")

    def _open_input_source(self, filesystem: Any, path: str, **options: Any) -> Any:
        # The format is read from its end.
        return filesystem.open_input_file(path)

    def _requests(self, file: Any) -> Iterator[tuple[bytes, str | None]]:
        for batch in pq.ParquetFile(file).iter_batches(READ):
            for row in batch.to_pylist():
                id = row["custom_id"]
                yield text_of(row), id if id and isinstance(id, str) else None


def text_of(row: dict[str, Any]) -> bytes:
    """Return a row of a table of requests as the line of a file. ``body`` may be JSON as text."""
    line = {name: row[name] for name in ("custom_id", "method", "url") if row.get(name) is not None}
    body = row.get("body")
    try:
        line["body"] = json.loads(body) if isinstance(body, str | bytes) else _without_nulls(body)
    except ValueError:
        line["body"] = body
    return json.dumps(line, default=str).encode()


def _without_nulls(value: Any) -> Any:
    """Return a nested value of a table without the fields that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
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
