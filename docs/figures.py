"""Writes the figures of ``docs/results`` into README and docs, so that no two pages can disagree.

    python docs/figures.py            # after a benchmark has written its JSON
    python docs/figures.py --check    # what the tests do: says which pages would change

A page has its words, and says where its figures come from. Two marks, neither of which is shown:

``<!-- figure: quickstart.after.distinct_2 -->0.571``
    a number of a sentence. It is written as it stands there: with as many decimals, with or without a sign, as a
    percentage or not. The name is a path into :func:`figures`.
``<!-- figures: quickstart -->`` above a table
    its cells. The function of that name in :data:`TABLES` gives the last cells of each row; what stands before them,
    such as a label in the language of the page, is the page's own.

Tables of numbers that come from elsewhere say so with ``<!-- by hand: where from -->``.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from report import PHASES, Figures, floor_of, times_as_long  # noqa: E402
from workload import Workload  # noqa: E402

RESULTS = ROOT / "docs" / "results"
MIB = 2**20
FIGURE = re.compile(r"<!-- figure: (?P<name>.+?) -->(?P<shown>[+−]?\d(?:[\d,]*\d)?(?:\.\d+)?(?: ?%)?)")
TABLE = re.compile(r"(?P<mark><!-- figures: (?P<name>.+?) -->\n+)(?P<head>\|.*\n\|[-:| ]+\n)(?P<rows>(?:\|.*\n)+)")
Row = list[str]


def pages() -> list[Path]:
    """README in every language, and everything in docs."""
    return [*sorted(ROOT.glob("README*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


# What was measured


@functools.cache
def result(name: str) -> Any:
    """What ``docs/results/NAME.json`` holds."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def figures() -> dict[str, Any]:
    """All that a page may name: the results by file, with the ratios and the units that pages show."""
    found = {path.stem: result(path.stem) for path in RESULTS.glob("*.json")}
    found |= {name: speed(name) for name in found if name.startswith("speed-")}
    found["memory"] = {name: each["peak"] / MIB for name, each in result("memory")["settings"].items()}
    # Medians of rollouts, and of updates, that took turns.
    weights = result("reordered-weights-135m")["rollouts"]
    found["reordered-weights-135m"] = {"times": median(weights["as they are"]) / median(weights["reordered"])}
    updates = {
        way: [each["seconds"]["update"] for each in ways] for way, ways in result("freed-memory")["answers"].items()
    }
    found["freed-memory"] = {"saved": 1 - statistics.median(updates["kept"]) / statistics.median(updates["given back"])}
    found["embedded"] = json.loads((ROOT / "textgym" / "embedded" / "report.json").read_text(encoding="utf-8"))
    return found


@functools.cache
def speed(name: str) -> dict[str, Any]:
    """Of a run of ``make benchmark``: by kind of work, then by contender, medians and ratios for each real token."""
    works = {}
    for work in result(name)["works"]:
        workload = Workload(**work["workload"])
        measured = {who: Figures.of(each) for who, each in work["contenders"].items() if "failed" not in each}
        works["ragged" if workload.ragged else "fixed"] = {
            who: {
                **mine.seconds,
                "total": mine.total if set(mine.seconds) == set(PHASES) else None,
                "cpu": mine.cpu_total,
                "tokens": mine.tokens,
                "memory": mine.memory["resident"] / MIB,
                "of textgym": times_as_long(mine, measured["textgym"]),
                "of compiled": times_as_long(mine, measured[compiled])
                if (compiled := "textgym-compiled") in measured
                else None,
                "of fastest": times_as_long(mine, measured[fastest])
                if (fastest := "textgym-fast") in measured
                else None,
                "of floor": times_as_long(mine, measured[floor])
                if (floor := floor_of(who, workload)) in measured
                else None,
            }
            for who, mine in measured.items()
        }
    return works


def figure(name: str) -> float:
    """:param name: a path into :func:`figures`, with dots between"""
    at: Any = figures()
    for key in name.split("."):
        try:
            at = at[int(key) if isinstance(at, list) else key]
        except (KeyError, IndexError, ValueError) as error:
            raise KeyError(f"there is no figure {name!r}: {key!r} is not among {list(at)[:20]}") from error
    return float(at)


def written_like(value: float, shown: str) -> str:
    """
    >>> written_like(0.5714, "0.602"), written_like(0.94, "90 %"), written_like(1234.5, "1"), written_like(0.48, "+0.3")
    ('0.571', '94 %', '1,234', '+0.5')
    """
    percent = re.search(r" ?%$", shown)
    places = len(shown.removesuffix(percent[0] if percent else "").partition(".")[2])
    sign = "+" if shown[0] in "+−" else ""
    return f"{100 * value if percent else value:{sign},.{places}f}".replace("-", "−") + (percent[0] if percent else "")


# Tables, without the labels that a page gives its rows


def quickstart(*names: str) -> list[Row]:
    """Before and after, all figures or those that are named."""
    shown = [("score", "+.3f"), ("positive", ".0%"), ("judge", "+.2f"), ("judge_positive", ".0%"), ("kl", ".2f"),
             ("perplexity", ".1f"), ("distinct_2", ".3f"), ("length", ".1f"), ("eos_rate", ".0%")]  # fmt: skip
    before, after = result("quickstart")["before"], result("quickstart")["after"]
    return [
        [f"{when[name]:{form}}".replace("%", " %") for when in (before, after)]
        for name, form in shown
        if name in (names or dict(shown))
    ]


def agents(task: str) -> list[Row]:
    """Best agent first, as ``benchmarks/agents.py`` prints them."""
    found = result("agents")["tasks"][task]
    names = ["score", "kl", *(["judge"] if "judge" in found["before"] else []), "distinct_2"]
    rows = [["*before*", "", *(f"{found['before'][name]:.3f}" for name in names), "", ""]]
    for agent, row in sorted(found["agents"].items(), key=lambda item: -item[1]["score"][0]):
        cells = [spread(row[name], 3) for name in names]
        rows.append([agent, f"{row['rate']:g}", *cells, f"{row['seconds']:.0f}", f"{row['memory'] / MIB:,.0f}"])
    return [[cell.replace("-0.", "−0.") for cell in row] for row in rows]


def median(rollouts: list[dict[str, float]]) -> float:
    return statistics.median(rollout["seconds"] for rollout in rollouts)


def spread(mean_and_deviation: list[float], places: int) -> str:
    mean, deviation = mean_and_deviation
    return f"{mean:.{places}f} ± {deviation:.{places}f}".replace("-", "−")


def agent(*names: str) -> list[Row]:
    """Of one agent, or of its kinds: score, KL and CPU seconds of the three tasks."""
    tasks = result("agents")["tasks"]
    return [
        [spread(row["score"], 2), f"{row['kl'][0]:.1f}", f"{row['seconds']:.0f}"]
        for name in names
        for row in (tasks[task]["agents"][name] for task in ("alphabet", "alphabet-end", "reviews"))
    ]


def speeds(name: str, work: str, contenders: list[str], columns: list[str]) -> list[Row]:
    """Of one kind of work."""
    forms = {"rollout": ".2f", "score": ".2f", "update": ".2f", "total": ".2f", "cpu": ".1f", "tokens": ",.0f",
             "memory": ",.0f", "of textgym": ".2f", "of floor": ".2f"}  # fmt: skip
    found = speed(name)[work]
    return [
        ["" if (value := found[who].get(column)) is None else f"{value:{forms[column]}}" for column in columns]
        for who in contenders
    ]


def shared_prompts(work: str) -> list[Row]:
    """CPU seconds of GRPO's iterations."""
    found = result("shared-prompts")["works"][work]
    return [
        [
            *(f"{found[who]['cpu'][phase]:.2f}" for phase in (*PHASES, "iteration")),
            f"{found[who]['memory']['resident'] / MIB:,.0f}",
            f"{found[who]['times']['cpu']:.2f}",
        ]
        for who in ("textgym-grpo", "floor-groups", "textgym-grpo-before", "trl-grpo")
    ]


def memory() -> list[Row]:
    """MiB of the counted tensors and of the process, by setting."""
    rows = []
    for each in result("memory")["settings"].values():
        parts = [each["parts"].get(part) for part in ("weights", "gradients", "optimizer", "saved", "logits")]
        numbers = [*parts, each["peak"]]
        rows.append(["" if number is None else f"{number / MIB:,.0f}" for number in numbers])
    return rows


def vocabularies() -> list[Row]:
    """MiB by size of the vocabulary."""
    workload, rows = result("memory")["vocabulary_workload"], []
    for vocab, each in result("memory")["vocabularies"].items():
        one = workload["rows"] * workload["new_tokens"] * int(vocab) * 4
        rows.append(
            [f"{int(vocab):,}", *(f"{n / MIB:,.0f}" for n in (one, each["full"]["peak"], each["trl-ppo"]["peak"]))]
        )
    return rows


def overoptimisation(*conditions: str) -> list[Row]:
    """Proxy, judge and KL at the start and at the end."""
    rows = []
    for condition in conditions:
        row = result("overoptimisation")["conditions"][condition]
        start, end = row["start"], row["end"]
        cells = [f"{start[name][0]:.3f} → {spread(end[name], 3)}".replace("-", "−") for name in ("proxy", "gold")]
        cells += [spread(row["best"]["gold"], 3)] if condition not in ("instant", "end") else []
        rows.append(
            [*cells, *(spread(end[name], places) for name, places in (("kl", 1), ("distinct_2", 3), ("length", 1)))]
        )
    return rows


def reward_models() -> list[Row]:
    """What trained reward models reach, beside a linear model on the same texts."""
    shown = {
        "finetuned": ["accuracy", "pearson"],
        "frozen-mlp": ["accuracy", "pearson"],
        "pairwise": ["pairwise_accuracy", "pairwise_accuracy_1_apart"],
        "chinese": ["accuracy"],
    }
    found = result("reward_training")
    return [
        [f"{found[row][which][measure]:.3f}" for which in ("model", "baseline")]
        for row, measures in shown.items()
        for measure in measures
    ]


def embedded_judges() -> list[Row]:
    """Accuracy and Pearson's correlation of the embedded reward model and of what it is compared with."""
    found = figures()["embedded"]["sentiment"]
    order = ("reward model", "TF-IDF", "VADER", "MiniLM")
    return [[f"{number:.3f}" for number in next(v for k, v in found.items() if k.startswith(name))] for name in order]


def smollm2() -> list[Row]:
    """Before and after the example's training."""
    shown = [("score", ".3f"), ("kl", ".2f"), ("held_out_perplexity", ".1f"), ("distinct_2", ".3f"), ("length", ".1f")]
    before, after = result("smollm2_ppo")["before"], result("smollm2_ppo")["after"]
    return [[f"{when[name]:{form}}".replace("-", "−") for when in (before, after)] for name, form in shown]


def smollm2_kl() -> list[Row]:
    """How far a run goes from the reference, and what becomes of its texts."""
    found = [(run["before"], run["after"]) for run in result("smollm2_kl").values()]
    return [
        [f"{after['kl']:.1f}", f"{before['perplexity']:.0f} → {after['perplexity']:.0f}", f"{after['distinct_2']:.2f}"]
        for before, after in found
    ]


def processes() -> list[Row]:
    """One process, two apart and two together."""
    return [
        [
            f"{each['processes']}",
            *(f"{each[name]:.2f}" for name in ("seconds", "fastest", "slowest")),
            f"{each['tokens_per_s']:,.0f}",
            f"{each['share_of_ideal']:.0%}".replace("%", " %"),
        ]
        for each in result("processes")["contenders"]
    ]


def turn_tasks() -> list[Row]:
    """The guessing game and the calculator by contender, after training: mean and standard deviation of the seeds."""
    games, sums = (result("turns")[task]["contenders"] for task in ("guess", "calculator"))
    return [
        [
            f"{games[name]['after'][0]:.2f} ± {games[name]['after'][1]:.2f}",
            f"{sums[name]['after'][0]:.1%} ± {sums[name]['after'][1]:.1%}".replace("%", " %"),
        ]
        for name in games
    ]


def other_speaker() -> list[Row]:
    """Talks with SmolLM2 about held-out openings, before and after: its mood, what a lexicon says, KL, distinct-2."""
    learned, still = (result("other-speaker")[name] for name in ("GRPO", "GRPO, learning rate 0"))
    return [
        [
            *(f"{end[name]:+.3f}".replace("-", "−") for name in ("score", "lexicon")),
            f"{end['kl']:.1f}",
            f"{end['distinct_2']:.2f}",
        ]
        for end in (learned["before"], learned["after"], still["after"])
    ]


MEASURED = ["rollout", "score", "update", "memory", "of textgym", "of floor"]
RAGGED = ["rollout", "score", "update", "tokens", "memory", "of textgym", "of floor"]
SMALL = ["textgym", "textgym-compiled", "floor-fp32", "trl-ppo", "generate"]
LARGE = ["textgym", "floor-fp32", "trl-ppo"]
LONG = [*LARGE, "generate"]
LOW = ["textgym", "textgym-compiled", "textgym-fast", "floor-fp32", "floor-bf16", "trl-ppo", "generate"]
AGENTS = {
    "PPO": "ppo", "A2C": "a2c", "REINFORCE": "reinforce", "RLOO": "rloo", "RLOO, token": "rloo", "GRPO": "grpo",
    "GRPO, token": "grpo", "NLPO": "nlpo", "TRPO": "trpo", "Soft Q-learning": "soft_q_learning",
    "Q-learning": "q_learning", "SARSA": "sarsa", "Expert iteration": "expert_iteration", "DPO, offline": "dpo",
    "DPO, online": "dpo",
}  # fmt: skip
TABLES: dict[str, Callable[[], list[Row]]] = {
    "quickstart": quickstart,
    "quickstart in short": functools.partial(quickstart, "score", "judge", "kl", "distinct_2", "length"),
    **{f"agents, {task}": functools.partial(agents, task) for task in ("alphabet", "alphabet-end", "reviews")},
    **{
        f"agent, {page}": functools.partial(agent, *(name for name, of in AGENTS.items() if of == page))
        for page in dict.fromkeys(AGENTS.values())
    },
    "speed, fixed": functools.partial(speeds, "speed-avx2", "fixed", SMALL, MEASURED),
    "speed, ragged": functools.partial(speeds, "speed-avx2", "ragged", SMALL[:4], RAGGED),
    "speed, long": functools.partial(speeds, "speed-long-texts", "fixed", LONG, MEASURED),
    "speed, long and ragged": functools.partial(speeds, "speed-long-texts", "ragged", LARGE, RAGGED),
    "speed, large": functools.partial(speeds, "speed-135m", "fixed", LARGE, MEASURED),
    "speed, bf16": functools.partial(speeds, "speed-amx", "fixed", LOW, MEASURED),
    **{f"shared prompts, {work}": functools.partial(shared_prompts, work) for work in ("one step", "sixteen steps")},
    "memory": memory,
    "vocabularies": vocabularies,
    "overoptimisation": functools.partial(overoptimisation, "one", "ensemble", "diverse"),
    "instant or end": functools.partial(overoptimisation, "instant", "end"),
    "reward models": reward_models,
    "embedded judges": embedded_judges,
    "smollm2": smollm2,
    "smollm2 kl": smollm2_kl,
    "processes": processes,
    "turn tasks": turn_tasks,
    "other speaker": other_speaker,
}


# Pages


def filled(text: str) -> str:
    """A page with its figures as they were measured.

    :raises ValueError: for a table with other rows or fewer cells than there are figures
    """
    text = FIGURE.sub(
        lambda found: f"<!-- figure: {found['name']} -->{written_like(figure(found['name']), found['shown'])}", text
    )
    return TABLE.sub(lambda found: found["mark"] + found["head"] + _rows(found["name"], found["rows"]), text)


def _rows(name: str, written: str) -> str:
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
    lines, rows = written.splitlines(), TABLES[name]()
    if len(lines) != len(rows):
        raise ValueError(f"table {name!r} has {len(lines)} rows on a page, of {len(rows)} that were measured")
    done = []
    for line, row in zip(lines, rows, strict=True):
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) < len(row):
            raise ValueError(f"table {name!r}: {line!r} has too few cells for {row}")
        done.append("| " + " | ".join([*cells[: len(cells) - len(row)], *row]) + " |\n")
    return re.sub(r"\|  (?=\|)", "| ", "".join(done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    check = parser.parse_args().check
    changed = [page for page in pages() if filled(text := page.read_text(encoding="utf-8")) != text]
    for page in changed:
        print(f"{page.relative_to(ROOT)} {'disagrees with docs/results' if check else 'is written anew'}")
        if not check:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(bool(check and changed))


if __name__ == "__main__":
    main()
