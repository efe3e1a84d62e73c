"""Rows of Arrow tables and of ``datasets``, and which of their columns a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload


class TableRows(Sequence[dict[str, Any]]):
    """The rows of an Arrow table, made into Python's objects when they are asked for.

    :param table: a ``pyarrow.Table``
    """

    def __init__(self, table: Any) -> None:
        self.table = table

    @property
    def column_names(self) -> list[str]:
        """In their order."""
        return list(self.table.column_names)

    def column(self, name: str) -> list[Any]:
        """All values of a column."""
        return list(self.table.column(name).to_pylist())

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> TableRows: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | TableRows:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return TableRows(self.table.take(list(range(start, stop, step))))
            return TableRows(self.table.slice(start, max(0, stop - start)))
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        [row] = self.table.slice(index, 1).to_pylist()
        return dict(row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.table.to_batches():
            yield from batch.to_pylist()


def read_parquet(files: Sequence[Path], drop: Collection[str] = ()) -> TableRows:
    """The rows of Parquet files, one after the other; a column that a file lacks is None there.

    :param drop: columns that are left out
    :raises ValueError: if a file is broken, or has a column that can't be read; the message names it
    """
    try:
        import pyarrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f'{files[0]} is read with the package pyarrow: pip install "textgym[data]"') from error
    tables = []
    for file in files:
        try:
            table = parquet.read_table(file, partitioning=None)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file} is not a Parquet file, or is broken: {str(error).splitlines()[0]}") from error
        names = table.column_names
        if file == files[0]:
            check_named(drop, names, "drop_columns", str(file))
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{file} has the column {name!r} twice")
        tables.append(table.drop_columns([name for name in names if name in drop]))
    try:
        table = pyarrow.concat_tables(tables, promote_options="default") if len(tables) > 1 else tables[0]
    except (pyarrow.ArrowException, TypeError) as error:
        raise ValueError(
            f"the files {files[0].name} to {files[-1].name} don't have the same columns: {error}"
        ) from error
    return TableRows(_in_microseconds(table, str(files[0])))


def _in_microseconds(table: Any, name: str) -> Any:
    """The table without nanoseconds, which Python's dates and times don't have.

    :raises ValueError: if a column has some
    """
    import pyarrow

    types, kinds = pyarrow.types, {"timestamp": "timestamp", "duration": "duration", "time64": "time64"}
    for i, field in enumerate(table.schema):
        kind = next((kind for kind in kinds if getattr(types, f"is_{kind}")(field.type)), None)
        if kind is None or field.type.unit != "ns":
            continue
        target = pyarrow.timestamp("us", field.type.tz) if kind == "timestamp" else getattr(pyarrow, kind)("us")
        try:
            column = table.column(i).cast(target)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(
                f"{name}: the column {field.name!r} has {field.type} values with parts of a microsecond, which a "
                f"checkpoint can't hold; drop it (drop_columns=[{field.name!r}], --drop-column {field.name})"
            ) from error
        table = table.set_column(i, field.name, column)
    return table


def checked_features(dataset: Any, name: str, drop: Collection[str] = ()) -> Any:
    """A ``datasets.Dataset`` of whose columns a checkpoint can hold the values.

    :param drop: columns that are left out
    :raises ValueError: if a column is decoded into something else, such as an image, or has parts of a microsecond; the
        message names it
    """
    check_named(drop, dataset.column_names, "drop_columns", name)
    dataset = dataset.remove_columns([column for column in dataset.column_names if column in drop])
    for column, feature in dataset.features.items():
        kind = _decoded_kind(feature)
        if kind is not None:
            raise ValueError(
                f"{name}: the column {column!r} holds {kind}s, which a checkpoint can't hold; drop it "
                f"(drop_columns=[{column!r}], --drop-column {column}), or cast it to texts, numbers or bytes"
            )
        if "[ns" in str(getattr(feature, "dtype", "")):
            values = _in_microseconds(dataset.select_columns([column]).with_format("arrow")[:], name)
            import datasets

            dataset = dataset.cast_column(column, datasets.Features.from_arrow_schema(values.schema)[column])
    return dataset


def check_named(columns: Collection[str], known: Collection[str], option: str, name: str) -> None:
    """:raises ValueError: if an option names a column that there is none"""
    for column in columns:
        if column not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise ValueError(f"{option} names {column!r}, but {name} has no such column; its columns are {there}")


def _decoded_kind(feature: Any) -> str | None:
    """What a feature is decoded into, where that isn't Python's own data."""
    if isinstance(feature, Mapping):
        return next(filter(None, map(_decoded_kind, feature.values())), None)
    if isinstance(feature, list):
        return next(filter(None, map(_decoded_kind, feature)), None)
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _decoded_kind(inner)
    if hasattr(feature, "decode_example") and getattr(feature, "decode", True):
        kind = type(feature).__name__
        return None if kind in ("Value", "ClassLabel", "Json") else kind.lower()
    return None
