"""The study of over-optimisation: what each condition is rewarded with, and what is made of its runs."""

from __future__ import annotations

import json
import sys

import pytest
from places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
import overoptimisation as study
from separate_runs import keep, path_of

from textgym.rewards import Ensemble, as_reward


@pytest.fixture
def proxies(tmp_path):
    """A folder where the embedded reward model stands for every proxy, with heads that say more and more."""
    for number in range(study.MEMBERS):
        reward = as_reward(None)
        reward.model.score.weight.data *= number + 1
        folder = tmp_path / "proxies" / f"member_{number}"
        reward.model.save_pretrained(folder)
        reward.tokenizer.save_pretrained(folder)
    return tmp_path


def run(condition: str, seed: int, gold: list[float]) -> dict:
    points = [
        {"tokens": 100 * i, "proxy": i / 10, "gold": value, "kl": 2.0 * i, "distinct_2": 0.8, "length": 20.0,
         "texts": ["a good film"]}
        for i, value in enumerate(gold)
    ]  # fmt: skip
    return {"condition": condition, "seed": seed, "curve": points}


def test_the_conditions_differ_in_their_rewards(proxies):
    texts = {"prompts": ["the film is"] * 2, "completions": [" a joy", " a dull mess"]}
    one, plotted = study.reward_of("one", proxies)
    assert one is plotted
    ensemble, plotted = study.reward_of("ensemble", proxies)
    assert ensemble is plotted
    assert isinstance(ensemble, Ensemble)
    diverse, plotted = study.reward_of("diverse", proxies)
    assert diverse is not plotted, "the proxy's score is plotted without the diversity"
    scores = [one(**texts), ensemble(**texts), diverse(**texts)]
    assert scores[0] != pytest.approx(scores[1])
    assert scores[1] != pytest.approx(scores[2])
    assert plotted(**texts) == pytest.approx(scores[1])


def test_the_report_has_the_judges_best_and_its_end_and_two_plots(tmp_path, monkeypatch, capsys):
    for condition, gold in (("one", [0.0, 0.6, 0.2]), ("ensemble", [0.0, 0.4, 0.5]), ("end", [0.0, 0.1, 0.2])):
        for seed in range(2):
            keep(run(condition, seed, [value + 0.1 * seed for value in gold]), tmp_path, condition, seed)
    arguments = ["--report", "--work", str(tmp_path), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["overoptimisation.py", *arguments])
    study.main()
    printed = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line for line in printed.splitlines() if line.startswith("| ")}
    assert "0.050 → 0.250 ± 0.071" in rows["one proxy"]
    assert "0.650 ± 0.071" in rows["one proxy"], "the judge's best was half-way"
    assert "instant reward" not in rows, "it was not run"
    table = json.loads((tmp_path / "overoptimisation.json").read_text())["conditions"]
    assert table["ensemble"]["best"]["tokens"][0] == 200
    for plot in ("overoptimisation.png", "instant-or-end.png"):
        assert (tmp_path / plot).stat().st_size > 5_000
    assert not path_of(tmp_path, "instant", 0).exists(), "a report trains nothing"
