"""Opening a backbone and putting a new head on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from textgym.engine.trunk import trunk_of
from textgym.engine.weight_files import readable_weights
from textgym.model_sources import quiet_loading, quiet_progress, refusing_own_code
from textgym.rewards.models.causality import is_causal
from textgym.rewards.models.headed_model import HeadedRewardModel, HeadLayers

Head = Literal["linear", "mlp", "cnn"]
HEADS: tuple[Head, ...] = get_args(Head)


def open_backbone(
    model: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    num_labels: int,
    seed: int,
    head: Head = "linear",
    head_size: int | None = None,
    head_dropout: float = 0.1,
    head_layers: HeadLayers = "last",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with a head and its tokenizer.

    A linear head that the checkpoint has is kept; one that it lacks, and any other, is drawn at random.

    :param model: ``"embedded"`` (textgym's language model), ``"smollm2"``, ``"gemma3"``, ``"minilm"``, a
        directory, a hub id, or an object, which is
        trained in place: a sequence classifier, or with ``head="mlp"`` or ``"cnn"`` any transformer
    :param tokenizer: by default the one saved with the model; needed with an object
    :param num_labels: outputs of the head
    :param seed: of the new head
    :param head: ``"linear"``, ``"mlp"`` or ``"cnn"``
    :param head_size: see :meth:`~textgym.rewards.models.headed_model.HeadedRewardModel.around`, as for
        ``head_dropout`` and ``head_layers``
    :param trust_remote_code: run Python code that comes with the checkpoint, where it has some
    :raises FileNotFoundError: if ``model`` is written as a path and is not a directory
    :raises ValueError: if an object has no tokenizer or another number of outputs, or weights other than the head's
        are missing
    :raises TypeError: if ``model`` is an object of another kind
    """
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError(f"model is a {type(model).__name__} object: pass its tokenizer too (tokenizer=...)")
        if head != "linear":
            return _with_head(trunk_of(model), num_labels, seed, head, head_size, head_dropout, head_layers), tokenizer
        if not (type(model).__name__.endswith("ForSequenceClassification") or isinstance(model, HeadedRewardModel)):
            raise TypeError(f"model is a {type(model).__name__}; give a sequence classifier, or a directory or hub id")
        if model.config.num_labels != num_labels:
            raise ValueError(f"model has num_labels={model.config.num_labels}; the data and the loss need {num_labels}")
        return model, tokenizer
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(f"model must be a name, a directory or a sequence classifier, got {type(model).__name__}")
    path = _location(model)
    set_seed(seed)
    auto_class: Any = AutoModelForSequenceClassification if head == "linear" else AutoModel
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if head == "linear":
        options["num_labels"] = num_labels
    with refusing_own_code(f"model={path!r}"), quiet_progress(), quiet_loading(), readable_weights(path):
        opened, loading = auto_class.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
    trunk = set(trunk_of(opened).parameters())
    of_trunk = {name for name, weight in opened.named_parameters(remove_duplicate=False) if weight in trunk}
    missing = sorted(name for name in loading["missing_keys"] if name in of_trunk and "pooler." not in name)
    if missing:
        raise ValueError(f"model={path!r} has no weights for {', '.join(missing[:3])}; its backbone would be random")
    if head != "linear":
        opened = _with_head(opened, num_labels, seed, head, head_size, head_dropout, head_layers)
    return opened, open_tokenizer(model, trust_remote_code) if tokenizer is None else tokenizer


def open_tokenizer(model: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is opened by name.

    :raises FileNotFoundError: if ``model`` is written as a path and is not a directory
    """
    path = _location(model)
    with refusing_own_code(f"model={path!r}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    return tokenizer


def _with_head(
    backbone: PreTrainedModel,
    num_labels: int,
    seed: int,
    head: Any,
    size: int | None,
    dropout: float,
    layers: HeadLayers,
) -> HeadedRewardModel:
    set_seed(seed)
    return HeadedRewardModel.around(backbone, head, num_labels, is_causal(backbone), size, dropout, layers)


def _location(model: str | os.PathLike[str]) -> str:
    """A directory, or the id of a model on the hub.

    :raises FileNotFoundError: if ``model`` is written as a path and is not a directory
    """
    path = os.fspath(model)
    if path == "embedded":
        from textgym.embedded import LANGUAGE_MODEL

        return str(LANGUAGE_MODEL)
    if path == "minilm":
        from textgym.packaged.minilm import minilm_directory

        return str(minilm_directory())
    if path == "smollm2":
        from textgym.packaged.smollm2 import smollm2_directory

        return str(smollm2_directory())
    if path == "gemma3":
        from textgym.packaged.gemma3 import gemma3_directory

        return str(gemma3_directory())
    if isinstance(model, os.PathLike) or path.startswith((".", "~", os.sep)):
        path = str(Path(path).expanduser())
        if not os.path.isdir(path):
            raise FileNotFoundError(f"model={os.fspath(model)!r}: there is no such directory")
    return path
