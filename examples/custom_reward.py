"""Plug in a reward of your own: one Python function, trained on in a minute or two.

A reward has the signature of TRL's reward functions. It gets prompts and completions as texts and returns one number
for each; textgym calls it on every prefix and pays the differences, so each token gets its own credit. This one wants
words that begin with the letter s:

    python examples/custom_reward.py
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym

from textgym.agents import PPO
from textgym.embedded import load_prompts
from textgym.evaluation import evaluate
from textgym.language_model import load_language_model
from textgym.rewards import as_reward


def words_with_s(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Share of the words that begin with s, counted up to a third of them: from 0 to 1.

    Without the cap the best text would be one word over and over; short texts count as if they had six words.
    """
    words = [completion.split() for completion in completions]
    shares = [sum(word.startswith("s") for word in some) / max(len(some), 6) for some in words]
    return [min(3 * share, 1.0) for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timesteps", type=int, default=24_576, help="tokens to train on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    envs = gym.make_vec("TextGen-v0", num_envs=64, reward=words_with_s, max_new_tokens=24, kl_coef=0.05)
    model = PPO("LanguageModelPolicy", envs, n_steps=24, batch_size=512, learning_rate=2e-4, seed=arguments.seed)

    reference, prompts = load_language_model(), load_prompts("test")[:128]

    def measure() -> tuple[list[str], float, float]:
        result = evaluate(
            model.policy.language_model, reference, as_reward(words_with_s), prompts, max_new_tokens=24, seed=1
        )
        return result.completions, float(result.scores.mean()), float(result.kl.mean())

    before, score_before, _ = measure()
    model.learn(arguments.timesteps, progress_bar=True)
    after, score_after, kl = measure()
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:6]:
        print(f"\n{prompt} ...\n  before: {old.strip()}\n  after:  {new.strip()}")
    print(f"\nreward on held-out prompts: {score_before:.3f} before, {score_after:.3f} after")
    print(f"KL to the original model: {kl:.1f} nats per text")


if __name__ == "__main__":
    main()
