"""The value head: from the transformer's hidden states to the values of states."""

from __future__ import annotations

from torch import nn

VALUE_HEADS = ("linear", "mlp")
VALUE_TRUNKS = ("shared", "detached")


def new_value_net(kind: str, width: int) -> nn.Module:
    """From hidden states ``(B, H)`` to values ``(B, 1)``, all of which are 0 at the start.

    :param kind: one of ``VALUE_HEADS``
    :param width: H
    """
    last = nn.Linear(width, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return last if kind == "linear" else nn.Sequential(nn.Linear(width, width), nn.Tanh(), last)
