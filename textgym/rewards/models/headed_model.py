"""A transformer with a head of its own: an MLP on one state of a text, or convolutions over the states of its tokens.

``AutoModelForSequenceClassification`` knows only the heads that its architectures come with, nearly always a linear
layer. A model with another head has the type ``textgym_reward_model``; importing this module is what teaches the Auto
classes to open it.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import output_capturing

CustomHead = Literal["mlp", "cnn"]
HeadLayers = Literal["last", "all"]
MODEL_TYPE = "textgym_reward_model"
KERNEL_SIZES = (2, 3, 4)  # tokens that a convolution sees at once


class HeadedConfig(PreTrainedConfig):
    """What a :class:`HeadedRewardModel` is built from.

    :param text_config: configuration of the backbone
    :param head: ``"mlp"`` or ``"cnn"``
    :param head_size: hidden units of the MLP, or filters of each kernel size of the CNN
    :param head_dropout: of the head, while training
    :param head_layers: whose states the head reads: those of the ``"last"`` layer, or those of ``"all"``, embeddings
        included, side by side
    :param pooling: which state of a text an MLP reads: ``"last"`` (of a causal backbone) or ``"mean"`` (of an encoder)
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        head: CustomHead = "mlp",
        head_size: int = 128,
        head_dropout: float = 0.1,
        head_layers: HeadLayers = "last",
        pooling: Literal["last", "mean"] = "mean",
        **options: Any,
    ) -> None:
        built: Any = AutoConfig.for_model(**text_config) if isinstance(text_config, dict) else text_config
        self.text_config = built
        self.head = head
        self.head_size = head_size
        self.head_dropout = head_dropout
        self.head_layers = head_layers
        self.pooling = pooling
        # Otherwise the backbone's configuration would be told to forget how it computes attention.
        options.setdefault("attn_implementation", getattr(self.text_config, "_attn_implementation", None))
        super().__init__(**options)

    @property
    def state_size(self) -> int:
        """H, the width of what the head reads of a token."""
        layers = 1 + int(self.text_config.num_hidden_layers) if self.head_layers == "all" else 1
        return layers * int(self.text_config.hidden_size)

    @property
    def reads_one_state(self) -> bool:
        """Whether the head reads what steppers give: the last layer's state at the last token."""
        return self.head == "mlp" and self.head_layers == "last" and self.pooling == "last"


class MLPHead(nn.Module):
    """LayerNorm, which makes states of any backbone alike in size; a hidden layer; the outputs."""

    def __init__(self, hidden_size: int, size: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.hidden = nn.Linear(hidden_size, size)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(size, outputs)

    def forward(self, states: Tensor) -> Tensor:
        """Outputs ``(..., C)`` of states ``(..., H)``."""
        return self.out(self.dropout(functional.gelu(self.hidden(self.norm(states)))))


class CNNHead(nn.Module):
    """Convolutions over the states of 2, 3 and 4 tokens, the maximum of each filter over the text, and the outputs.

    Kim 2014, "Convolutional Neural Networks for Sentence Classification", on the states of a transformer. A filter
    looks back, never ahead, and the maximum is over the tokens so far: on a causal backbone every prefix of a text has
    the score that it would have alone.
    """

    def __init__(self, hidden_size: int, size: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.convolutions = nn.ModuleList(nn.Conv1d(hidden_size, size, kernel) for kernel in KERNEL_SIZES)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(size * len(KERNEL_SIZES), outputs)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Outputs ``(B, C)`` of texts.

        :param states: ``(B, L, H)``
        :param mask: ``(B, L)`` 1 for tokens, which stand before the padding
        """
        return self.out(self.dropout(self._filters(states, mask).amax(1)))

    def everywhere(self, states: Tensor, mask: Tensor) -> Tensor:
        """Outputs ``(B, L, C)`` of each prefix."""
        return self.out(self.dropout(self._filters(states, mask).cummax(1).values))

    def _filters(self, states: Tensor, mask: Tensor) -> Tensor:
        """What each filter finds at each token, ``(B, L, F)``; 0 in the padding."""
        rows = self.norm(states).transpose(1, 2)  # (B, H, L)
        sized = zip(KERNEL_SIZES, self.convolutions, strict=True)
        found = [layer(functional.pad(rows, (kernel - 1, 0))) for kernel, layer in sized]
        return torch.relu(torch.cat(found, 1)).transpose(1, 2) * mask[:, :, None]


class HeadedRewardModel(PreTrainedModel):
    """A backbone, and a head called ``score``.

    :param config: what it is built from
    :param backbone: one that there is already; otherwise one is built
    """

    config_class = HeadedConfig
    base_model_prefix = "backbone"
    # How attention is computed is the backbone's affair: whatever it may be, nothing here stands against it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HeadedConfig, backbone: PreTrainedModel | None = None) -> None:
        attention = config.text_config._attn_implementation
        super().__init__(config)
        config.text_config._attn_implementation = attention  # the line above has put the default of this class there
        kind = {"mlp": MLPHead, "cnn": CNNHead}[config.head]
        self.score = kind(config.state_size, config.head_size, config.num_labels, config.head_dropout)
        self.post_init()
        # Behind post_init, which draws weights anew.
        self.backbone = AutoModel.from_config(config.text_config) if backbone is None else backbone

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        state["_modules"] = {**self._modules, "backbone": _without_capturing_hooks(self.backbone)}
        return state

    @classmethod
    def around(
        cls,
        backbone: PreTrainedModel,
        head: CustomHead,
        outputs: int,
        causal: bool,
        size: int | None = None,
        dropout: float = 0.1,
        layers: HeadLayers = "last",
    ) -> HeadedRewardModel:
        """A new head, drawn at random, on a backbone.

        :param size: hidden units of an MLP, by default as many as the backbone's states have; or filters of each
            kernel size of a CNN, by default 100
        """
        hidden_size = int(backbone.config.hidden_size)
        config = HeadedConfig(
            text_config=backbone.config,
            head=head,
            head_size=size or (hidden_size if head == "mlp" else 100),
            head_dropout=dropout,
            head_layers=layers,
            pooling="last" if causal else "mean",
            num_labels=outputs,
        )
        model = cls(config, backbone)
        for layer in model.score.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d)):  # N(0, 1/√(d+1)), as Huang et al. 2023 draw reward heads
                nn.init.normal_(layer.weight, std=(layer.weight[0].numel() + 1) ** -0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        return model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Outputs ``(B, C)`` of texts, padded on the right.

        :param input_ids: ``(B, L)``
        :param attention_mask: ``(B, L)``, by default all ones
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token_type_ids is not None:
            options["token_type_ids"] = token_type_ids
        states = self.states(input_ids, mask, **options)
        if self.config.head == "cnn":
            return SequenceClassifierOutput(logits=self.score(states, mask))
        return SequenceClassifierOutput(logits=self.score(self.pooled(states, mask)))

    def states(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """What the head reads of each token, ``(B, L, H)``."""
        every = self.config.head_layers == "all"
        if every:
            options["output_hidden_states"] = True
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **options)
        return torch.cat(output.hidden_states, -1) if every else output.last_hidden_state

    def pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """The one state ``(B, H)`` of each text that an MLP reads."""
        if self.config.pooling == "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
        weights = mask[:, :, None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1)


def _without_capturing_hooks(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same weights, and without what can't be pickled.

    Asked for the states of all layers, transformers leaves functions in a model that are defined inside another. It
    makes them anew where they are missing.
    """
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for module in twin.modules():
        vars(module).pop("_output_capturing_hooks_installed", None)
        for number, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__module__", None) == output_capturing.__name__:
                del module._forward_hooks[number]
    return twin


AutoConfig.register(MODEL_TYPE, HeadedConfig)
AutoModelForSequenceClassification.register(HeadedConfig, HeadedRewardModel)
