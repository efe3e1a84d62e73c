"""Train a reward model, and use it in the environment.

What it learns from is made on the spot: the embedded language model continues prompts, and a judge that counts words
scores the texts, as people or a large model would elsewhere. The file of scores is what `textgym train-reward` reads:

    python examples/train_reward.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gymnasium as gym
from rich.console import Console

from textgym.embedded import WordSentiment, load_prompts
from textgym.evaluation import evaluate
from textgym.language_model import load_language_model
from textgym.reward_training import report_table, train_reward
from textgym.rewards import as_reward


def write_scores(path: Path, number: int) -> None:
    """Continuations of ``number`` prompts, and the judge's scores of the texts, from -1 to 1."""
    model, prompts = load_language_model(), load_prompts("train")[:number]
    judged = evaluate(model, model, as_reward(WordSentiment()), prompts, max_new_tokens=24, seed=0)
    with path.open("w", encoding="utf-8") as file:
        for prompt, completion, score in zip(prompts, judged.completions, judged.scores, strict=True):
            row = {"prompt": prompt, "completion": completion, "score": max(-1.0, min(1.0, float(score) / 4))}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=int, default=2000, help="texts to learn from (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("reward_model"), help="a new directory")
    arguments = parser.parse_args()

    scores = arguments.output.with_suffix(".jsonl")
    scores.parent.mkdir(parents=True, exist_ok=True)
    write_scores(scores, arguments.texts)
    report = train_reward(
        scores,
        arguments.output,
        activation="tanh",  # Φ is then from -1 to 1
        learning_rate=5e-4,
        epochs=arguments.epochs,
        progress_bar=True,
    )
    Console().print(report_table(report))

    env = gym.make("TextGen-v0", reward=str(arguments.output), max_new_tokens=12)
    env.reset(seed=0)
    total, done = 0.0, False
    while not done:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        total, done = total + float(reward), terminated or truncated
    print(f"a text of random tokens gets {total:.2f} from it")


if __name__ == "__main__":
    main()
