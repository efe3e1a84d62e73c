"""How far back the layers of a model see: everything, a window, or the piece of text that they are in.

Layers of one model may differ: of Gemma 3's one in six sees everything, the others a window. ``config.layer_types``
names the kind of each, and such models take one attention mask for each name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

STATE_LAYERS = ("linear_attention", "conv")  # what layers that attend to nothing are called


@dataclass(frozen=True)
class Reach:
    """How far back a layer's attention sees.

    - ``window``: how many tokens, the newest among them; None for all
    - ``chunk``: into how long pieces the text is cut, beyond whose beginning nothing is seen; None for one piece
    """

    window: int | None = None
    chunk: int | None = None

    def visible(self, queries: Tensor, keys: Tensor) -> Tensor:
        """``(B, T, K)`` bool, which tokens each token attends to.

        :param queries: ``(B, T)`` their positions
        :param keys: ``(K,)`` or ``(B, 1, K)`` positions of what they may attend to
        """
        newest = queries[:, :, None]
        visible = keys <= newest
        if self.window is not None:
            visible = visible & (keys > newest - self.window)
        if self.chunk is not None:
            every = torch.div(keys, self.chunk, rounding_mode="floor")
            visible = visible & (every == torch.div(newest, self.chunk, rounding_mode="floor"))
        return visible

    def within(self, context: int) -> Reach:
        """The same for rows of at most ``context`` tokens; what is as long as they are doesn't limit anything."""

        def limits(size: int | None) -> int | None:
            return size if size is not None and size < context else None

        return Reach(limits(self.window), limits(self.chunk))


FULL = Reach()


def attention_reach(config: PreTrainedConfig, context: int) -> Reach | dict[str, Reach | None]:
    """How far back attention sees in rows of at most ``context`` tokens.

    :return: of all layers, or of each kind of layer where they differ; None for those that attend to nothing
    """
    text: Any = config.get_text_config(decoder=True)
    window = Reach(window=_positive(text, "sliding_window")).within(context)
    chunk = Reach(chunk=_positive(text, "attention_chunk_size")).within(context)
    layer_types = getattr(text, "layer_types", None)
    if layer_types is None:
        if not getattr(text, "use_sliding_window", True):
            window = FULL
        return window if window != FULL else chunk
    kinds: dict[str, Reach | None] = {"full_attention": FULL}
    for kind in layer_types:
        kinds[kind] = window if "sliding" in kind else chunk if "chunked" in kind else FULL
    # Layers that attend and keep a state, too, look up two masks.
    kinds.update(dict.fromkeys(STATE_LAYERS))
    # Where nothing is cut off, one mask is right for all, and models that know no masks by name take it, too.
    return kinds if any(reach not in (None, FULL) for reach in kinds.values()) else FULL


def _positive(config: Any, name: str) -> int | None:
    size = getattr(config, name, None)
    return int(size) if size is not None and size > 0 else None
