"""What the outputs of a reward model mean, and what they are trained by: one objective for each task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from textgym.rewards.models.causal import ACTIVATIONS, Activation

from .data import Task
from .losses import (
    LossName,
    binary_cross_entropy_loss,
    bradley_terry_loss,
    cross_entropy_loss,
    huber_loss,
    mse_loss,
)


@dataclass(frozen=True)
class Objective:
    """What a task is trained for.

    :param task: its name, kind and classes
    :param loss: which of the losses
    :param activation: what makes Φ of an output, see :class:`RewardTrainingOptions`
    :param first: which output of the model is its first
    :param outputs: how many it has
    :param huber_delta: see :class:`RewardTrainingOptions`, as for ``centring``
    :param threshold: of scores, see :class:`RewardTrainingOptions`
    :param class_weights: of labels ``(C,)``
    """

    task: Task
    loss: LossName
    activation: Activation
    first: int
    outputs: int
    huber_delta: float = 1.0
    centring: float = 0.0
    threshold: float | None = None
    class_weights: Tensor | None = None

    def own(self, logits: Any) -> Any:
        """Its outputs ``(..., outputs)`` among those of the model ``(..., C)``."""
        return logits[..., self.first : self.first + self.outputs]

    def of_texts(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Loss of scores or labels.

        :param logits: ``(N, outputs)``
        :param targets: ``(N,)``
        :param weights: ``(N,)``
        """
        if self.class_weights is not None:
            weights = weights * self.class_weights.to(weights.device)[targets.long()]
        if self.loss == "cross_entropy":
            return cross_entropy_loss(logits, targets.long(), weights)
        if self.loss == "bce":
            return binary_cross_entropy_loss(logits[:, 0], targets, weights)
        scores = ACTIVATIONS[self.activation](logits[:, 0])
        if self.loss == "huber":
            return huber_loss(scores, targets, self.huber_delta, weights)
        return mse_loss(scores, targets, weights)

    def of_pairs(self, chosen: Tensor, rejected: Tensor, margins: Tensor, weights: Tensor | None = None) -> Tensor:
        """Loss of preferences.

        :param chosen: ``(N, 1)`` outputs of the better texts
        :param rejected: ``(N, 1)`` of the worse texts
        :param margins: ``(N,)``
        :param weights: ``(N,)``, default 1
        """
        return bradley_terry_loss(chosen[:, 0], rejected[:, 0], margins, self.centring, weights)

    def values(self, logits: Tensor) -> np.ndarray:
        """What the outputs say, float64: Φ ``(N, 1)``, or of classes their probabilities ``(N, classes)``.

        :param logits: ``(N, outputs)``
        """
        logits = logits.double()
        if self.loss == "cross_entropy":
            return torch.softmax(logits, 1).cpu().numpy()
        if self.loss == "bce":
            positive = torch.sigmoid(logits)
            return torch.cat([1 - positive, positive], 1).cpu().numpy()
        return ACTIVATIONS[self.activation](logits).cpu().numpy()

    @property
    def output_names(self) -> list[str]:
        if self.loss == "cross_entropy":
            return list(self.task.classes)
        return [self.task.classes[1] if self.loss == "bce" else "score"]


def joint_loss(
    objectives: Sequence[Objective], logits: Tensor, targets: Tensor, tasks: Tensor, weights: Tensor
) -> Tensor:
    """Loss of scores or labels of several tasks: the mean of theirs, each weighed by its rows.

    :param logits: ``(N, C)``
    :param targets: ``(N,)``
    :param tasks: ``(N,)`` which objective is each row's
    :param weights: ``(N,)``
    """
    if len(objectives) == 1:
        return objectives[0].of_texts(logits, targets, weights)
    total = logits.sum() * 0.0  # a batch need not have rows of every task
    for i, objective in enumerate(objectives):
        rows = tasks == i
        if rows.any():
            loss = objective.of_texts(objective.own(logits[rows]), targets[rows], weights[rows])
            total = total + loss * weights[rows].sum() / weights.sum()
    return total


def class_weights_of(
    wanted: str | Mapping[str, float] | None, classes: Sequence[str], targets: np.ndarray
) -> Tensor | None:
    """``(C,)``, None where all classes weigh the same.

    :param wanted: ``"balanced"``, weights by class, or None
    :param targets: ``(N,)`` of the training rows
    :raises ValueError: if a class has no weight or none that is possible
    """
    if wanted is None:
        return None
    if wanted == "balanced":
        counts = np.bincount(targets.astype(np.int64), minlength=len(classes))
        if (counts == 0).any():
            missing = classes[int(np.argmin(counts))]
            raise ValueError(f"class_weights='balanced': no training row has the class {missing!r}")
        return torch.tensor(len(targets) / (len(counts) * counts), dtype=torch.float32)
    if not isinstance(wanted, Mapping) or set(wanted) != set(classes):
        raise ValueError(
            f"class_weights must be 'balanced' or have a weight for each of the classes {', '.join(classes)}, "
            f"got {wanted!r}"
        )
    weights = [wanted[name] for name in classes]
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"class_weights must be positive numbers, got {wanted!r}")
    return torch.tensor(weights, dtype=torch.float32)


def describe_outputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, objectives: Sequence[Objective]
) -> None:
    """Write into the configuration what the outputs are."""
    config = model.config
    if len(objectives) == 1 and not objectives[0].task.name:
        [only] = objectives
        names = only.output_names
        if only.loss != "cross_entropy":
            config.reward_activation = only.activation
        config.problem_type = {"cross_entropy": "single_label_classification", "bce": "multi_label_classification"}.get(
            only.loss, "regression"
        )  # with several labels transformers takes a sigmoid for each
    else:
        names = [f"{objective.task.name}:{name}" for objective in objectives for name in objective.output_names]
        config.problem_type = None
        config.reward_tasks = [
            {
                "name": objective.task.name,
                "kind": objective.task.kind,
                "first": objective.first,
                "labels": objective.output_names,
                "activation": None if objective.loss == "cross_entropy" else objective.activation,
            }
            for objective in objectives
        ]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    # transformers takes the last token that is not PAD for the end of a text; where PAD is EOS, as GPT-2's users have
    # it, it would pass over the EOS that was trained on. Without a PAD it reads one text at a time.
    pad = tokenizer.pad_token_id
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.pad_token_id = None if pad == tokenizer.eos_token_id else pad
