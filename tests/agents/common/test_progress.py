"""What is shown while an agent learns."""

from __future__ import annotations

import io
import re

import pytest
from stable_baselines3.common.callbacks import BaseCallback
from tiny_agents import tiny_ppo, tiny_vector_env

from textgym.agents.common.progress import TrainingProgress, figures_of


class Interrupts(BaseCallback):
    """Ends training by an error in the second rollout."""

    def _on_step(self):
        if self.num_timesteps > 20:
            raise KeyboardInterrupt
        return True


def test_kept_output_has_a_line_for_each_rollout_with_its_figures(capsys):
    model = tiny_ppo(tiny_vector_env(2), n_steps=8)
    scores = []

    class Keeps(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            scores.append(figures_of(model.finished_episodes)["score"])

    model.learn(64, callback=Keeps(), progress_bar=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"{done} of 64 tokens" for done in (16, 32, 48, 64)]
    assert [float(re.search(r"score ([+-][\d.]+)", line)[1]) for line in lines] == pytest.approx(scores, abs=6e-4)
    for line in lines:
        assert re.search(r"KL -?[\d.]+ nats, length [\d.]+, [\d,.]+ tokens/s, \S+ (s|min)", line), line
    assert lines[0].endswith("left")
    assert not lines[-1].endswith("left")


@pytest.mark.parametrize(("rate", "shown"), [(0.62, "0.62 tokens/s"), (7.04, "7 tokens/s"), (1234.5, "1,234 tokens/s")])
def test_slow_training_has_a_speed_too(capsys, monkeypatch, rate, shown):
    monkeypatch.setattr(TrainingProgress, "_rate", lambda self, now: rate)
    tiny_ppo(tiny_vector_env(2), n_steps=8).learn(48, progress_bar=True)
    assert f", {shown}, " in capsys.readouterr().out


def test_nothing_is_shown_unless_asked_for(capsys):
    tiny_ppo(tiny_vector_env(2), n_steps=8).learn(32)
    assert capsys.readouterr().out == ""


def test_too_few_tokens_for_more_than_two_updates_are_said_at_the_start(capsys):
    tiny_ppo(tiny_vector_env(2), n_steps=8).learn(32, progress_bar=True)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("32 tokens are about 2 updates, as a rollout has up to 16 tokens: too few")
    assert len(others) == 2


def test_the_bar_moves_in_rollouts_and_in_updates_and_never_back(monkeypatch):
    shown = []
    move = TrainingProgress._move

    def note(self, beyond):
        move(self, beyond)
        shown.append((self._in_update, self._tqdm.n))

    monkeypatch.setattr(TrainingProgress, "_move", note)
    monkeypatch.setattr("sys.stderr", io.StringIO())
    model = tiny_ppo(tiny_vector_env(2), n_steps=8, n_epochs=2)
    monkeypatch.setattr("textgym.agents.common.on_policy.TrainingProgress", lambda: TrainingProgress(bar=True))
    model.learn(64, progress_bar=True)
    in_first, later = [n for _, n in shown if n <= 16], [n for _, n in shown if n > 16]
    assert in_first == sorted(in_first)
    assert len({n for update, n in shown if update and n > 16}) > 3  # each minibatch of an update counts
    assert later[-1] == shown[-1][1] == 64


def test_an_interrupted_training_leaves_no_bar_and_no_hook_behind(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("textgym.agents.common.on_policy.TrainingProgress", lambda: TrainingProgress(bar=True))
    model = tiny_ppo(tiny_vector_env(2), n_steps=8)
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, callback=Interrupts(), progress_bar=True)
    assert model._progress is None
    assert not model.policy.optimizer._optimizer_step_post_hooks


def test_figures_are_means_of_what_is_known():
    episodes = [{"r": 1.0, "l": 3, "score": 0.5, "kl": float("nan")}, {"r": 2.0, "l": 4, "score": 0.7, "kl": 2.0}]
    assert figures_of(episodes) == pytest.approx({"score": 0.6, "kl": 2.0, "length": 3.5})
    assert figures_of([{"r": 2.0, "l": 4}]) == {"return": 2.0, "length": 4.0}
    assert figures_of([]) == {}
