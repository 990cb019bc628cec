"""Files that leave the store: JSON lines, Parquet, adapters and whole models.

A file or folder appears under its name when it is whole, readable by its owner only.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from nextstate.engine.adapter_files import opened_folder
from nextstate.errors import StartError
from nextstate.quick_imports import quick_imports
from nextstate.records import Json
from nextstate.wire import write_json

PARQUET, LINES = ".parquet", ".jsonl"
Column: TypeAlias = Literal["text", "texts", "flag", "number", "messages", "traced"]
"""What a column of a table holds."""
_ROWS_AT_ONCE = 1024


def check_target(path: Path) -> None:
    """Raises StartError unless something new can be made at `path`."""
    if path.exists() or path.is_symlink():
        raise StartError(f"--out {path}: it is there already; name another, or move it away")
    if not path.parent.is_dir():
        raise StartError(f"--out {path}: there is no folder {path.parent}; make it first")


def write_rows(path: Path, rows: Iterable[Json], columns: Mapping[str, Column] | None) -> int:
    """Writes rows as JSON lines, or as Parquet if the name ends so; returns how many.

    A Parquet file has these columns, with null where a row lacks one.
    """
    with _new_file(path) as made, made.open("wb") as file:
        return send_rows(file, rows, columns if path.suffix == PARQUET else None)


def send_rows(file: IO[bytes], rows: Iterable[Json], columns: Mapping[str, Column] | None) -> int:
    """Writes rows as JSON lines, or as Parquet with these columns; returns how many."""
    return _write_lines(file, rows) if columns is None else _write_parquet(file, rows, columns)


def copy_adapter(source: Path, path: Path) -> None:
    """Copies an adapter's folder, which PEFT loads as it is."""
    with _new_folder(path) as made, opened_folder(source) as folder:
        shutil.copytree(folder, made, dirs_exist_ok=True)


def write_merged(base: str, source: Path, path: Path) -> None:
    """Writes a whole model: the base with an adapter merged into its weights."""
    with quick_imports():
        from learner.merging import merge_adapter

    with _new_folder(path) as made, opened_folder(source) as folder:
        merge_adapter(base, folder, made)


def _write_lines(file: IO[bytes], rows: Iterable[Json]) -> int:
    return sum(file.write(write_json(row) + b"\n") > 0 for row in rows)


def _write_parquet(file: IO[bytes], rows: Iterable[Json], columns: Mapping[str, Column]) -> int:
    pa: Any = importlib.import_module("pyarrow")  # it has no types
    pq: Any = importlib.import_module("pyarrow.parquet")
    text, ids = pa.string(), pa.list_(pa.int64())
    call = {"id": text, "type": text, "function": pa.struct({"name": text, "arguments": text})}
    message = {"role": text, "content": text, "tool_call_id": text, "name": text}
    message["tool_calls"] = pa.list_(pa.struct(call))
    of_turn = {"step": pa.int64(), "policy_version": pa.int64()}
    of_turn |= {"finish_reason": text, "untrainable": text}
    traced = {"node_id": text, "prompt_token_ids": ids, "completion_token_ids": ids}
    traced |= {"per_token_logps": pa.list_(pa.float64()), "loss_mask": ids}
    types: dict[Column, Any] = {
        "text": text,
        "texts": pa.list_(text),
        "flag": pa.bool_(),
        "number": pa.int64(),
        "messages": pa.list_(pa.struct(message)),
        "traced": pa.list_(pa.struct({**traced, "metadata": pa.struct(of_turn)})),
    }
    schema = pa.schema({name: types[kind] for name, kind in columns.items()})
    left, count = iter(rows), 0
    with pq.ParquetWriter(file, schema) as writer:
        while some := list(islice(left, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(some, schema=schema))
            count += len(some)
    return count


@contextmanager
def _new_file(path: Path) -> Generator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    made = Path(name)
    try:
        yield made
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


@contextmanager
def _new_folder(path: Path) -> Generator[Path]:
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield made
        made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)
