"""Show a language model what to write, then let it find out by itself: a supervised warm start, and PPO from there.

The reference completions are made on the spot: of eight that the embedded language model writes for each prompt, the
one that a judge likes best. Elsewhere they are people's, in a file of rows with a prompt and a completion:

    python examples/warm_start.py
    textgym sft my.jsonl --output warm && textgym train ppo --model warm      # the same from the shell
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium as gym
import numpy as np

from textgym.agents import PPO, warm_start
from textgym.embedded import WordSentiment, load_prompts
from textgym.evaluation import evaluate
from textgym.language_model import load_language_model
from textgym.rewards import as_reward


def reference_completions(prompts: list[str], samples: int = 8) -> list[dict[str, str]]:
    """Rows of a prompt and the completion that the judge likes best."""
    model, judge = load_language_model(), as_reward(WordSentiment())
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    judged = evaluate(model, model, judge, repeated, max_new_tokens=24, seed=0)
    best = np.asarray(judged.scores).reshape(-1, samples).argmax(1) + samples * np.arange(len(prompts))
    return [{"prompt": repeated[i], "completion": judged.completions[i]} for i in best.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=400, help="reference completions (default %(default)s)")
    parser.add_argument("--timesteps", type=int, default=16_384, help="tokens of PPO after that (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("warm"), help="a new directory")
    arguments = parser.parse_args()

    rows = reference_completions(load_prompts("train")[: arguments.rows])
    report = warm_start("embedded", rows, output=arguments.output, learning_rate=1e-4, progress_bar=True)
    print(
        f"perplexity of the completions: {report.perplexity_before:.1f} before, {report.perplexity_after:.1f} after "
        f"{report.best_epoch} passes over {report.training_rows} rows"
    )

    # The policy and the reference that it is held to both begin at the model that was just trained.
    envs = gym.make_vec("TextGen-v0", num_envs=32, language_model=str(arguments.output), max_new_tokens=24)
    agent = PPO("LanguageModelPolicy", envs, learning_rate=1e-4, seed=0).learn(arguments.timesteps)
    judge, prompts = as_reward(WordSentiment()), load_prompts("test")[:64]
    models = {
        "embedded": load_language_model(),
        "warm start": load_language_model(str(arguments.output)),
        "and PPO": agent.policy.language_model,
    }
    for name, model in models.items():
        scores = evaluate(model, models["embedded"], judge, prompts, max_new_tokens=24, seed=0).scores
        print(f"{name:>12}: judge's score on held-out prompts {np.mean(scores):+.2f}")


if __name__ == "__main__":
    main()
