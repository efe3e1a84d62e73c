"""Training curves: what is read from a run's metrics, and that all of it is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from textgym.agents.runs import plots
from textgym.agents.runs.plots import plot_runs, read_metrics, run_colours, run_names


def rollout(i: int, scale: float = 1.0) -> dict[str, Any]:
    row = {
        "time/total_timesteps": 100 * (i + 1),
        "rollout/score_mean": 0.1 * i * scale,
        "rollout/kl_ref": 0.5 * i,
        "rollout/ep_len_mean": 20.0 - i,
        "train/entropy_loss": -3.0 + 0.1 * i,
        "train/kl_coef": 0.05,
    }
    return row | ({"eval/score_mean": 0.09 * i * scale, "eval/kl": 0.45 * i} if i % 2 else {})


def run(folder: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return folder


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved, for a look at what is in them."""
    figures = []
    save = plots.save_figure

    def remember(figure: Figure, output: Any) -> None:
        figures.append(figure)
        save(figure, output)

    monkeypatch.setattr(plots, "save_figure", remember)
    return figures


def lines(figure: Figure, title: str) -> list[np.ndarray]:
    axes = next(axes for axes in figure.axes if axes.get_title() == title)
    return [np.asarray(line.get_xydata()) for line in axes.get_lines() if len(line.get_xdata())]


def test_metrics_are_the_rows_that_were_written(tmp_path):
    rows = [rollout(i) for i in range(3)]
    assert read_metrics(run(tmp_path / "a", rows)) == rows
    assert read_metrics(str(run(tmp_path / "b", rows, "\n  \n"))) == rows


@pytest.mark.parametrize("tail", ['{"time/total', '{"name": "é'])
def test_a_last_line_that_was_not_finished_does_not_count(tmp_path, tail):
    rows = [rollout(i) for i in range(3)]
    folder = run(tmp_path / "a", rows)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(tail.encode()[:-1])
    assert read_metrics(folder) == rows


def test_a_broken_line_is_named_even_if_it_is_the_last_but_finished(tmp_path):
    good = json.dumps(rollout(0))
    for i, (text, number) in enumerate([(f"{good}\n{{torn\n{good}\n", 2), (f"{good}\n\n{{torn\n", 3)]):
        folder = run(tmp_path / str(i), [])
        (folder / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=rf"metrics.jsonl:{number} is broken JSON"):
            read_metrics(folder)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 must be an object, got int"):
        read_metrics(run(tmp_path / "c", [rollout(0)], "3\n"))


def test_folders_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder '.*nobody'"):
        read_metrics(tmp_path / "nobody")
    with pytest.raises(FileNotFoundError, match=r"the folder '.*' has no metrics.jsonl"):
        read_metrics(tmp_path)


def test_a_run_is_drawn_with_all_its_curves_and_its_held_out_evaluations(tmp_path, drawn):
    rows = [rollout(i) for i in range(6)]
    plot_runs([run(tmp_path / "a", rows)], tmp_path / "pictures" / "a.png")
    tokens = [100.0 * (i + 1) for i in range(6)]
    curve, held_out = lines(drawn[0], "Score")
    np.testing.assert_allclose(curve, [[t, row["rollout/score_mean"]] for t, row in zip(tokens, rows, strict=True)])
    np.testing.assert_allclose(held_out, [[200, 0.09], [400, 0.27], [600, 0.45]])
    (entropy,) = lines(drawn[0], "Entropy")
    np.testing.assert_allclose(entropy[:, 1], [3.0 - 0.1 * i for i in range(6)])
    (length,) = lines(drawn[0], "Length")
    np.testing.assert_allclose(length[:, 1], [20.0 - i for i in range(6)])
    training, held_out = lines(drawn[0], "Score against KL")
    np.testing.assert_allclose(training, [[0.5 * i, 0.1 * i] for i in range(6)])
    np.testing.assert_allclose(held_out, [[0.45, 0.09], [1.35, 0.27], [2.25, 0.45]])
    with Image.open(tmp_path / "pictures" / "a.png") as picture:
        assert picture.size == (1562, 840)


def test_runs_have_a_colour_and_a_name_each(tmp_path, drawn):
    folders = [run(tmp_path / name / "seed0", [rollout(i, k) for i in range(4)]) for k, name in enumerate("ab$")]
    plot_runs(folders, tmp_path / "runs.svg")
    axes = drawn[0].axes[0]
    curves = [line for line in axes.get_lines() if line.get_marker() != "*"]
    assert [line.get_ydata()[-1] for line in curves] == pytest.approx([0.0, 0.3, 0.6])
    legend = dict(
        zip((t.get_text() for t in drawn[0].legends[0].texts), drawn[0].legends[0].legend_handles, strict=True)
    )
    assert list(legend) == ["a/seed0", "b/seed0", r"\$/seed0", "held-out prompts"]
    assert [line.get_color() for line in curves] == [handle.get_color() for handle in list(legend.values())[:3]]
    assert (tmp_path / "runs.svg").read_text().startswith("<?xml")


def seeds(tmp_path: Path, agent: str, scales: list[float]) -> list[Path]:
    """Runs of one agent that differ in their seed alone."""
    folders = [run(tmp_path / f"{agent}-{k}", [rollout(i, s) for i in range(4)]) for k, s in enumerate(scales)]
    for seed, folder in enumerate(folders):
        (folder / "config.yaml").write_text(f"algorithm: {agent}\n\nlearning_rate: 0.1\nseed: {seed}\n")
    return folders


def test_seeds_of_one_configuration_are_drawn_as_their_mean_and_a_band(tmp_path, drawn):
    folders = seeds(tmp_path, "ppo", [1.0, 2.0, 4.0]) + seeds(tmp_path, "grpo", [1.0, 3.0])
    plot_runs(folders, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    curves = [line for line in axes.get_lines() if line.get_marker() != "*"]
    assert [line.get_ydata()[-1] for line in curves] == pytest.approx([0.3 * 7 / 3, 0.3 * 2])
    ends = [band.get_paths()[0].vertices for band in axes.collections]
    assert [(v[v[:, 0] == 400, 1].min(), v[v[:, 0] == 400, 1].max()) for v in ends] == [
        pytest.approx((0.3, 1.2)),
        pytest.approx((0.3, 0.9)),
    ]
    stars = [line for line in axes.get_lines() if line.get_marker() == "*"]
    assert stars[0].get_ydata() == pytest.approx([0.09 * 7 / 3, 0.27 * 7 / 3])
    names = [text.get_text() for text in drawn[0].legends[0].texts]
    assert names == ["ppo (3 seeds)", "grpo (2 seeds)", "lowest to highest seed", "held-out prompts"]
    plot_runs(folders, tmp_path / "b.png", separate=True)
    assert len(drawn[1].legends[0].texts) == 5 + 1


def test_another_configuration_is_another_line(tmp_path, drawn):
    folders = seeds(tmp_path, "ppo", [1.0, 2.0])
    (folders[1] / "config.yaml").write_text("algorithm: ppo\n\nlearning_rate: 0.2\nseed: 1\n")
    plot_runs(folders, tmp_path / "a.png")
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["ppo-0", "ppo-1", "held-out prompts"]


def test_a_kl_coefficient_that_never_changes_has_no_panel(tmp_path, drawn):
    constant, adapted = [rollout(i) for i in range(4)], [rollout(i) | {"train/kl_coef": 0.1 * i} for i in range(4)]
    plot_runs([run(tmp_path / "a", constant)], tmp_path / "a.png")
    plot_runs([run(tmp_path / "b", adapted), tmp_path / "a"], tmp_path / "b.png")
    titles = [[axes.get_title() for axes in figure.axes] for figure in drawn]
    assert "KL coefficient β" not in titles[0]
    assert len(titles[0]) == 5
    assert "KL coefficient β" in titles[1]


def test_long_runs_have_a_running_mean_over_their_rollouts(tmp_path, drawn):
    rng = np.random.default_rng(0)
    rows = [rollout(i) | {"rollout/score_mean": float(rng.normal())} for i in range(400)]
    plot_runs([run(tmp_path / "a", rows)], tmp_path / "a.png")
    raw, mean, _ = lines(drawn[0], "Score")
    assert raw.shape == mean.shape == (400, 2)
    assert mean[200, 1] == pytest.approx(raw[190:211, 1].mean())
    assert mean[0, 1] == pytest.approx(raw[:11, 1].mean())


def test_what_was_not_recorded_or_is_not_finite_is_left_out(tmp_path, drawn):
    rows = [{"time/total_timesteps": 100 * i, "rollout/score_mean": 0.1} for i in range(1, 4)]
    rows[1]["rollout/score_mean"] = float("nan")
    rows[2]["train/kl_coef"] = None
    plot_runs([run(tmp_path / "a", rows)], tmp_path / "a.png")
    (score,) = lines(drawn[0], "Score")
    np.testing.assert_allclose(score, [[100, 0.1], [300, 0.1]])
    assert [axes.get_title() for axes in drawn[0].axes] == ["Score"]
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["a"]


def test_drawing_leaves_the_backend_and_the_open_figures_alone(tmp_path):
    from matplotlib import pyplot

    backend, figures = matplotlib.get_backend(), pyplot.get_fignums()
    plot_runs([run(tmp_path / "a", [rollout(0)])], tmp_path / "a.png")
    assert matplotlib.get_backend() == backend
    assert pyplot.get_fignums() == figures


def test_impossible_plots_are_refused(tmp_path):
    folder = run(tmp_path / "a", [rollout(0)])
    with pytest.raises(ValueError, match="folders is empty"):
        plot_runs([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="the run '.*a' is given twice"):
        plot_runs([folder, tmp_path / "b" / ".." / "a"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="the run '.*empty' has not finished a rollout yet"):
        plot_runs([folder, run(tmp_path / "empty", [])], tmp_path / "a.png")
    for name in ("a", "a.xyz"):
        with pytest.raises(ValueError, match=rf"output='.*{name}' must end in one of .*\.png, .*\.svg"):
            plot_runs([folder], tmp_path / name)
    with pytest.raises(ValueError, match=r"row 1: 'rollout/kl_ref' must be a number, got 'much'"):
        plot_runs([run(tmp_path / "c", [rollout(0) | {"rollout/kl_ref": "much"}])], tmp_path / "a.png")


def test_names_have_as_many_folders_as_tell_them_apart():
    assert run_names(["x/a/1", "x/b/1", "x/b/2"]) == ["a/1", "b/1", "2"]
    assert run_names(["x/a/b/1", "x/c/b/1"]) == ["a/b/1", "c/b/1"]


@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_every_run_has_a_colour_of_its_own(count):
    assert len({str(colour) for colour in run_colours(count)}) == count
