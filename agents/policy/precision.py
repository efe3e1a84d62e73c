"""The floating-point type that learning computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from textgym.model_sources import resolve_dtype

PLAIN_ATTENTION = 512  # tokens up to which attention in a smaller type is not fused on a CPU


def dtype_name(dtype: str | torch.dtype | None) -> str | None:
    """As a word, which every way of saving can store."""
    return None if dtype is None else str(resolve_dtype(dtype)).removeprefix("torch.")


def autocast_name(dtype: str | torch.dtype | None) -> str | None:
    """A type that learning can compute in, as a word.

    :raises ValueError: if it is another one
    """
    name = dtype_name(dtype)
    if name not in (None, "bfloat16", "float16"):
        raise ValueError(f"autocast={dtype!r} must be 'bfloat16', 'float16' or None")
    return name


@contextlib.contextmanager
def autocast(dtype: str, device: torch.device, plain_attention: bool) -> Iterator[None]:
    """Matrix products in a smaller type, from weights that stay as they are.

    :param dtype: ``"bfloat16"`` or ``"float16"``
    :param device: where they are computed
    :param plain_attention: on CPUs torch's fused attention is slow in these types; the plain one takes a sixth off an
        update, and holds ``(B, heads, L, L)`` scores
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, resolve_dtype(dtype)))
        if device.type == "cpu" and plain_attention:
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        yield
