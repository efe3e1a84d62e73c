"""Activations that are computed again in the backward pass instead of being kept (Chen et al. 2016).

``transformers`` does this for models in training mode only, which would switch dropout on, too. Here it is a property
of one forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a Hugging Face model that can be computed again: its transformer blocks."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def check_checkpointable(model: nn.Module) -> None:
    """:raises ValueError: if a model has no such layers"""
    if not checkpointable_layers(model):
        raise ValueError(
            f"gradient_checkpointing=True: {type(model).__name__} has no layers that transformers can compute again"
        )


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Forwards in this context keep what enters each transformer block and nothing of what happens in it."""
    layers = checkpointable_layers(model)
    for layer in layers:
        forward = type(layer).forward.__get__(layer)
        layer.__dict__["forward"] = functools.partial(
            checkpoint, forward, use_reentrant=False, preserve_rng_state=False
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]
