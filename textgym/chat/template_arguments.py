"""Arguments of a chat template, such as ``enable_thinking``, fixed for everything that a tokenizer renders.

They become a part of the template itself. So prompts, their shortened forms, supervised training and a saved model all
have the same, and nothing has to hand them on.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

# What a template is called with in any case.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


def with_template_arguments(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer whose chat template has some of its variables fixed.

    :param tokenizer: with a chat template
    :param arguments: names of variables and their values: None, bools, finite numbers, texts, lists and dicts of such
    :raises TypeError: if a value is something else
    :raises ValueError: if there is no template, or it has no variable of a name
    """
    if not arguments:
        return tokenizer
    templates = tokenizer.chat_template
    if not templates:
        raise ValueError(
            f"chat_template_kwargs={dict(arguments)!r}: the tokenizer {tokenizer.name_or_path!r} has no chat template"
        )
    lines = []
    for name, value in arguments.items():
        if not isinstance(name, str) or not name.isidentifier() or name in _GIVEN:
            raise ValueError(
                f"chat_template_kwargs has {name!r}; give names of the template's own variables, such as "
                "'enable_thinking'"
            )
        _check_value(value, f"chat_template_kwargs[{name!r}]")
        lines.append(f"{{% set {name} = {value!r} +%}}")  # + keeps a line break that the template begins with
    fixed = copy.deepcopy(tokenizer)
    if isinstance(templates, dict):
        fixed.chat_template = {key: _preceded(text, lines, arguments) for key, text in templates.items()}
    else:
        fixed.chat_template = _preceded(templates, lines, arguments)
    return fixed


def _preceded(template: str, lines: list[str], arguments: Mapping[str, Any]) -> str:
    for name in arguments:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(f"chat_template_kwargs has {name!r}, which the chat template does not read")
    fixed = re.match(
        r"(?:\{% set \w+ = (?:(?!\+%\}).)*\+%\})*", template, re.DOTALL
    )  # by an earlier call, which yields
    start = fixed.end() if fixed else 0
    return template[:start] + "".join(lines) + template[start:]


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, list | tuple):
        for item in value:
            _check_value(item, where)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_value(key, where)
            _check_value(item, where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} has {value!r}; numbers must be finite")
    elif not (value is None or isinstance(value, str | int | float)):
        raise TypeError(f"{where} has {value!r}, a {type(value).__name__}; give plain data, as JSON has it")
