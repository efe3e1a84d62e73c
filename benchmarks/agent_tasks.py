"""Three tasks on which agents are compared, and what is measured of a model on them.

``alphabet``: after a letter come the six letters that follow it (``c`` → ``d e f g h a``; a follows h). The model is a
small Llama with random weights and a vocabulary of 8 letters and 4 special tokens. Φ of a prefix is the share of the
six places that are right so far: the best score is 1, and tokens drawn at random have about 0.06.

``alphabet-end``: the same, with the reward for the finished text only (``reward_every="end"``).

``reviews``: the default environment, as in the quickstart: film reviews, positive ones are rewarded, with a KL penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgym.embedded import WordSentiment, load_prompts
from textgym.envs import TextGenVectorEnv
from textgym.evaluation import evaluate
from textgym.language_model import LanguageModel, load_language_model
from textgym.rewards import as_reward

LETTERS = "abcdefgh"
PLACES = 6
ROWS = 32


@dataclass(frozen=True)
class AgentTask:
    """A task.

    :param name: of it
    :param budget: tokens to train on
    :param rates: learning rates among which each agent's is chosen
    """

    name: str
    budget: int
    rates: tuple[float, ...]

    def environment(self, seed: int) -> TextGenVectorEnv:
        """32 rows of the task."""
        if self.name == "reviews":
            options: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 8, "kl_coef": 0.05, "prompts": "train"}
        else:
            options = {
                "language_model": letter_model(),
                "prompts": list(LETTERS),
                "reward": right_letters,
                "reward_every": "end" if self.name == "alphabet-end" else 1,
                "max_new_tokens": PLACES,
                "kl_coef": 0.01,
            }
        made = gym.make_vec(
            "TextGen-v0", num_envs=ROWS, vectorization_mode="vector_entry_point", seed=seed, device="cpu", **options
        )
        assert isinstance(made, TextGenVectorEnv)
        return made

    def measures(self, model: LanguageModel) -> dict[str, float]:
        """Score, KL and what else says how good a model's texts are, on prompts that are the same for all."""
        if self.name == "reviews":
            prompts: Any = load_prompts("test")[:128]
            reference, reward = load_language_model(), as_reward(None)
            options = {"max_new_tokens": 24, "min_new_tokens": 8}
        else:
            prompts, reference, reward = list(LETTERS) * 16, letter_model(), as_reward(right_letters)
            options = {"max_new_tokens": PLACES}
        evaluation = evaluate(model, reference, reward, prompts, seed=1, **options)
        figures = {name: float(evaluation.figures()[name]) for name in ("score", "kl", "distinct_2", "length")}
        if self.name == "reviews":
            judged = WordSentiment()(prompts=evaluation.prompts, completions=evaluation.completions)
            figures["judge"] = sum(judged) / len(judged)
        return figures


TASKS = {
    "alphabet": AgentTask("alphabet", 49_152, (3e-4, 1e-3, 3e-3)),
    "alphabet-end": AgentTask("alphabet-end", 49_152, (3e-4, 1e-3, 3e-3)),
    "reviews": AgentTask("reviews", 12_288, (1e-4, 3e-4)),
}


def right_letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of the six places that have the letter which follows, in the alphabet's circle of eight."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        start = LETTERS.index(prompt.strip())
        right = [LETTERS[(start + place + 1) % len(LETTERS)] for place in range(PLACES)]
        written = completion.split()[:PLACES]
        scores.append(sum(a == b for a, b in zip(written, right, strict=False)) / PLACES)
    return scores


def letter_model() -> LanguageModel:
    """A Llama of 64 × 2 with random weights, the same each time."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(LlamaForCausalLM(config), tokenizer)
