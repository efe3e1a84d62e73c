"""Prompts from files: JSON lines, JSON, CSV, plain text, Parquet, folders of them, or a data set of the hub.

A row's prompt is a text, or a conversation, which goes through the tokenizer's chat template; its other columns reach
the reward. :mod:`textgym.prompts.layouts` has the layouts that are recognised. Whatever is wrong with a file is an
error that names the file and the line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from textgym.prompts.reading import rows_of_prompts
from textgym.prompts.row_files import read_rows
from textgym.prompts.rows import PromptRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_prompt_file(
    path_or_id: str | os.PathLike[str],
    *,
    prompt_column: str = "prompt",
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str | None = None,
    drop_columns: Sequence[str] = (),
    rename_columns: Mapping[str, str] | None = None,
) -> PromptRows:
    """Read prompts from a file, a folder or the Hugging Face hub.

    | what | rows |
    |---|---|
    | ``.jsonl``, ``.ndjson``, ``.json`` | a JSON object a line; or a list of texts or objects, also within an object |
    | ``.csv``, ``.tsv`` | the first line names the columns; every value is a text |
    | ``.txt`` | one prompt a line; blank lines are skipped, spaces at the ends are kept |
    | ``.parquet`` | its rows |
    | a folder | what ``datasets`` saved there with ``save_to_disk``, or files of one of these kinds |
    | anything else without an ending | the id of a data set on the hub, such as ``"owner/name"`` |

    Texts are UTF-8 and may be compressed: ``.jsonl.gz``, ``.csv.xz``. A prompt that is a list of messages becomes text
    through the tokenizer's chat template, and the reward gets the conversation as the column ``messages``. So do
    conversations in ``messages`` or ``conversations``, and Alpaca's ``instruction``. The answer that such a row ends
    with is the column ``completion``. Each further column keeps its name; what a row lacks is None.

    :param path_or_id: the file, folder or hub id; a ``Path`` is never a hub id
    :param prompt_column: the column with the prompts
    :param tokenizer: of the language model; needed for conversations only
    :param split: which part, such as ``"train"``, of a data set with several; may be left out where there is one only
    :param drop_columns: columns that are left out
    :param rename_columns: new names of columns, such as ``{"completions": "answers"}``
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if a file is empty, broken, not UTF-8 or of an unknown kind, lacks the column, or has one that
        a checkpoint can't hold
    :raises TypeError: if a row or a prompt is of the wrong type
    :raises ImportError: if a package is needed and missing
    """
    rows = read_rows(
        path_or_id, split=split, drop_columns=drop_columns, rename_columns=rename_columns, column=prompt_column
    )
    return rows_of_prompts(rows, prompt_column, tokenizer)
