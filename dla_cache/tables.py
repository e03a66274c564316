"""Tables that list images: CSV, TSV, JSON lines and Parquet, read whole into plain values."""

import csv
import io
import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dla_cache.candidates import (
    USUAL_COLUMNS,
    Columns,
    Found,
    Quarantined,
    choose_columns,
    describe_columns,
    fault_of_file,
    fault_of_name,
    make_candidate,
    refuse_vectors,
)
from dla_cache.errors import ManifestError, name_some
from dla_cache.manifest import is_list
from dla_cache.parquet import from_parquet

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows in the order of the file; a cell that is absent from a row of JSON lines is absent from its mapping."""

    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    list_columns: frozenset[str] = frozenset()
    """Those that hold a list in some row, or by their type."""


def read_table(path: Path) -> Table:
    """The table in a file, whose suffix says what it is.

    Raises:
        ManifestError: if the file is no such table, cannot be read, or has no row.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    try:
        table = readers.get(path.suffix.lower(), _read_json_lines)(path)
    except OSError as error:
        raise ManifestError(f"`{path}` cannot be read: {error.strerror}", hint="check the path") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"`{path}` is not in UTF-8: {error.reason}", hint="save it as UTF-8") from error
    except (ValueError, csv.Error, RecursionError) as error:
        hint = f"a table ends in {', '.join(f'`{suffix}`' for suffix in TABLE_SUFFIXES)} and is what it says"
        raise ManifestError(f"`{path}` cannot be read as a table: {error}", hint=hint) from error
    if not table.rows:
        raise ManifestError(f"`{path}` has no row", hint="list at least one image")
    return table


def find_rows(path: Path, root: Path, columns: Columns) -> tuple[list[Found], str, bool]:
    """What the rows of a table are, where paths, classes, splits and IDs come from, and if it is multi-label.

    Args:
        root: folder that the paths start from.

    Raises:
        ManifestError: if the table is damaged, lacks a column, or labels are no names.
    """
    table = read_table(path)
    chosen = choose_columns(table.columns, columns, USUAL_COLUMNS)
    if chosen.path is None:
        raise ManifestError(
            f"`{path}` has no column of paths: its columns are {name_some(table.columns, shown=10)}",
            hint="name it by `--path-column`",
        )
    if chosen.label is not None:
        refuse_vectors((row.get(chosen.label) for row in table.rows), chosen.label)
    real_root = os.path.realpath(root)
    found: list[Found] = []
    for number, row in enumerate(table.rows, start=1):
        value = row.get(chosen.path)
        if isinstance(value, Mapping | bytes):
            raise ManifestError(f"column `{chosen.path}` holds no paths", hint="write the images to files first")
        if not isinstance(value, str) or not value.strip():
            found.append(Quarantined(f"row {number}", "has no path"))
            continue
        where = f"row {number}, {value}"
        uri = posixpath.normpath(os.path.relpath(value, root.absolute()) if os.path.isabs(value) else value)
        fault = (
            "is a web address" if "://" in value else fault_of_name(uri) or fault_of_file(f"{root}/{uri}", real_root)
        )
        found.append(make_candidate(where, uri, uri, row, chosen) if fault is None else Quarantined(where, fault))
    is_multi_label = columns.label_separator is not None or chosen.label in table.list_columns
    remark = describe_columns(chosen, "the path", is_multi_label=is_multi_label)
    return found, f"paths from `{chosen.path}`, {remark}", is_multi_label


def _read_csv(path: Path) -> Table:
    # utf-8-sig: Excel writes a byte order mark, which would become part of the first column's name.
    text = path.read_bytes().decode("utf-8-sig")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    columns = tuple(name.strip() for name in next(reader, []))
    rows = []
    for cells in reader:
        if cells and len(cells) != len(columns):
            raise ValueError(f"line {reader.line_num} has {len(cells)} cells, the first {len(columns)}")
        if cells:  # an empty line is none
            rows.append(dict(zip(columns, cells, strict=True)))
    return Table(columns, tuple(rows))


def _read_json_lines(path: Path) -> Table:
    rows = []
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows.append(row)
    return Table(tuple(dict.fromkeys(name for row in rows for name in row)), tuple(rows), _list_columns(rows))


def _read_parquet(path: Path) -> Table:
    table = from_parquet(path.read_bytes())
    rows = table.to_pylist()
    of_type = {field.name for field in table.schema if is_list(field.type)}
    return Table(tuple(table.column_names), tuple(rows), _list_columns(rows) | of_type)


def _list_columns(rows: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    return frozenset(name for row in rows for name, value in row.items() if isinstance(value, list))
