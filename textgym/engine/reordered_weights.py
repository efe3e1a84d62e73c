"""Weights in the order in which a CPU multiplies them with a few rows in the least time.

A decode step multiplies each weight matrix with one vector a row. The library for matrix products brings the weights
into an order of its own each time, which so few rows do not make up for. In a rollout the weights stay as they are, so
it is enough to do it once: oneDNN's reordered weights, which ``torch.compile`` uses for frozen models, too. The
products differ from the usual ones in rounding, and a row's no longer depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# On processors with AVX2 only it was measured to take a sixth off the rollouts of a model of 135 million weights
# (benchmarks/reordered_weights.py, docs/speed.md). What it does on others has yet to be measured.
MEASURED_ON = "AVX2"
FEWEST_STEPS = 32  # for fewer, bringing the weights into order takes longer than it saves
ROWS = range(4, 257)  # fewer or more rows gain nothing
SMALLEST = 2**15  # weights of a layer; a call of oneDNN's takes longer than the product of a smaller one


class ReorderedWeights:
    """A context in which linear layers multiply with reordered weights, where no gradient is wanted.

    It may be entered again and again; the reordered weights, as many bytes as the weights themselves, are kept from
    their first use to :meth:`forget`. Weights that have changed are brought into order again. ::

        with language_model.reordered_weights(rows=32, steps=48):
            ...  # decode steps

    :param layers: modules; what is none of torch's own linear layers in fp32 on a CPU stays as it is
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        chosen = (layer for layer in layers if isinstance(layer, nn.Linear) and can_be_reordered(layer))
        self._products = [(layer, _Product(layer)) for layer in chosen]

    def __len__(self) -> int:
        """How many layers have reordered weights."""
        return len(self._products)

    def __enter__(self) -> None:
        for layer, product in self._products:
            layer.__dict__["forward"] = product

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, _ in self._products:
            del layer.__dict__["forward"]

    def forget(self) -> None:
        """Drop the reordered weights, to be made again if there is another use."""
        for _, product in self._products:
            product.forget()


class _Product:
    """The forward of a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self.forget()

    def forget(self) -> None:
        self._of: tuple[int, int] | None = None  # address and version of the weights that are reordered
        self._reordered: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() or rows not in ROWS or not x.dtype == weight.dtype == torch.float32:
            return F.linear(x, weight, bias)
        now = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        if now != self._of:
            self._reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
            self._of = now
        product: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self._reordered, bias, "none", [], "")
        return product


def can_be_reordered(layer: nn.Linear) -> bool:
    """Whether it is of torch's own kind, in fp32 on a CPU, large enough, and with a forward that nobody has changed."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    weight = layer.weight
    # A sharded weight has a type of its own; so has one that is computed from others.
    plain = type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32
    return plain and weight.numel() >= SMALLEST


def worth_reordering(rows: int, steps: int) -> bool:
    """Whether decode steps take less time with reordered weights on this processor.

    :param rows: that take part in a step
    :param steps: for which the weights stay as they are
    """
    # torch has no public name for these products, and one of its versions may be without them.
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    measured = torch.backends.cpu.get_cpu_capability() == MEASURED_ON
    return there and measured and steps >= FEWEST_STEPS and rows in ROWS
