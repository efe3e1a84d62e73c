"""Does the reward matter? PPO against small learned rewards, judged by a better one that it never sees.

    python benchmarks/overoptimisation.py             # everything; about an hour on two cores
    python benchmarks/overoptimisation.py --report    # the tables and plots of what has been run

Four proxies, each textgym's small language model with a linear head, learn human sentiment from 800 film-review
snippets (bootstraps of the same 800). The judge is MiniLM fine-tuned on all snippets of the training split, ten times
as many (``benchmarks/reward_training.py``, row ``finetuned``). PPO with a weak KL penalty is trained against

- ``one``: one proxy,
- ``ensemble``: mean − 1 · std of the four (Coste et al. 2023, https://arxiv.org/abs/2310.02743),
- ``diverse``: the same, and the distance to the other completions of the prompt (self-BLEU),

on three seeds. On the way proxy and judge score the same texts of held-out prompts: the curves of Gao et al. 2022,
"Scaling Laws for Reward Model Overoptimization" (https://arxiv.org/abs/2210.10760), proxy and gold against KL.

The second question: ``instant`` against ``end`` reward, the same embedded reward model paid at every token or once,
with the quickstart's KL penalty, the same budget of tokens and three seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from separate_runs import keep, kept_result, path_of

PROXY_ROWS, MEMBERS = 800, 4
ROWS, TOKENS = 32, 24
BUDGET, EVERY, PROMPTS = 24_576, 3_072, 96
CONDITIONS = ("one", "ensemble", "diverse", "instant", "end")
LABELS = {
    "one": "one proxy",
    "ensemble": "ensemble, mean − std",
    "diverse": "the same, and diversity",
    "instant": "instant reward",
    "end": "reward at the end only",
}
COLOURS = {"one": "#d55e00", "ensemble": "#0072b2", "diverse": "#009e73", "instant": "#0072b2", "end": "#cc79a7"}


def prepare(work: Path) -> None:
    """Train the proxies and the judge, where they are not there yet."""
    from reward_training import finetuned, snippets

    from textgym.reward_training import train_reward

    split = snippets()
    if not (work / "proxies" / "member_0" / "config.json").is_file():
        rows = random.Random(0).sample(split.train, PROXY_ROWS)
        train_reward(
            rows,
            work / "proxies",
            members=MEMBERS,
            bootstrap=True,
            validation=split.validation[:400],
            epochs=4,
            learning_rate=3e-4,
            device="cpu",
        )
    if not (work / "judge" / "config.json").is_file():
        finetuned(split, work / "judge")


def reward_of(condition: str, work: Path) -> Any:
    """What a condition is rewarded with, and the proxy whose score is plotted for it."""
    from textgym.rewards import Ensemble, SelfBLEU, as_reward

    if condition in ("instant", "end"):
        return as_reward(None), as_reward(None)
    members = [as_reward(str(work / "proxies" / f"member_{number}")) for number in range(MEMBERS)]
    if condition == "one":
        return members[0], members[0]
    ensemble = Ensemble(members, "mean-std", k=1.0)
    return (ensemble if condition == "ensemble" else ensemble + 0.3 * SelfBLEU()), ensemble


def train(condition: str, seed: int, work: Path) -> dict[str, Any]:
    """One run, in this process."""
    import gymnasium as gym
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    from textgym.agents import PPO
    from textgym.embedded import load_prompts
    from textgym.evaluation import evaluate
    from textgym.language_model import load_language_model
    from textgym.rewards import as_reward

    torch.set_num_threads(1)
    reward, proxy = reward_of(condition, work)
    judge, reference = as_reward(str(work / "judge")), load_language_model()
    prompts = load_prompts("test")[:PROMPTS]
    envs = gym.make_vec(
        "TextGen-v0",
        num_envs=ROWS,
        prompts="train",
        reward=reward,
        reward_every="end" if condition == "end" else 1,
        max_new_tokens=TOKENS,
        min_new_tokens=8,
        kl_coef=0.05 if condition in ("instant", "end") else 0.005,
        device="cpu",
        seed=seed,
    )
    agent = PPO(
        "LanguageModelPolicy", envs, n_steps=TOKENS, batch_size=256, learning_rate=3e-4, seed=seed, device="cpu"
    )

    class Curve(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.points: list[dict[str, Any]] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            if self.num_timesteps >= EVERY * len(self.points):
                self.measure()

        def measure(self) -> None:
            texts = evaluate(
                agent.policy.language_model,
                reference,
                proxy,
                prompts,
                max_new_tokens=TOKENS,
                min_new_tokens=8,
                seed=1,
            )
            gold = judge(prompts=texts.prompts, completions=texts.completions)
            figures = texts.figures()
            self.points.append(
                {
                    "tokens": self.num_timesteps,
                    "proxy": figures["score"],
                    "gold": statistics.mean(gold),
                    "kl": figures["kl"],
                    "distinct_2": figures["distinct_2"],
                    "length": figures["length"],
                    "texts": [p + c for p, c in zip(texts.prompts[:4], texts.completions[:4], strict=True)],
                }
            )

    curve = Curve()
    agent.learn(BUDGET, callback=curve)
    curve.measure()
    return {"condition": condition, "seed": seed, "curve": curve.points}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=CONDITIONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--work", type=Path, default=Path(".cache/overoptimisation"), help="models and finished runs")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="for the JSON file and the plots")
    parser.add_argument("--prepare", action="store_true", help="only train the proxies and the judge")
    parser.add_argument("--report", action="store_true", help="only of what has been run")
    parser.add_argument("--one", nargs=2, metavar=("CONDITION", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        condition, seed = arguments.one
        keep(train(condition, int(seed), arguments.work), arguments.work, condition, seed)
        return
    if not arguments.report:
        prepare(arguments.work)
    if arguments.prepare:
        return
    wanted = [(condition, seed) for seed in range(arguments.seeds) for condition in arguments.conditions]
    if arguments.report:
        wanted = [names for names in wanted if path_of(arguments.work, *names).is_file()]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda names: kept_result(__file__, arguments.work, *names), wanted))
    by_condition: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_condition.setdefault(run["condition"], []).append(run)
    arguments.output.mkdir(parents=True, exist_ok=True)
    table = {condition: figures(found) for condition, found in by_condition.items()}
    (arguments.output / "overoptimisation.json").write_text(
        json.dumps({"budget": BUDGET, "conditions": table}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for title, conditions in (("over-optimisation", CONDITIONS[:3]), ("instant or end", CONDITIONS[3:])):
        if any(condition in table for condition in conditions):
            print(f"\n{title}\n\n{markdown({c: table[c] for c in conditions if c in table})}")
    draw_overoptimisation(by_condition, arguments.output / "overoptimisation.png")
    draw_learning(by_condition, arguments.output / "instant-or-end.png")


def figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, at the start, where the judge was best, and at the end."""
    summary: dict[str, Any] = {"seeds": len(runs)}
    places = {"start": lambda points: points[0], "end": lambda points: points[-1]}
    places["best"] = lambda points: max(points, key=lambda point: point["gold"])
    for place, of in places.items():
        points = [of(run["curve"]) for run in runs]
        summary[place] = {
            name: [
                statistics.mean(point[name] for point in points),
                statistics.stdev(point[name] for point in points) if len(points) > 1 else 0.0,
            ]
            for name in ("proxy", "gold", "kl", "distinct_2", "length", "tokens")
        }
    summary["texts"] = runs[0]["curve"][-1]["texts"]
    return summary


def markdown(table: dict[str, Any]) -> str:
    """Proxy, judge and KL at the start, where the judge was best, and at the end."""
    lines = [
        "| | proxy, start → end | judge, start → end | judge at its best | KL, nats | distinct-2 | length |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for condition, row in table.items():
        start, best, end = row["start"], row["best"], row["end"]

        def spread(point: dict[str, Any], name: str, places: int = 3) -> str:
            return f"{point[name][0]:.{places}f} ± {point[name][1]:.{places}f}"

        lines.append(
            f"| {LABELS[condition]} | {start['proxy'][0]:.3f} → {spread(end, 'proxy')} | {start['gold'][0]:.3f} → "
            f"{spread(end, 'gold')} | {spread(best, 'gold')} | {spread(end, 'kl', 1)} | {spread(end, 'distinct_2')} | "
            f"{spread(end, 'length', 1)} |"
        )
    return "\n".join(lines)


def draw_overoptimisation(by_condition: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Proxy (dashed) and judge (solid) against KL: every run thin, their mean thick."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    conditions = [condition for condition in CONDITIONS[:3] if condition in by_condition]
    if not conditions:
        return
    size = (4.2 * len(conditions), 4)
    figure, axes = plt.subplots(1, len(conditions), figsize=size, sharey=True, layout="constrained")
    for axis, condition in zip(np.atleast_1d(axes), conditions, strict=True):
        runs = by_condition[condition]
        for name, style in (("proxy", "--"), ("gold", "-")):
            for run in runs:
                kl = [point["kl"] for point in run["curve"]]
                axis.plot(kl, [p[name] for p in run["curve"]], style, color=COLOURS[condition], alpha=0.25, linewidth=1)
            length = min(len(run["curve"]) for run in runs)
            mean = {n: np.mean([[p[n] for p in r["curve"][:length]] for r in runs], axis=0) for n in (name, "kl")}
            label = "proxy, which is optimised" if name == "proxy" else "judge"
            axis.plot(mean["kl"], mean[name], style, color=COLOURS[condition], linewidth=2.2, label=label)
        axis.set(title=LABELS[condition], xlabel="KL to the reference, nats per completion")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="lower right")
    np.atleast_1d(axes)[0].set_ylabel("score of held-out texts")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_learning(by_condition: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Score of held-out texts against tokens, mean and range over the seeds."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    conditions = [condition for condition in CONDITIONS[3:] if condition in by_condition]
    if not conditions:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for condition in conditions:
        runs = by_condition[condition]
        length = min(len(run["curve"]) for run in runs)
        tokens = [point["tokens"] for point in runs[0]["curve"][:length]]
        for axis, name in ((left, "proxy"), (right, "gold")):
            values = np.array([[point[name] for point in run["curve"][:length]] for run in runs])
            axis.plot(tokens, values.mean(0), color=COLOURS[condition], label=LABELS[condition])
            axis.fill_between(tokens, values.min(0), values.max(0), color=COLOURS[condition], alpha=0.15)
    left.set(xlabel="tokens of training", ylabel="score", title="reward model")
    right.set(xlabel="tokens of training", title="judge, not optimised")
    left.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
