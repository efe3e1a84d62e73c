"""Low-rank adapters (LoRA) on the backbone of a reward model: trained beside frozen weights, then merged into them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from textgym.engine.merging import merge_layers
from textgym.engine.trunk import trunk_of

ADAPTER = "default"  # what peft calls the one adapter of a model


def add_adapters(model: PreTrainedModel, rank: int) -> None:
    """Freeze the backbone, and put an adapter on each of its linear layers; the head is trained as it is.

    :param rank: of the adapters; their scale is 2
    :raises ModuleNotFoundError: without ``peft``
    :raises ValueError: if there is no linear layer that takes one
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'lora_rank needs the package peft: pip install "textgym[lora]"', name="peft"
        ) from error
    backbone = trunk_of(model)
    layers = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), backbone, ADAPTER)
    except (ValueError, TypeError) as error:
        raise ValueError(f"lora_rank={rank}: {type(model).__name__} takes no adapters: {error}") from error


def merge_adapters(model: PreTrainedModel) -> None:
    """Make the adapters a part of the weights; the model is then an ordinary one."""
    merge_layers(model, [ADAPTER])
    trunk: Any = trunk_of(model)
    if hasattr(trunk, "peft_config"):
        del trunk.peft_config
    model.requires_grad_(True)
