"""Teach a small language model to write positive film reviews, and show what changed. 1 to 3 minutes on two cores.

Everything comes with textgym: the language model, the reward model (the sentiment that people read in film reviews,
predicted for every prefix), and prompts that neither has seen. The reward of a token is the change of predicted
sentiment it makes, minus a penalty for straying from the original model. Run it with

    make quickstart                                   # or: python examples/quickstart.py

It prints completions of held-out prompts before and after with the figures that matter, and leaves a plot, the table,
the TensorBoard log and the trained model (an ordinary Hugging Face checkpoint) in runs/quickstart.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import gymnasium as gym
import matplotlib
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from textgym.agents import PPO
from textgym.embedded import WordSentiment, load_prompts
from textgym.evaluation import Evaluation, evaluate
from textgym.language_model import LanguageModel, load_language_model
from textgym.rewards import as_reward

matplotlib.use("Agg")

ROWS = 32
MAX_NEW_TOKENS = 24
MIN_NEW_TOKENS = 8  # short praise scores high; the agent is to write sentences


class LearningCurve(BaseCallback):
    """Notes score and KL of the finished completions of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[dict[str, float]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        episodes = self.model.finished_episodes
        if episodes:
            point = {name: sum(episode[name] for episode in episodes) / len(episodes) for name in ("score", "kl")}
            self.points.append({"tokens": self.num_timesteps, **point})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--timesteps", type=int, default=30_720, help="tokens to train on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for what it leaves behind")
    arguments = parser.parse_args()
    console = Console()
    arguments.output.mkdir(parents=True, exist_ok=True)

    # The environment: 32 texts are written side by side, each step adds a token to every one of them.
    envs = gym.make_vec(
        "TextGen-v0",
        num_envs=ROWS,
        prompts="train",
        max_new_tokens=MAX_NEW_TOKENS,
        min_new_tokens=MIN_NEW_TOKENS,
        kl_coef=0.05,
    )
    # The agent: PPO as in Stable-Baselines3; its policy starts as a copy of the environment's language model. Each
    # token is paid at once, so that credit need not reach far (gae_lambda), and one pass over fresh texts is enough.
    model = PPO(
        "LanguageModelPolicy",
        envs,
        n_steps=MAX_NEW_TOKENS,
        batch_size=256,
        n_epochs=1,
        learning_rate=lambda left: 8e-4 * left,  # falls to 0 with the tokens that are left
        gae_lambda=0.7,
        seed=arguments.seed,
    )
    model.set_logger(configure(str(arguments.output), ["tensorboard", "csv"]))

    reference = load_language_model()
    before = measure(model.policy.language_model, reference)
    curve = LearningCurve()
    console.print(
        f"[bold]Training[/bold] {sum(p.numel() for p in model.policy.parameters()) / 1e6:.1f} M parameters "
        f"on {arguments.timesteps:,} tokens with {torch.get_num_threads()} threads"
    )
    start = time.perf_counter()
    model.learn(arguments.timesteps, callback=curve, progress_bar=True)
    seconds = time.perf_counter() - start
    after = measure(model.policy.language_model, reference)

    model.logger.close()
    model.save_pretrained(arguments.output / "model")
    plot(curve.points, before, after, arguments.output / "learning_curve.png")
    table = {"before": figures(before), "after": figures(after), "training_seconds": seconds, "seed": arguments.seed}
    (arguments.output / "results.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    show(console, before, after)
    console.print(f"Trained for {seconds:.0f} s. In [bold]{arguments.output}[/bold]:")
    console.print("  learning_curve.png  score against KL as it learned")
    console.print(
        "  model               the trained model, for `language_model=` of the environment, and for transformers"
    )
    console.print("  results.json        this table; TensorBoard and CSV logs are beside it")
    console.print("Next: your own reward, examples/custom_reward.py")


def measure(model: LanguageModel, reference: LanguageModel) -> Evaluation:
    """One completion of each of 256 held-out prompts."""
    return evaluate(
        model,
        reference,
        as_reward(None),
        load_prompts("test")[:256],
        max_new_tokens=MAX_NEW_TOKENS,
        min_new_tokens=MIN_NEW_TOKENS,
        seed=1,
    )


def figures(evaluation: Evaluation) -> dict[str, float]:
    """The usual figures, and those of a judge that is not optimised: a bag of words trained on the human scores."""
    judged = WordSentiment()(prompts=evaluation.prompts, completions=evaluation.completions)
    return {
        **evaluation.figures(),
        "judge": sum(judged) / len(judged),
        "judge_positive": sum(score > 0 for score in judged) / len(judged),
    }


def show(console: Console, before: Evaluation, after: Evaluation) -> None:
    """Print some completions and all figures, before and after."""
    texts = Table(title="Completions of held-out prompts, with their scores", show_lines=True)
    texts.add_column("before", ratio=1)
    texts.add_column("after", ratio=1)
    for i in range(8):
        texts.add_row(
            *(
                f"[dim]{escape(e.prompts[i])}[/dim]{escape(e.completions[i])} [bold]{e.scores[i]:+.2f}[/bold]"
                for e in (before, after)
            )
        )
    console.print(texts)
    rows = [
        ("reward-model score, mean", "score", "{:+.3f}"),
        ("reward-model score, standard deviation", "score_std", "{:.3f}"),
        ("texts that the reward model calls positive", "positive", "{:.0%}"),
        ("word judge (not optimised), mean", "judge", "{:+.3f}"),
        ("texts that the word judge calls positive", "judge_positive", "{:.0%}"),
        ("KL to the reference, nats per completion", "kl", "{:.2f}"),
        ("perplexity under the reference", "perplexity", "{:.1f}"),
        ("distinct-2", "distinct_2", "{:.3f}"),
        ("length, tokens", "length", "{:.1f}"),
        ("end-of-sequence rate", "eos_rate", "{:.0%}"),
    ]
    numbers = Table(title=f"Means over {len(before.prompts)} held-out prompts")
    numbers.add_column("")
    numbers.add_column("before", justify="right")
    numbers.add_column("after", justify="right")
    old, new = figures(before), figures(after)
    for label, name, form in rows:
        numbers.add_row(label, form.format(old[name]), form.format(new[name]))
    console.print(numbers)


def plot(points: list[dict[str, float]], before: Evaluation, after: Evaluation, path: Path) -> None:
    """Score against KL during training, with the held-out evaluations as stars."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    tokens = [point["tokens"] for point in points]
    left.plot(tokens, [point["score"] for point in points], color="#0072b2")
    left.set(xlabel="tokens of training", ylabel="reward-model score Φ", title="What it learns")
    kl = [point["kl"] for point in points]
    scatter = right.scatter(kl, [point["score"] for point in points], c=tokens, cmap="viridis", s=18)
    for evaluation, name, side, above in ((before, "before", "left", -18), (after, "after", "right", 12)):
        right.plot(evaluation.kl.mean(), evaluation.scores.mean(), "*", markersize=14, color="#d55e00")
        right.annotate(
            f"{name} (held out)",
            (evaluation.kl.mean(), evaluation.scores.mean()),
            (0, above),
            textcoords="offset points",
            ha=side,
        )
    right.set(xlabel="KL to the reference, nats per completion", title="What it pays for it")
    right.margins(y=0.14)  # room for the words
    figure.colorbar(scatter, label="tokens of training")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
