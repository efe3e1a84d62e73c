"""Log-probabilities and entropies of tokens from a linear head, with a backward pass that reads the logits once.

Written with torch's own functions, ``log_softmax``, ``gather`` and a sum over the vocabulary, the scores of N tokens
go through some ten tensors of N x V in fp32. Here the forward pass works in chunks that stay in a processor's cache
and keeps the probabilities alone, in the type of the matrix products; the gradient of a log-probability is a multiple
of them but for one place in each row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**18  # logits worked on at once: 1 MiB in fp32


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is nothing but a product with one matrix."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    # A sharded weight has a type of its own; so has one that is computed from others.
    if not isinstance(head, nn.Linear) or type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    bias: Tensor | None = head.bias
    return bias is None and not any(hooks)


class TokenScores(torch.autograd.Function):
    """Log-probability of a token and entropy of its distribution, from hidden states and the weights of a head.

    The entropies have no gradient. Under ``torch.autocast`` products are in its type. A second derivative is an error.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, scale: float, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(N,)`` and entropies ``(N,)``, in nats.

        :param hidden: ``(N, H)``
        :param weight: ``(V, H)`` of the head
        :param tokens: ``(N,)``
        :param scale: logits are multiplied by it
        :param allowed: ``(N, V)`` bool; the distribution is restricted to these tokens and renormalised
        """
        device = hidden.device.type
        narrow = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if narrow else weight.dtype
        probs = F.linear(hidden.to(dtype), weight.to(dtype))  # (N, V) logits at first
        log_probs, entropies = (torch.empty(len(tokens), device=hidden.device) for _ in range(2))
        size = max(1, CHUNK_ELEMENTS // len(weight)) if device == "cpu" else len(tokens)
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            logits = probs[part].float()  # (n, V)
            if scale != 1.0:
                logits = logits * scale
            if allowed is not None:
                logits = logits.masked_fill(~allowed[part], -torch.inf)
            log_p = torch.log_softmax(logits, -1)
            p = log_p.exp()
            log_probs[part] = log_p.gather(1, tokens[part, None])[:, 0]
            if allowed is not None:
                log_p = log_p.masked_fill(~allowed[part], 0.0)  # 0 · (−inf) is 0 here
            entropies[part] = -torch.linalg.vecdot(p, log_p)
            probs[part] = p
        ctx.save_for_backward(probs, hidden, weight, tokens)
        ctx.scale = scale
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """:raises RuntimeError: with ``create_graph=True``"""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: these log-probabilities have no second derivative; "
                "token_log_probs has one with entropy_gradient=True"
            )
        probs, hidden, weight, tokens = ctx.saved_tensors
        upstream = (ctx.scale * upstream).to(probs.dtype)  # (N,)
        gradient = probs * -upstream[:, None]  # (N, V)
        gradient[torch.arange(len(tokens), device=tokens.device), tokens] += upstream
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = (gradient @ weight.to(gradient.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.T @ hidden.to(gradient.dtype)).to(weight.dtype)
        return of_hidden, of_weight, None, None, None
