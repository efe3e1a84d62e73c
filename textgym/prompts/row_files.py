"""Rows of data from files: what is in them, and where each row stands.

JSON lines, JSON, CSV, plain text and Parquet, texts also compressed, folders of such files, folders that ``datasets``
wrote, and data sets of the hub. What is wrong with a file is an error that names the file and the line or the column.
What the columns mean is said elsewhere (:mod:`textgym.prompts.layouts`).
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, overload

from textgym.prompts.tables import TableRows, check_named, checked_features, read_parquet

Located: TypeAlias = "Iterator[tuple[str, Any]]"  # where each row stands, for errors, and the row

STREAMED = 100_000
"""Most rows that are taken of a stream."""
_COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_SHARD = re.compile(r"[-_.](\d{1,6})[-_]of[-_](\d{1,6})([-_.][0-9a-f]+)?$")
_SPLIT_WORDS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class LocatedRows(Sequence[tuple[str, Any]]):
    """Rows and where each stands.

    :param rows: in their order
    :param where: of each row, or a pattern with ``{}`` for its number
    :param name: what they are called as a whole
    """

    rows: Sequence[Any]
    where: Sequence[str] | str
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> LocatedRows: ...
    def __getitem__(self, index: int | slice) -> tuple[str, Any] | LocatedRows:
        if isinstance(index, slice):
            where = self.where if isinstance(self.where, str) else self.where[index]
            return LocatedRows(self.rows[index], where, self.name)
        return self.place(index), self.rows[index]

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((self.place(i), row) for i, row in enumerate(self.rows))

    def place(self, index: int) -> str:
        """Where a row stands, for errors."""
        return self.where.format(index) if isinstance(self.where, str) else self.where[index]


def read_rows(
    path_or_id: str | os.PathLike[str],
    *,
    split: str | None = None,
    drop_columns: Sequence[str] = (),
    rename_columns: Mapping[str, str] | None = None,
    column: str = "prompt",
    name: str = "prompts",
) -> LocatedRows:
    """Read the rows of a file, a folder or a data set of the hub.

    :param path_or_id: a ``Path`` is never a hub id
    :param split: which part, where there are several
    :param drop_columns: columns that are left out
    :param rename_columns: new names of columns
    :param column: what the lines of a plain text, and texts in a JSON list, are called
    :param name: of the argument, for errors
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it can't be read; the message has the file and the line or column
    :raises ImportError: if a package is needed and missing
    """
    found = _read(path_or_id, split, tuple(drop_columns), column, name)
    new = dict(rename_columns or {})
    if not isinstance(found.rows, list):
        return LocatedRows(_renamed(found, new), found.where, found.name) if new else found
    if not drop_columns and not new:
        return found
    names = dict.fromkeys(key for row in found.rows if isinstance(row, Mapping) for key in row)
    check_named(drop_columns, names, "drop_columns", found.name)
    check_named(new, [key for key in names if key not in drop_columns], "rename_columns", found.name)
    rows = [
        {new.get(key, key): value for key, value in row.items() if key not in drop_columns}
        if isinstance(row, Mapping)
        else row
        for row in found.rows
    ]
    return LocatedRows(rows, found.where, found.name)


def _renamed(found: LocatedRows, new: Mapping[str, str]) -> Any:
    rows: Any = found.rows
    check_named(new, rows.column_names, "rename_columns", found.name)
    if isinstance(rows, TableRows):
        return TableRows(rows.table.rename_columns([new.get(column, column) for column in rows.column_names]))
    return rows.rename_columns(dict(new))


def _read(
    path_or_id: str | os.PathLike[str], split: str | None, drop: Sequence[str], column: str, name: str
) -> LocatedRows:
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _folder(path, split, drop, column, name)
    kind = kind_of(path)
    if not path.exists():
        if isinstance(path_or_id, os.PathLike) or kind is not None or _looks_like_path(path_or_id):
            raise FileNotFoundError(f"{name}: there is no file or folder {str(path)!r}")
        dataset = _from_hub(path_or_id, split, name)
        return LocatedRows(checked_features(dataset, str(path_or_id), drop), f"{path_or_id}, row {{}}", path_or_id)
    if kind is None:
        raise ValueError(
            f"{name}: {str(path)!r} ends in {path.suffix!r}; a prompt file ends in one of {', '.join(_KINDS)}, and may "
            "be compressed, such as .jsonl.gz"
        )
    if kind == ".parquet":
        _check_no_split(split, path)
        return LocatedRows(read_parquet([path], drop), f"{path}, row {{}}", str(path))
    return _located(_of_file(path, kind, column, split), str(path))


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, without that of a compression; None for others."""
    kind = path.suffix.lower()
    if kind in _COMPRESSED:
        kind = Path(path.stem).suffix.lower()
        return kind if kind in _KINDS and kind != ".parquet" else None
    return kind if kind in _KINDS else None


def names_rows(text: str) -> bool:
    """Whether a text is the path of something that is there, or ends as a file of rows does."""
    return os.path.exists(os.path.expanduser(text)) or kind_of(Path(text)) is not None


def streamed(rows: Any, name: str) -> list[Any]:
    """The first rows of something that can only be gone through, such as a streamed ``datasets.IterableDataset``.

    :raises ValueError: if there are more than :data:`STREAMED`, which may be without end
    """
    taken = list(islice(iter(rows), STREAMED + 1))
    if len(taken) > STREAMED:
        raise ValueError(
            f"{name} is a stream of more than {STREAMED:,} rows, and may have no end; choose how many to read, such as "
            f"{name}.take({STREAMED:,})"
        )
    return taken


def plain_dataset(dataset: Any, name: str) -> Any:
    """A ``datasets`` data set that gives rows of Python's own objects, whatever format was set.

    :return: the data set; or a list of its rows, where it is a stream or a transform makes them
    :raises TypeError: if it is a set of splits
    :raises ValueError: if it is a stream of too many rows
    """
    names = dataset.column_names
    if isinstance(names, Mapping):
        raise TypeError(
            f"{name} is a set of splits ({', '.join(names)}); pass one, e.g. dataset[{next(iter(names))!r}]"
        )
    if not hasattr(dataset, "__len__"):
        return streamed(dataset.with_format(None) if hasattr(dataset, "with_format") else dataset, name)
    chosen = getattr(dataset, "format", {}) or {}
    if chosen.get("type") == "custom":
        return [dataset[i] for i in range(len(dataset))]
    return dataset.with_format(None) if chosen.get("type") is not None else dataset


def _looks_like_path(name: str) -> bool:
    """Whether it can't be the id of a data set on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _located(rows: Located, name: str) -> LocatedRows:
    places, found = [], []
    for place, row in rows:
        places.append(place)
        found.append(row)
    return LocatedRows(found, places, name)


def _check_no_split(split: str | None, path: Path) -> None:
    if split is not None:
        raise ValueError(f"split={split!r}: {str(path)!r} is a single file and has no splits; leave split out")


# Texts. Each reader yields where a row stands and the row.


def _of_file(path: Path, kind: str, column: str, split: str | None = None) -> Located:
    """The rows of a file that is a text."""
    text = _text(path)
    if kind in (".jsonl", ".ndjson", ".json"):
        yield from _json(path, text, kind, column, split)
        return
    _check_no_split(split, path)
    if kind == ".txt":
        for number, line in enumerate(io.StringIO(text, newline=None), start=1):
            if line.strip():
                yield f"{path}:{number}", {column: line.rstrip("\n")}
    else:
        yield from _separated(path, text, "," if kind == ".csv" else "\t")


def _json(path: Path, text: str, kind: str, column: str, split: str | None) -> Located:
    """JSON lines, or a JSON document: which of the two a file holds is seen by its content."""
    if not text.strip():
        return
    if not _is_document(text, kind):
        _check_no_split(split, path)
        yield from _json_lines(path, text, column)
        return
    document = _decoded(text, path, None)
    if isinstance(document, Mapping):
        document = _rows_within(document, path, split)
    else:
        _check_no_split(split, path)
    if not isinstance(document, list):
        raise TypeError(
            f"{path} must be a list of texts or of objects, got {type(document).__name__}; one object a line is .jsonl"
        )
    for i, row in enumerate(document):
        yield f"{path}[{i}]", {column: row} if isinstance(row, (str, list)) else row


def _is_document(text: str, kind: str) -> bool:
    """Whether a text is one JSON document, not JSON lines: by its ending, if its content leaves that open."""
    begin = text.lstrip()
    first, _, rest = begin.partition("\n")
    if kind != ".json" and not begin.startswith("["):
        return bool(rest.strip()) and not _is_json(first) and _is_json(text)
    return not (rest.strip() and _is_json(first))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(path: Path, text: str, column: str) -> Located:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            row = _decoded(line.rstrip("\n"), path, number)
            yield f"{path}:{number}", {column: row} if isinstance(row, list) else row


def _decoded(text: str, path: Path, number: int | None) -> Any:
    place = f"{path}:{number or 1}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{number or error.lineno}"
        raise ValueError(f"{place} is broken JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply") from error
    except ValueError as error:  # a number with thousands of digits
        raise ValueError(f"{place} can't be read: {error}") from error


def _rows_within(document: Mapping[str, Any], path: Path, split: str | None) -> Any:
    """The rows in a JSON object: its one list of objects, or that of a split; else the object as it is."""
    lists = {
        name: value
        for name, value in document.items()
        if isinstance(value, list)
        and value
        and all(isinstance(item, Mapping) for item in value)
        and not any("role" in item or "from" in item for item in value)
    }
    if not lists:
        return document
    if len(lists) == 1 and split is None:
        return next(iter(lists.values()))
    return lists[_chosen_split(list(lists), split, str(path))]


def _separated(path: Path, text: str, delimiter: str) -> Located:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    end = 0
    most = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 131,072 characters by default
    try:
        rows = list(_cells(reader))
    finally:
        csv.field_size_limit(most)
    for cells, line, error in rows:
        where, end = f"{path}:{end + 1}", line  # a quoted value may go over several lines
        if error is not None:
            raise ValueError(f"{where} is broken CSV: {error}") from error
        if not cells:
            continue
        if header is None:
            header = _checked_header(cells, where)
        elif len(cells) != len(header):
            raise ValueError(
                f"{where} has {len(cells)} values for {len(header)} columns; quote a value that has the separator in it"
            )
        else:
            yield where, dict(zip(header, cells, strict=True))


def _cells(reader: Any) -> Iterator[tuple[list[str], int, csv.Error | None]]:
    """The cells of each line, the number of its last line, and what ended the reading."""
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield [], reader.line_num, error
            return
        yield cells, reader.line_num, None


def _checked_header(names: list[str], where: str) -> list[str]:
    for i, name in enumerate(names):
        if not name:
            raise ValueError(f"{where}: column {i + 1} has no name (pandas writes such a one without index=False)")
        if name in names[:i]:
            raise ValueError(f"{where} names the column {name!r} twice")
    return names


def _text(path: Path) -> str:
    data = path.read_bytes()
    unpack = _COMPRESSED.get(path.suffix.lower())
    if unpack is not None:
        try:
            data = unpack(data)
        except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path} can't be unpacked as {path.suffix}: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line} is not UTF-8 (byte {error.start}); save the file as UTF-8") from error


_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")


# Folders and the hub.


def _folder(path: Path, split: str | None, drop: Sequence[str], column: str, name: str) -> LocatedRows:
    """What ``datasets`` saved, or files of rows of one kind, divided into splits by their names."""
    if any((path / mark).is_file() for mark in ("dataset_info.json", "state.json", "dataset_dict.json")):
        return LocatedRows(checked_features(_saved(path, split), str(path), drop), f"{path}, row {{}}", str(path))
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and kind_of(file) is not None
        and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
    kinds = {kind_of(file) for file in files}
    if len(kinds) > 1 and kinds - {".txt"} and ".txt" in kinds:  # a README.txt beside the data
        kinds.discard(".txt")
        files = [file for file in files if kind_of(file) != ".txt"]
    if not files:
        raise ValueError(
            f"{name}: the folder {str(path)!r} is none that datasets' save_to_disk wrote, and has no file that ends in "
            f"one of {', '.join(_KINDS)}"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{name}: the folder {str(path)!r} has files of several kinds, {', '.join(sorted(map(str, kinds)))}; name "
            "one of the files, or a folder with one kind"
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if len(splits) > 1 or split is not None:
        files = splits[_chosen_split(list(splits), split, str(path))]
    if kinds == {".parquet"}:
        return LocatedRows(read_parquet(files, drop), f"{path}, row {{}}", str(path))
    return _located((found for file in files for found in _of_file(file, str(kind_of(file)), column)), str(path))


def _split_of(file: Path) -> str:
    """The split that a file of a folder belongs to, by its name: ``train-00000-of-00002``, ``test/part-0``."""
    stem = file.name.partition(".")[0] if not _SHARD.search(file.stem) else file.stem
    shard = _SHARD.search(stem)
    if shard:
        return stem[: shard.start()]
    for part in (stem, *reversed(file.parent.parts)):
        for word in re.split(r"[-_. ]+", part.lower()):
            if word in _SPLIT_WORDS:
                return word
    return "train"


def _chosen_split(splits: Sequence[str], split: str | None, name: str) -> str:
    if split is None or split not in splits:
        raise ValueError(f"split={split!r}: {name!r} has the splits {', '.join(map(repr, splits))}; give one of them")
    return split


def _saved(path: Path, split: str | None) -> Any:
    datasets = _datasets(str(path))
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a data set as datasets' save_to_disk writes it: {error}") from error
    return _one_split(dataset, str(path), split)


def _from_hub(name: str, split: str | None, argument: str) -> Any:
    datasets = _datasets(name)
    try:
        return _one_split(datasets.load_dataset(name), name, split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{argument}={name!r} is not a file here, and can't be loaded from the Hugging Face hub: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def _one_split(dataset: Any, name: str, split: str | None) -> Any:
    splits = dataset.column_names
    if not isinstance(splits, Mapping):  # a single data set
        if split is not None:
            raise ValueError(f"split={split!r}: {name!r} has no splits; leave split out")
        return dataset
    if split is None and len(splits) == 1:
        return dataset[next(iter(splits))]
    return dataset[_chosen_split(list(splits), split, name)]


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'prompts={name!r} is read with the datasets package: pip install "textgym[data]"') from error
    return datasets
