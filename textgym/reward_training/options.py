"""How a reward model is trained: the options, and what data and model make of those that were left open."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from textgym.checks import check_choice, check_int, check_number, check_seed
from textgym.rewards.models.causal import ACTIVATIONS, Activation
from textgym.rewards.models.headed_model import HeadLayers

from .backbone import HEADS, Head
from .data import RewardData, Task
from .losses import LOSSES, LossName
from .objectives import Objective, class_weights_of
from .scorer import TextScorer

Prefixes = Literal["none", "random", "all"]
_LOSSES_OF: dict[str, tuple[LossName, ...]] = {
    "preferences": ("bradley_terry",),
    "scores": ("mse", "huber"),
    "labels": ("bce", "cross_entropy"),
}


@dataclass(frozen=True)
class RewardTrainingOptions:
    """How a reward model is trained.

    :param loss: ``"bradley_terry"`` for preferences, ``"mse"`` (the default) or ``"huber"`` for scores, ``"bce"`` (the
        default of two classes) or ``"cross_entropy"`` for labels. Of several tasks, that of those with scores
    :param activation: what turns the one output into Φ: ``"identity"``, ``"tanh"`` or ``"sigmoid"``. Losses of scores
        are taken after it. By default the sigmoid with ``"bce"``, otherwise the identity. Of several tasks, that of
        those with scores
    :param huber_delta: error from which the Huber loss is linear
    :param centring: coefficient of the squared sum of a pair's scores
    :param class_weights: ``"balanced"`` (inverse to how often a class occurs, 1 on average over the rows), or a weight
        for each class
    :param head: ``"linear"`` (one layer on the state that the architecture's own classifier reads), ``"mlp"`` (a hidden
        layer on the last state of a causal backbone, on the mean of an encoder's) or ``"cnn"`` (convolutions over the
        states of all tokens)
    :param head_size: hidden units of the MLP, by default as many as the backbone is wide, or filters of each kernel
        size of the CNN, by default 100
    :param head_dropout: of an MLP or CNN
    :param head_layers: whose states an MLP or CNN reads: those of the ``"last"`` layer, or those of ``"all"`` side by
        side. Frozen layers know more together than the last one alone
    :param freeze_backbone: train the head only
    :param lora_rank: train low-rank adapters of this rank on the backbone, and the head, instead of all weights; what
        is saved has them merged
    :param bf16: compute the backbone in bfloat16 while training; weights, gradients and the report stay as they are
    :param prefixes: ``"all"`` (every token of the completion, causal models only), ``"random"`` (rows are cut after a
        random token), or ``"none"``. By default ``"all"`` for causal models, otherwise ``"none"``
    :param prefix_weight: the share of the loss that lies on prefixes, for ``"random"`` the share of rows that are cut
    :param epochs: most passes over the training rows
    :param batch_size: rows (pairs count once) of a step
    :param gradient_accumulation: batches of a step
    :param learning_rate: by default 5e-5, with ``lora_rank`` 5e-4, and for a frozen backbone 1e-3; it falls linearly
        to 0
    :param warmup: share of the steps in which the learning rate rises
    :param weight_decay: of AdamW
    :param patience: epochs without a smaller validation loss after which training ends; None for never
    :param validation_share: of the prompts, where no validation data is given; 0 for none, and the training rows are
        what the report is of
    :param max_length: most tokens of a text, see :class:`TextScorer`
    :param threshold: score above which a text counts as positive in the report; by default 0 where scores have both
        signs, otherwise the mean of the training scores
    :param seed: of the head, the split, the order of the rows and dropout
    :raises ValueError: if one is out of range
    """

    loss: LossName | None = None
    activation: Activation | None = None
    huber_delta: float = 1.0
    centring: float = 0.0
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None
    head: Head = "linear"
    head_size: int | None = None
    head_dropout: float = 0.1
    head_layers: HeadLayers = "last"
    freeze_backbone: bool = False
    lora_rank: int | None = None
    bf16: bool = False
    prefixes: Prefixes | None = None
    prefix_weight: float = 0.25
    epochs: int = 3
    batch_size: int = 32
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    patience: int | None = 2
    validation_share: float = 0.1
    max_length: int | None = None
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("loss", LOSSES),
            ("activation", tuple(ACTIVATIONS)),
            ("prefixes", ("none", "random", "all")),
        ):
            check_choice(name, getattr(self, name), (None, *allowed))
        check_choice("head", self.head, HEADS)
        if self.head_size is not None and self.head == "linear":
            raise ValueError(f"head_size={self.head_size!r} is for head='mlp' or 'cnn'; a linear head has no size")
        check_choice("head_layers", self.head_layers, ("last", "all"))
        if self.head_layers == "all" and self.head == "linear":
            raise ValueError(
                "head_layers='all' is for head='mlp' or 'cnn'; a linear head reads what its classifier does"
            )
        for name in ("epochs", "batch_size", "gradient_accumulation", "patience", "head_size", "lora_rank"):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, low=1)
        for name in ("centring", "learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, low=0.0)
        if self.freeze_backbone and self.lora_rank is not None:
            raise ValueError(
                f"lora_rank={self.lora_rank} trains adapters on the backbone that freeze_backbone=True freezes"
            )
        check_number("huber_delta", self.huber_delta, low=0.0, open_low=True)
        check_number("prefix_weight", self.prefix_weight, low=0.0, high=1.0, open_low=True, open_high=True)
        for name in ("warmup", "head_dropout", "validation_share"):
            check_number(name, getattr(self, name), low=0.0, high=1.0, open_high=True)
        check_seed("seed", self.seed)


def resolved(options: RewardTrainingOptions, data: RewardData) -> tuple[RewardTrainingOptions, tuple[Objective, ...]]:
    """The options with what the data decides, and what each task is trained for.

    :raises ValueError: if they don't fit together
    """
    if data.kind == "tasks":
        _check_for_tasks(options, data)
    objectives: list[Objective] = []
    for number, task in enumerate(data.tasks):
        own = options
        if data.kind == "tasks" and task.kind == "labels":
            own = dataclasses.replace(options, loss=None, activation=None)
        targets = np.array([row.target for row in data.rows if row.task == number])
        if len(targets) == 0:
            raise ValueError(f"no training row has the task {task.name!r}")
        first = sum(objective.outputs for objective in objectives)
        objectives.append(_objective(own, task, targets, first))
    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = 1e-3 if options.freeze_backbone else 5e-5 if options.lora_rank is None else 5e-4
    options = dataclasses.replace(options, learning_rate=learning_rate)
    if data.kind != "tasks":
        [only] = objectives
        options = dataclasses.replace(options, loss=only.loss, activation=only.activation, threshold=only.threshold)
    return options, tuple(objectives)


def _check_for_tasks(options: RewardTrainingOptions, data: RewardData) -> None:
    if options.loss not in (None, "mse", "huber"):
        raise ValueError(
            f"loss={options.loss!r}: of several tasks those with scores have the loss 'mse' or 'huber', and those with "
            "labels 'bce' or 'cross_entropy' by the number of their classes"
        )
    if isinstance(options.class_weights, Mapping):
        raise ValueError("class_weights must be 'balanced' or None where there are several tasks")
    if options.threshold is not None:
        raise ValueError(f"threshold={options.threshold!r} can't be that of several tasks; leave it out")
    kinds = {task.kind for task in data.tasks}
    if "scores" not in kinds and (options.loss, options.activation) != (None, None):
        raise ValueError("loss and activation are those of tasks with scores; the data has none")
    if "labels" not in kinds and options.class_weights is not None:
        raise ValueError("class_weights is for labels; no task of the data has them")


def _objective(options: RewardTrainingOptions, task: Task, targets: np.ndarray, first: int) -> Objective:
    """What a task is trained for.

    :param targets: ``(N,)`` of its training rows
    :param first: which output of the model is its first
    """
    allowed = _LOSSES_OF[task.kind]
    loss = options.loss
    if loss is None:
        loss = "cross_entropy" if len(task.classes) > 2 else allowed[0]
    if loss not in allowed:
        raise ValueError(f"loss={loss!r} does not fit {task.kind}; give {' or '.join(map(repr, allowed))}")
    if loss == "bce" and len(task.classes) != 2:
        raise ValueError(f"loss='bce' needs two classes, the data has {len(task.classes)}; give 'cross_entropy'")
    if options.class_weights is not None and task.kind != "labels" and not task.name:
        raise ValueError(f"class_weights is for labels; the data has {task.kind}")
    activation = options.activation or ("sigmoid" if loss == "bce" else "identity")
    if activation != "identity" and loss in ("bradley_terry", "cross_entropy"):
        raise ValueError(f"activation={activation!r} does not fit loss={loss!r}, which is taken of the output itself")
    if activation == "tanh" and loss == "bce":
        raise ValueError("activation='tanh' does not fit loss='bce'; give 'sigmoid' (a probability) or 'identity'")
    threshold = options.threshold
    if task.kind == "scores":
        of_task = f" of task {task.name!r}" if task.name else ""
        low, high = {"tanh": (-1.0, 1.0), "sigmoid": (0.0, 1.0)}.get(activation, (-math.inf, math.inf))
        if targets.min() < low or targets.max() > high:
            raise ValueError(
                f"activation={activation!r} reaches from {low:g} to {high:g}, but scores{of_task} are from "
                f"{targets.min():g} to {targets.max():g}; scale them, or use another activation"
            )
        if targets.min() == targets.max():
            raise ValueError(
                f"all scores{of_task} of the {len(targets)} training rows are {targets[0]:g}; there is nothing to learn"
            )
        if threshold is None:
            threshold = 0.0 if targets.min() < 0 < targets.max() else float(targets.mean())
    weights = None
    if task.kind == "labels":
        weights = class_weights_of(options.class_weights, task.classes, targets)
    return Objective(
        task,
        loss,
        activation,
        first,
        len(task.classes) if loss == "cross_entropy" else 1,
        options.huber_delta,
        options.centring,
        threshold,
        weights,
    )


def fitting(options: RewardTrainingOptions, scorer: TextScorer) -> RewardTrainingOptions:
    """The options with what the model decides.

    :raises ValueError: if the model can't have the prefixes that are asked for
    """
    if options.prefixes == "all" and not scorer.scores_everywhere:
        raise ValueError(
            f"prefixes='all' needs a causal model with a head 'score'; {type(scorer.model).__name__} is none. "
            "Give prefixes='random'"
        )
    if options.prefixes is not None:
        return options
    return dataclasses.replace(options, prefixes="all" if scorer.scores_everywhere else "none")
