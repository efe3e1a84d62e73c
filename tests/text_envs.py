"""Small text environments, and what they should pay computed another way, for the tests of the environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny_models import tiny_causal_reward_model, tiny_model, tiny_tokenizer

import textgym  # noqa: F401  registers TextGen-v0
from textgym.envs import TextGenVectorEnv
from textgym.language_model import LanguageModel
from textgym.rewards import FunctionReward, Reward
from textgym.rewards.models.causal import CausalRewardModel

TOKENIZER = tiny_tokenizer()
LANGUAGE_MODEL = LanguageModel(tiny_model("llama"), TOKENIZER)
REWARD_MODEL = CausalRewardModel(tiny_causal_reward_model(), TOKENIZER)
PROMPTS = ["the film", "a great movie is", "story", "we love this very funny plot and"]


def text_score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that every token changes in its own way."""
    return [_score(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def _score(prompt: str, completion: str) -> float:
    return len(prompt) / 10 + sum((7 * i + ord(c)) % 23 for i, c in enumerate(completion)) / 20


REWARDS: dict[str, Reward] = {
    "function": FunctionReward(text_score),
    "causal": REWARD_MODEL,
    "composed": 0.5 * REWARD_MODEL + FunctionReward(text_score).clip(-3, 9),
}
MASKING: dict[str, Any] = {"action_masking": True, "top_k": 20, "min_new_tokens": 3}
DEFAULTS: dict[str, Any] = {
    "language_model": LANGUAGE_MODEL,
    "prompts": PROMPTS,
    "reward": text_score,
    "max_new_tokens": 8,
    "max_prompt_tokens": 12,
}


def make(**options: Any) -> gym.Env:
    """A single environment on the tiny models."""
    return gym.make("TextGen-v0", **{**DEFAULTS, **options})


def make_vec(num_envs: int, **options: Any) -> TextGenVectorEnv:
    """A vector environment on the tiny models."""
    envs = gym.make_vec(
        "TextGen-v0",
        num_envs=num_envs,
        vectorization_mode="vector_entry_point",
        **{**DEFAULTS, **options},
    )
    assert isinstance(envs, TextGenVectorEnv)
    return envs


def ids(text: str) -> list[int]:
    """Token ids of words, ``<eos>`` and the like included."""
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def play(env: gym.Env, tokens: Sequence[int], log_probs: Sequence[float] | None = None) -> list[tuple[Any, ...]]:
    """Take the steps, until the end if that comes sooner; returns what ``step`` gave each time."""
    steps = []
    for i, token in enumerate(tokens):
        if log_probs is not None:
            env.unwrapped.report_log_prob(log_probs[i])
        steps.append(env.step(token))
        if steps[-1][2] or steps[-1][3]:
            break
    return steps


def phi(reward: str, prompt: Sequence[int], completion: Sequence[int], tokenizer: Any = TOKENIZER) -> float:
    """Φ of a text under one of ``REWARDS``, from its definition."""
    if reward == "composed":
        text = phi("function", prompt, completion, tokenizer)
        return 0.5 * phi("causal", prompt, completion, tokenizer) + min(max(text, -3), 9)
    if reward == "causal":
        model = REWARD_MODEL.model
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state
            return float(model.score(hidden[0, -1]))
    start = tokenizer.decode(prompt, skip_special_tokens=True)
    text = tokenizer.decode([*prompt, *completion], skip_special_tokens=True)
    assert text.startswith(start)
    return _score(start, text[len(start) :])


@torch.no_grad()
def reference_log_probs(
    prompt: Sequence[int],
    completion: Sequence[int],
    temperature: float = 1.0,
    masks: np.ndarray | None = None,
    model: LanguageModel = LANGUAGE_MODEL,
) -> np.ndarray:
    """``(T,)`` log π_ref of the completion's tokens from one plain forward.

    :param masks: ``(T, V)`` the actions that were allowed
    """
    text = torch.tensor([[*prompt, *completion]])
    logits = model.model(input_ids=text).logits[0, len(prompt) - 1 : -1].double() / temperature
    if masks is not None:
        logits[torch.as_tensor(masks) == 0] = -torch.inf
    log_probs = logits - logits.exp().sum(1, keepdim=True).log()
    return log_probs[torch.arange(len(completion)), torch.tensor(completion)].numpy()


def random_actions(
    rng: np.random.Generator, envs: TextGenVectorEnv, eos_weight: float = 1.3
) -> tuple[np.ndarray, np.ndarray]:
    """``(N,)`` tokens, allowed ones where actions are masked, and log-probabilities ``(N,)`` to go with them.

    :param eos_weight: how much likelier than another token the end-of-sequence token is
    """
    weights = rng.random((envs.num_envs, envs.vocab_size))
    weights[:, envs.vocabulary.eos_token_id] *= eos_weight
    if envs.masking:
        weights *= envs.action_masks()
    return weights.argmax(1), -3 * rng.random(envs.num_envs)


COLUMNS = [{"prompt": prompt, "answer": float(i)} for i, prompt in enumerate(PROMPTS)]


def graded(prompts: list[str], completions: list[str], answer: list[float], **columns: Any) -> list[float]:
    """A reward that reads the column of :data:`COLUMNS`."""
    return [a * len(c) / 10 for a, c in zip(answer, completions, strict=True)]


# Options that exercise everything a step does, in a few combinations.
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"reward": REWARDS["causal"]},
    "composed, every 3": {"reward": REWARDS["composed"], "reward_every": 3, "kl_estimator": "k3"},
    "at the end": {"reward": REWARDS["composed"], "reward_every": "end", "missing_eos_penalty": 0.4},
    "masked": {"reward": REWARDS["causal"], **MASKING, "temperature": 0.7, "kl_estimator": "k2"},
    "stopping": {"stop": ["!", "e f"], "min_new_tokens": 2, "missing_eos_penalty": 0.4, "reward_every": 2},
    "no reference": {"kl_coef": 0},
    "columns": {"prompts": COLUMNS, "reward": graded},
    "short": {"max_new_tokens": 1},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
