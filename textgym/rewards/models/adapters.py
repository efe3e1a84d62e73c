"""Reward models that are given as an adapter of ``peft``, as TRL's ``RewardTrainer`` saves them, on the model below."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from textgym.engine.exactness import first_line
from textgym.engine.merging import CONFIG, adapter_base, adapter_base_on_hub, hub_file, merged_from
from textgym.model_sources import quiet_loading, quiet_progress


def base_of_adapter(location: str) -> str | None:
    """What an adapter in a directory or on the hub was trained on; None of a model.

    :raises ValueError: if there is no such directory or hub id, the hub can't be reached, or an adapter's
        configuration doesn't say
    """
    if os.path.isdir(location):
        return adapter_base(location)
    try:
        return adapter_base_on_hub(location) if hub_file(location, "config.json") is None else None
    except OSError as e:
        raise ValueError(f"there is no directory {location!r}, and on the hub: {first_line(e)}") from e


def open_adapted(auto_class: Any, location: str, base: str, dtype: torch.dtype, kind: str) -> PreTrainedModel:
    """A model with an adapter in its weights.

    :param auto_class: such as ``AutoModelForSequenceClassification``
    :param location: directory or hub id of the adapter
    :param base: what it was trained on; the adapter brings the head, or this has one
    :param kind: what it should be, for messages
    :raises ModuleNotFoundError: without ``peft``
    :raises ValueError: if neither of them has a head, the base can't be opened, or the adapter doesn't fit
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(
            f'{location!r} is an adapter, which needs the package peft: pip install "textgym[lora]"'
        )
    from peft.utils.save_and_load import load_peft_weights

    file = Path(location, CONFIG) if os.path.isdir(location) else Path(str(hub_file(location, CONFIG)))
    task = json.loads(file.read_text(encoding="utf-8")).get("task_type")
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ValueError(f"{location!r} is not {kind}: it is an adapter of a language model (task_type={task!r})")
    whole = {
        name.removeprefix("base_model.model."): weight
        for name, weight in load_peft_weights(location, device="cpu").items()
        if "lora_" not in name
    }
    # Of the layers that were trained as a whole, the outputs' has the fewest rows.
    rows = [len(weight) for weight in whole.values() if weight.dim() == 2]
    options = {"num_labels": min(rows)} if rows else {}
    try:
        with quiet_progress(), quiet_loading():
            model, loading = auto_class.from_pretrained(
                base, dtype=dtype, output_loading_info=True, trust_remote_code=False, **options
            )
    except (OSError, ValueError) as e:
        raise ValueError(f"{location!r} is an adapter on {base!r}, which can't be opened: {e}") from e
    if missing := sorted(set(loading["missing_keys"]) - set(whole)):
        raise ValueError(
            f"{location!r} is not {kind}: neither it nor {base!r} has weights for {', '.join(missing[:3])}"
        )
    merged = merged_from(location, model, f"{location!r}")
    merged.name_or_path = location
    return merged


def tokenizer_of(location: str, base: str) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with an adapter, or that of the model below."""
    file = "tokenizer_config.json"
    own = Path(location, file).is_file() if os.path.isdir(location) else hub_file(location, file) is not None
    opened: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location if own else base, trust_remote_code=False)
    return opened
