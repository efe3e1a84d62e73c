"""The work that all contenders do, and the random models they do it with.

Nothing here comes from textgym: a peer imports this file in a virtual environment of its own, where textgym is not
installed. torch and transformers are imported where they are used, because the driver needs neither.

Two shapes of work. *Fixed*: the end-of-sequence token ends nothing and every completion is as long as the budget.
*Ragged*: it ends completions, at random and equally likely at each place, so that lengths are geometric with a mean of
a quarter of the budget, as with real text; only the tokens up to it are counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

PAD, EOS, BOS, UNK = range(4)
GROUP = 8  # completions of a prompt, where they are compared with each other
RAGGED_SHARE = 4  # a ragged completion has on average the budget divided by this
END_WIDTH = 10.0  # length of the bias that makes all hidden states alike; without it they are about 0.5 long


@dataclass(frozen=True)
class Workload:
    """One PPO iteration: so many prompts, so many tokens, a model of this shape, so many passes over the rollout.

    :param rows: prompts side by side
    :param prompt_tokens: tokens of each prompt
    :param new_tokens: most tokens of a completion, its budget T
    :param hidden: width of the model, H
    :param layers: transformer layers
    :param heads: attention heads
    :param kv_heads: key-value heads
    :param mlp: width of the MLP
    :param vocab: size of the vocabulary, V
    :param tied: whether the head is the transposed embedding
    :param epochs: passes over a rollout
    :param minibatches: optimizer steps in a pass
    :param kl_coef: weight of the KL penalty
    :param lr: learning rate
    :param ragged: whether the end-of-sequence token ends completions
    :param steps: tokens that a row of a continuous batch generates in an iteration; 0 for the budget T, PPO's default:
        where completions end early, the row goes on with the next one. ``T // 4`` gives ragged iterations as many real
        tokens as those have who wait for the longest row
    :param context: most tokens of a text; 0 for prompt and completion
    :param dtype: ``float32`` or ``bfloat16``
    :param device: ``cpu`` or ``cuda``
    :param threads: of torch
    :param compile: whether those may compile who do
    :raises ValueError: if a number is impossible or two do not fit each other
    """

    rows: int = 32
    prompt_tokens: int = 8
    new_tokens: int = 48
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    mlp: int = 1024
    vocab: int = 4096
    tied: bool = False
    epochs: int = 4
    minibatches: int = 4
    kl_coef: float = 0.05
    lr: float = 3e-6
    ragged: bool = False
    steps: int = 0
    context: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 2
    compile: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, low = (
                getattr(self, field.name),
                {"steps": 0, "context": 0, "new_tokens": 2, "vocab": 8}.get(field.name, 1),
            )
            if field.type == "int" and (not isinstance(value, int) or value < low):
                raise ValueError(f"{field.name}={value!r} must be a whole number, at least {low}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'")
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"heads={self.heads} must divide hidden={self.hidden} into even parts, and kv_heads={self.kv_heads} "
                "must divide heads"
            )
        if self.rows % self.minibatches:
            raise ValueError(f"rows={self.rows} must be a multiple of minibatches={self.minibatches}")
        if self.ragged and self.new_tokens % RAGGED_SHARE + (self.new_tokens == RAGGED_SHARE):
            raise ValueError(
                f"new_tokens={self.new_tokens} must be a multiple of {RAGGED_SHARE}, and more, for ragged completions"
            )

    @property
    def end_probability(self) -> float:
        """Probability p of the end-of-sequence token at each place."""
        return RAGGED_SHARE / self.new_tokens if self.ragged else 0.0

    @property
    def mean_tokens(self) -> int:
        """Tokens of a completion on average, were there no budget; in the fixed work the budget."""
        return self.new_tokens // RAGGED_SHARE if self.ragged else self.new_tokens

    @property
    def expected_length(self) -> float:
        """Tokens of a completion on average, the end-of-sequence token among them, cut at the budget."""
        p = self.end_probability
        return (1 - (1 - p) ** self.new_tokens) / p if p else float(self.new_tokens)

    @property
    def rollout_steps(self) -> int:
        """Tokens that a row of a continuous batch generates in an iteration."""
        return self.steps or self.new_tokens

    @property
    def minibatch_tokens(self) -> int:
        """Trained tokens to an optimizer step."""
        return self.rows * self.rollout_steps // self.minibatches

    @property
    def trunk_parameters(self) -> int:
        """Weights that every forwarded token is multiplied with: attention and MLP, without embedding and head."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * (self.hidden // self.heads) * self.kv_heads
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def name(self) -> str:
        return "ragged" if self.ragged else "fixed"

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.prompt_tokens} + {self.new_tokens} tokens ({self.name}), Llama {self.hidden} x "
            f"{self.layers}, vocabulary {self.vocab:,}, {self.epochs} x {self.minibatches} optimizer steps, "
            f"{self.dtype}, {self.device}, {self.threads} threads"
        )

    def replace(self, **changes: Any) -> Workload:
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One line that :meth:`from_json` reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """:raises TypeError: if it has a field that a workload lacks"""
        return cls(**json.loads(text))

    def memory_bound_tokens_per_s(self, bytes_per_s: float) -> float:
        """Decoded tokens a second if reading each weight once a step, and each row's cache, were all the time it took.

        :param bytes_per_s: the device's memory bandwidth
        """
        width = 2 if self.dtype == "bfloat16" else 4  # bytes
        weights = self.trunk_parameters + self.hidden * self.vocab
        context = self.prompt_tokens + self.mean_tokens / 2  # on average
        cache = self.rows * context * self.layers * 2 * self.kv_heads * (self.hidden // self.heads)
        return self.rows * bytes_per_s / ((weights + cache) * width)


PRESETS = {
    "small": Workload(),
    # The shape of SmolLM2-135M.
    "135m": Workload(hidden=576, layers=30, heads=9, kv_heads=3, mlp=1536, vocab=49_152, tied=True),
}


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenizer(workload: Workload) -> PreTrainedTokenizerFast:
    """A word a token: ``w4 w5 ...``; the first four ids are special."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = {"[PAD]": PAD, "[EOS]": EOS, "[BOS]": BOS, "[UNK]": UNK}
    words = Tokenizer(WordLevel({**special, **{f"w{i}": i for i in range(4, workload.vocab)}}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        eos_token="[EOS]",
        bos_token="[BOS]",
        unk_token="[UNK]",
        padding_side="left",  # TRL wants it
    )


def prompt_ids(workload: Workload, count: int, seed: int = 0) -> list[list[int]]:
    """:return: so many prompts of ``prompt_tokens`` tokens each, none of them special"""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, workload.vocab, (count, workload.prompt_tokens), generator=generator).tolist()


def prompt_texts(workload: Workload, count: int, seed: int = 0) -> list[str]:
    """:return: the same as texts"""
    return [" ".join(f"w{token}" for token in ids) for ids in prompt_ids(workload, count, seed)]


def model_config(workload: Workload, **more: Any) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=workload.vocab,
        hidden_size=workload.hidden,
        intermediate_size=workload.mlp,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.kv_heads,
        max_position_embeddings=workload.context or workload.prompt_tokens + workload.new_tokens,
        tie_word_embeddings=workload.tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
        **more,
    )


def language_model(workload: Workload, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights, in fp32; in the ragged work one that ends completions as often as is wanted."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(model_config(workload, mlp_bias=workload.ragged)).eval()
    if workload.ragged:
        _make_end_likely(model, workload.end_probability)
    return model


def _make_end_likely(model: Any, p: float) -> None:
    """Give the end-of-sequence token about the probability ``p`` at every place, whatever was written.

    A long bias e in the last MLP outweighs all that random weights compute, so that behind the last normalisation every
    hidden state is about √H·e, with the same logits everywhere.
    """
    import torch

    with torch.no_grad():
        bias = model.model.layers[-1].mlp.down_proj.bias  # (H,)
        direction = torch.randn(len(bias))
        direction /= direction.norm()
        bias.copy_(END_WIDTH * direction)
        head = model.lm_head.weight  # (V, H)
        width = math.sqrt(len(bias))
        others = head @ (width * direction)  # (V,) logits, those of the end of sequence to be replaced
        others[EOS] = -torch.inf
        logit = torch.logsumexp(others, 0) + math.log(p / (1 - p))
        head[EOS] = logit / width * direction


def scalar_model(workload: Workload, seed: int = 1) -> LlamaForSequenceClassification:
    """A model of the same size with one output, random weights, fp32: a reward model, or a critic."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    return LlamaForSequenceClassification(model_config(workload, num_labels=1)).eval()


def real_tokens(completions: torch.Tensor) -> int:
    """Tokens up to and with the first end of sequence of each row, and all of a row that has none.

    :param completions: ``(B, T)`` token ids
    """
    ended = (completions == EOS).cumsum(1)
    before_or_at_end = ended - (completions == EOS).long() == 0
    return int(before_or_at_end.sum())
