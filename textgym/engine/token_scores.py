"""Log-probabilities and entropies of tokens from a linear head, with a backward pass that reads the logits once.

Written with torch's own functions, ``log_softmax``, ``gather`` and a sum over the vocabulary, the scores of N tokens
go through some ten tensors of N x V in fp32. Here the forward pass works in chunks that stay in a processor's cache
and keeps one, in the type of the matrix products: the probabilities, less one for the token itself, which are the
negative gradient of its log-probability. The backward pass makes no other: what comes from the loss, a number for each
token, is multiplied with the hidden states, which are a good deal narrower.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**19  # logits worked on at once: 2 MiB in fp32


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is nothing but a product with one matrix."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in vars(head):  # the latter where a library has put its own in the place of it
        return False
    # A sharded weight has a type of its own; so has one that is computed from others.
    if not isinstance(head, nn.Linear) or type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    bias: Tensor | None = head.bias
    return bias is None


def score_logits(
    logits: Tensor,
    tokens: Tensor,
    scale: float = 1.0,
    allowed: Tensor | None = None,
    with_entropy: bool = True,
    keep_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``(N,)`` and entropies ``(N,)``, in nats and fp32, without gradients.

    :param logits: ``(N, V)``
    :param tokens: ``(N,)``
    :param scale: logits are multiplied by it
    :param allowed: ``(N, V)`` bool; the distribution is restricted to these tokens and renormalised
    :param with_entropy: whether to compute the entropies; otherwise there are none, ``(0,)``
    :param keep_gradient: whether the negative gradients of the log-probabilities take the place of the logits, but for
        the scale
    """
    log_probs = torch.empty(len(tokens), device=logits.device)
    entropies = torch.empty(len(tokens) if with_entropy else 0, device=logits.device)
    size = max(1, CHUNK_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(tokens))
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        chunk = logits[part].float()  # (n, V)
        if scale != 1.0:
            chunk = chunk * scale
        if allowed is not None:
            chunk = chunk.masked_fill(~allowed[part], -torch.inf)
        log_p = torch.log_softmax(chunk, -1)
        log_probs[part] = log_p.gather(1, tokens[part, None])[:, 0]
        if not (with_entropy or keep_gradient):
            continue
        p = log_p.exp()
        if with_entropy:
            if allowed is not None:
                log_p = log_p.masked_fill(~allowed[part], 0.0)  # 0 · (−inf) is 0 here
            entropies[part] = -torch.linalg.vecdot(p, log_p)
        if keep_gradient:
            p[torch.arange(len(p), device=p.device), tokens[part]] -= 1
            logits[part] = p
    return log_probs, entropies


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
        kept = F.linear(hidden.to(dtype), weight.to(dtype))  # (N, V) logits at first
        log_probs, entropies = score_logits(kept, tokens, scale, allowed, keep_gradient=True)
        ctx.save_for_backward(kept, hidden, weight)
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
        kept, hidden, weight = ctx.saved_tensors
        factors = (-ctx.scale * upstream)[:, None]  # (N, 1)
        of_hidden = of_weight = None
        if ctx.needs_input_grad[0]:
            of_hidden = ((kept @ weight.to(kept.dtype)) * factors).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (kept.T @ (hidden * factors).to(kept.dtype)).to(weight.dtype)
        return of_hidden, of_weight, None, None, None
