"""Directories as rewards: what is in them decides which class opens them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from textgym.engine.merging import adapter_base
from textgym.engine.shared_weights import copy_sharing_weights
from textgym.engine.trunk import trunk_of
from textgym.model_sources import quiet_progress, refusing_own_code
from textgym.rewards.base import Reward
from textgym.rewards.combining.ensemble import Aggregate, Ensemble
from textgym.rewards.combining.router import Router
from textgym.rewards.models.causal import CausalRewardModel
from textgym.rewards.models.causality import is_causal
from textgym.rewards.models.classifier import ClassifierReward
from textgym.rewards.models.headed_model import MODEL_TYPE
from textgym.rewards.models.text_forward import open_pretrained

ENSEMBLE_FILE = "ensemble.json"
KIND = "a trained reward model"


def open_reward(
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    label: str | int | Mapping[str, str | int] | None = None,
    column: str = "task",
    aggregate: Aggregate = "mean",
    k: float = 1.0,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> Reward:
    """Open what ``save_pretrained`` or :func:`~textgym.reward_training.train_reward` wrote as a reward.

    ================================================ ====================================================
    the directory holds                              and is opened as
    ================================================ ====================================================
    a causal sequence classifier with one output     :class:`~textgym.rewards.CausalRewardModel`
    any other sequence classifier                    :class:`~textgym.rewards.ClassifierReward`
    a model of several tasks                         one of them, or a :class:`~textgym.rewards.Router`
    an ensemble: ``ensemble.json`` names its members :class:`~textgym.rewards.Ensemble` of what they are
    ================================================ ====================================================

    Φ is what the model was trained to say: its score after the configuration's ``reward_activation``, or the
    probability of a class.

    :param path: a directory, or the id of a model on the hub
    :param task: of several tasks the one to score; by default what the prompt row has in ``column``
    :param label: name or index of the class whose probability is Φ; of several tasks one for each that has three
        classes or more, ``{"topic": "sport"}``. Of two classes, for which a model has one output, it is the second
    :param column: the column of the prompt rows that names the task
    :param aggregate: what to make of the scores of an ensemble, see :class:`~textgym.rewards.Ensemble`; ``k`` is the
        weight of its penalty
    :param device: ``"auto"`` is the GPU where there is one, otherwise the CPU
    :param trust_remote_code: run Python code that comes with the model, where it or its tokenizer has some
    :raises FileNotFoundError: if ``path`` is written as a path and is not a directory
    :raises ValueError: if it holds no reward model, or more is needed to say what its score is
    """
    location = os.fspath(path)
    if isinstance(path, os.PathLike) or location.startswith((".", "~", os.sep)):
        location = str(Path(location).expanduser())
        if not os.path.isdir(location):
            raise FileNotFoundError(f"there is no reward model directory {location!r}")
    members = _members(location)
    if members:
        return Ensemble(
            [
                open_reward(
                    member,
                    task=task,
                    label=label,
                    column=column,
                    device=device,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                )
                for member in members
            ],
            aggregate,
            k,
        )
    with refusing_own_code(f"reward={location!r}"):
        _check_kind(location, trust_remote_code)
        model, tokenizer = open_pretrained(
            AutoModelForSequenceClassification, location, None, dtype, KIND, trust_remote_code=trust_remote_code
        )
    tasks = getattr(model.config, "reward_tasks", None)
    if not tasks:
        if task is not None:
            raise ValueError(f"task={task!r}: {location!r} has one task only")
        if isinstance(label, Mapping):
            raise ValueError(f"label={dict(label)!r}: {location!r} has one task only; give the name of the class")
        return _reward(model, tokenizer, label, device)
    names = [entry["name"] for entry in tasks]
    if task is not None and task not in names:
        raise ValueError(f"task={task!r} is none of those of {location!r}: {', '.join(map(repr, names))}")
    if label is not None and not isinstance(label, Mapping):
        if task is None:
            raise ValueError(f"label={label!r}: say of which task, {{{names[0]!r}: {label!r}}}")
        label = {task: label}
    labels = dict(label or {})
    if unknown := sorted(labels.keys() - set(names)):
        raise ValueError(f"label names the task {unknown[0]!r}; {location!r} has {', '.join(map(repr, names))}")
    routes = {
        entry["name"]: _reward(_view(model, entry), tokenizer, labels.get(entry["name"]), device, entry["name"])
        for entry in tasks
        if task in (None, entry["name"])
    }
    return Router(column, routes, normalise=False) if task is None else routes[task]


def _reward(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    label: str | int | None,
    device: str | torch.device,
    task: str = "",
) -> Reward:
    """The reward of a model with one task."""
    config = model.config
    of_one_state = config.model_type != MODEL_TYPE or config.reads_one_state
    one = config.num_labels == 1 and label in (None, 0, config.id2label[0])
    has_score = isinstance(getattr(model, "score", None), nn.Module)
    if one and has_score and of_one_state and is_causal(trunk_of(model)):
        eos = tokenizer.eos_token_id is not None  # without one, it can't have been trained on
        return CausalRewardModel(model, tokenizer, device=device, append_eos=eos)
    if config.num_labels > 1 and label is None:
        known = ", ".join(repr(name) for _, name in sorted(config.id2label.items()))
        which = f"task {task!r} of {model.name_or_path!r}" if task else repr(model.name_or_path)
        wanted = f"{{{task!r}: ...}}" if task else "..."
        raise ValueError(
            f"{which} has {config.num_labels} classes, {known}: say whose probability is the reward, with "
            f"open_reward(directory, label={wanted}) from textgym.rewards.reward_directory"
        )
    output: Any = "probability" if config.num_labels > 1 else "activation"
    return ClassifierReward(model, tokenizer, label=label, output=output, device=device)


def _view(model: PreTrainedModel, task: Mapping[str, Any]) -> PreTrainedModel:
    """A model with one task's outputs, on the weights of one with several.

    :param task: its entry in the configuration's ``reward_tasks``
    """
    first, labels, outputs = int(task["first"]), list(task["labels"]), model.config.num_labels
    view = copy_sharing_weights(model)
    found = []
    before = set(trunk_of(view).modules())
    for layer in view.modules():
        if layer not in before and isinstance(layer, nn.Linear) and layer.out_features == outputs:
            found.append(layer)
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has no single linear layer with its {outputs} outputs")
    own = slice(first, first + len(labels))
    [layer] = found
    layer.weight = nn.Parameter(layer.weight[own].detach(), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[own].detach(), requires_grad=False)
    layer.out_features = len(labels)
    config = view.config
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: i for i, name in enumerate(labels)}
    config.problem_type = "single_label_classification" if len(labels) > 1 else None
    config.reward_activation = task["activation"]
    config.reward_tasks = None
    for module in view.modules():  # BERT's classifier, for one, keeps the number, to reshape its logits with
        if isinstance(getattr(module, "num_labels", None), int):
            module.num_labels = len(labels)
    return view


def _members(location: str) -> list[Path]:
    """The directories of an ensemble's members; none where it is not an ensemble.

    :raises ValueError: if a member is missing, as it is while an ensemble is being trained
    """
    path = Path(location, ENSEMBLE_FILE)
    if not path.is_file():
        begun = Path(location, "member_0").is_dir()
        if begun and not Path(location, "config.json").exists():
            raise ValueError(f"{location!r} has members but no {ENSEMBLE_FILE}: the ensemble's training did not end")
        return []
    try:
        members = [Path(location, name) for name in json.loads(path.read_text(encoding="utf-8"))["members"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is broken: {error}") from error
    for member in members:
        if not member.is_dir():
            raise ValueError(f"{str(path)!r} names the member {member.name!r}, which is not there")
    return members


def _check_kind(location: str, trust_remote_code: bool) -> None:
    """:raises ValueError: if a directory holds no model, or one that is not a sequence classifier"""
    if not os.path.isdir(location):
        return  # a hub id
    if adapter_base(location) is not None:
        return
    if not Path(location, "config.json").is_file():
        raise ValueError(f"{location!r} is not {KIND}: it has no config.json")
    with quiet_progress():
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
    kinds = config.architectures or []
    if kinds and not any("SequenceClassification" in kind for kind in kinds) and config.model_type != MODEL_TYPE:
        hint = ""
        if any("TokenClassification" in kind for kind in kinds):
            hint = "; a model that scores steps is opened by ProcessReward.from_pretrained"
        elif any("CausalLM" in kind for kind in kinds):
            hint = "; textgym train-reward trains one from it, LogProbReward takes its log-probs"
        raise ValueError(f"{location!r} is not {KIND}: it holds a {', '.join(kinds)}, not a sequence classifier{hint}")
