"""Prompts from files: JSON lines, JSON, CSV, plain text, Parquet, a ``datasets`` folder, or a data set of the hub.

A row's ``prompt`` is a text, or a conversation, which goes through the tokenizer's chat template; its other columns
reach the reward. Whatever is wrong with a file is an error that names the file and the line.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textgym.chat import MESSAGES, chat_prompt, is_conversation
from textgym.prompts import PromptRows, check_columns, check_names, check_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Located = Iterator[tuple[str, Any]]  # where each row stands, for errors, and the row


def load_prompt_file(
    path_or_id: str | os.PathLike[str],
    *,
    prompt_column: str = "prompt",
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str | None = None,
) -> PromptRows:
    """Read prompts from a file, a folder or the Hugging Face hub.

    | what | rows |
    |---|---|
    | ``.jsonl``, ``.ndjson`` | one JSON object a line; blank lines are skipped |
    | ``.json`` | a JSON list of texts or of objects |
    | ``.csv``, ``.tsv`` | the first line names the columns; every value is a text |
    | ``.txt`` | one prompt a line; blank lines are skipped, spaces at the ends are kept |
    | ``.parquet`` | its rows |
    | a folder | what ``datasets`` saved there with ``save_to_disk`` |
    | anything else without an ending | the id of a data set on the hub, such as ``"owner/name"`` |

    Files are UTF-8. A prompt that is a list of messages, ``{"role": ..., "content": ...}``, becomes text through the
    tokenizer's chat template; so does the column ``messages`` where there is no column ``prompt``. The reward gets the
    conversation as the column ``messages``, and each further column of the data under its own name.

    :param path_or_id: the file, folder or hub id; a ``Path`` is never a hub id
    :param prompt_column: the column with the prompts
    :param tokenizer: of the language model; needed for conversations only
    :param split: which part of a saved ``DatasetDict`` or of a data set on the hub, such as ``"train"``; may be left
        out where there is one only
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if a file is empty, broken, not UTF-8 or of an unknown kind, lacks the column, or its rows
        differ in their columns
    :raises TypeError: if a row or a prompt is of the wrong type
    :raises ImportError: if the ``datasets`` package is needed and missing
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _from_dataset(_saved(path, split), str(path), prompt_column, tokenizer)
    kind = path.suffix.lower()
    if not (path.exists() or isinstance(path_or_id, os.PathLike) or kind in _KINDS or _looks_like_path(path_or_id)):
        return _from_dataset(_from_hub(path_or_id, split), path_or_id, prompt_column, tokenizer)
    if not path.exists():
        raise FileNotFoundError(f"prompts: there is no file or folder {str(path)!r}")
    if kind not in _KINDS:
        raise ValueError(
            f"prompts: {str(path)!r} ends in {path.suffix!r}; a prompt file ends in one of {', '.join(_KINDS)}"
        )
    if split is not None:
        raise ValueError(f"split={split!r}: {str(path)!r} is a single file and has no splits; leave split out")
    if kind == ".parquet":
        return _from_dataset(_parquet(path), str(path), prompt_column, tokenizer)
    rows: list[Mapping[str, Any]] = []
    for where, row in _KINDS[kind](path, prompt_column):
        rows.append(_row(row, where, prompt_column, tokenizer))
        check_columns(rows[-1].keys() - {"prompt"}, rows[0].keys() - {"prompt"}, where)
    if not rows:
        raise ValueError(f"prompts: {str(path)!r} has no prompts; at least one is needed")
    return PromptRows(rows)


def names_prompt_file(text: str) -> bool:
    """Whether a text is the path of something that is there, or ends as a prompt file does."""
    return os.path.exists(os.path.expanduser(text)) or os.path.splitext(text)[1].lower() in _KINDS


def _looks_like_path(name: str) -> bool:
    """Whether it can't be the id of a data set on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


# Rows.


def _row(row: Any, where: str, prompt_column: str, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """A row of a file in the form that prompts have: ``"prompt"``, a text, and its other columns."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} must be an object with {prompt_column!r}, got {type(row).__name__}")
    source = _source_column(list(row), prompt_column, where)
    columns = {name: value for name, value in row.items() if name != source}
    check_names(columns, where)
    prompt = row[source]
    if is_conversation(prompt):
        if tokenizer is None:
            raise ValueError(
                f"{where}: {source!r} is a conversation; pass tokenizer=, the language model's, for its chat template"
            )
        columns.setdefault(MESSAGES, prompt)
        prompt = chat_prompt(prompt, tokenizer, f"{where}: {source!r}")
    _check_text(prompt, f"{where}: {source!r}")
    return {"prompt": prompt, **columns}


def _source_column(names: list[str], prompt_column: str, where: str) -> str:
    """The column that the prompts come from."""
    if prompt_column in names:
        if prompt_column != "prompt" and "prompt" in names:
            raise ValueError(
                f"{where} has a column 'prompt' beside prompt_column={prompt_column!r}; rename or remove it"
            )
        return prompt_column
    if prompt_column == "prompt" and MESSAGES in names:
        return MESSAGES
    raise ValueError(
        f"{where} has no column {prompt_column!r}; its columns are {', '.join(map(repr, names)) or 'none'}. "
        "prompt_column says which one has the prompts"
    )


def _check_text(prompt: Any, where: str) -> None:
    check_prompt(prompt, where)
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a surrogate pair at character {error.start + 1}, which no tokenizer can read"
        ) from None


# Kinds of files. Each reader yields where a row stands and the row.


def _json_lines(path: Path, prompt_column: str) -> Located:
    for number, line in enumerate(io.StringIO(_text(path), newline=None), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line.rstrip("\n"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is broken JSON: {error.msg} at column {error.colno}") from error
            except RecursionError as error:
                raise ValueError(f"{where} is nested too deeply") from error


def _json_list(path: Path, prompt_column: str) -> Located:
    text = _text(path)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno} is broken JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(rows, list):
        raise TypeError(
            f"{path} must be a list of texts or of objects, got {type(rows).__name__}; one object a line is .jsonl"
        )
    for i, row in enumerate(rows):
        yield f"{path}[{i}]", {prompt_column: row} if isinstance(row, (str, list)) else row


def _separated(delimiter: str) -> Callable[[Path, str], Located]:
    def rows(path: Path, prompt_column: str) -> Located:
        reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        end = 0
        try:
            for cells in reader:
                where, end = f"{path}:{end + 1}", reader.line_num  # a quoted value may go over several lines
                if not cells:
                    continue
                if header is None:
                    header = _checked_header(cells, where)
                elif len(cells) != len(header):
                    raise ValueError(
                        f"{where} has {len(cells)} values for {len(header)} columns; "
                        "quote a value that has the separator in it"
                    )
                else:
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}:{end + 1} is broken CSV: {error}") from error

    return rows


def _checked_header(names: list[str], where: str) -> list[str]:
    for i, name in enumerate(names):
        if not name:
            raise ValueError(f"{where}: column {i + 1} has no name (pandas writes such a one without index=False)")
        if name in names[:i]:
            raise ValueError(f"{where} names the column {name!r} twice")
    return names


def _lines(path: Path, prompt_column: str) -> Located:
    for number, line in enumerate(io.StringIO(_text(path), newline=None), start=1):
        if line.strip():
            yield f"{path}:{number}", {prompt_column: line.rstrip("\n")}


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line} is not UTF-8 (byte {error.start}); save the file as UTF-8") from error


_KINDS: dict[str, Callable[[Path, str], Located]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_list,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".txt": _lines,
    ".parquet": lambda path, prompt_column: iter(()),  # not a text: see _parquet
}


# Data sets.


def _from_dataset(dataset: Any, name: str, prompt_column: str, tokenizer: PreTrainedTokenizerBase | None) -> PromptRows:
    """Rows stay in the data set, and only the prompts are read now; conversations are all turned into texts."""
    if len(dataset) == 0:
        raise ValueError(f"prompts: {name!r} has no rows; at least one prompt is needed")
    source = _source_column(dataset.column_names, prompt_column, repr(name))
    prompts = dataset[source]
    if is_conversation(prompts[0]):
        return PromptRows([_row(row, f"{name}, row {i}", prompt_column, tokenizer) for i, row in enumerate(dataset)])
    check_names((column for column in dataset.column_names if column != source), repr(name))
    for i, prompt in enumerate(prompts):
        _check_text(prompt, f"{name}, row {i}: {source!r}")
    return PromptRows(dataset if source == "prompt" else dataset.rename_column(source, "prompt"))


def _saved(path: Path, split: str | None) -> Any:
    datasets = _datasets(str(path))
    try:
        return _one_split(datasets.load_from_disk(str(path)), str(path), split)
    except FileNotFoundError as error:
        raise ValueError(
            f"prompts: the folder {str(path)!r} is none that datasets' save_to_disk wrote; give such a folder, or a "
            f"file that ends in one of {', '.join(_KINDS)}"
        ) from error


def _parquet(path: Path) -> Any:
    datasets = _datasets(str(path))
    # Dataset.from_parquet would write a copy into the user's cache, and read that one the next time.
    from pyarrow import ArrowInvalid, parquet  # type: ignore[import-untyped]

    try:
        return datasets.Dataset(parquet.read_table(path))
    except ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error


def _from_hub(name: str, split: str | None) -> Any:
    datasets = _datasets(name)
    try:
        return _one_split(datasets.load_dataset(name), name, split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"prompts={name!r} is no file here, and can't be loaded from the Hugging Face hub: "
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
    if split not in splits:
        raise ValueError(f"split={split!r}: {name!r} has the splits {', '.join(map(repr, splits))}; give one of them")
    return dataset[split]


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'prompts={name!r} is read with the datasets package: pip install "textgym[data]"') from error
    return datasets
