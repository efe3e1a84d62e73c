"""What an optimizer is made with."""

from __future__ import annotations

from typing import Any

import torch


def optimizer_arguments(
    optimizer_class: type[torch.optim.Optimizer], optimizer_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """The optimizer's arguments; Adam's own step is a fifth of a small update unless it is fused."""
    adam = issubclass(optimizer_class, torch.optim.Adam | torch.optim.AdamW)
    if optimizer_kwargs is None:
        optimizer_kwargs = {"eps": 1e-5} if optimizer_class is torch.optim.Adam else {}  # as SB3 does
    if adam and not {"fused", "foreach", "capturable", "differentiable"} & set(optimizer_kwargs):
        optimizer_kwargs = {**optimizer_kwargs, "fused": True}
    return optimizer_kwargs
