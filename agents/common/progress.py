"""What ``learn(progress_bar=True)`` shows: a bar in a terminal, a line for each rollout where output is kept.

A rollout and the update that learns from it are both progress, so the bar moves in both. Rates are tokens per second of
wall time, with updates, evaluations and checkpoints in it.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

_FORMS = {"score": "score {:+.3f}", "return": "return {:+.3f}", "kl": "KL {:.2f} nats", "length": "length {:.1f}"}


class TrainingProgress(BaseCallback):
    """Shows how far training is, the newest rollout's score, KL and length, the speed and the time left.

    :param bar: a bar on the standard error, or lines on the standard output; default a bar where both are a terminal
    """

    def __init__(self, bar: bool | None = None) -> None:
        super().__init__()
        self.bar = sys.stdout.isatty() and sys.stderr.isatty() if bar is None else bar
        self._tqdm: Any = None
        self._hook: Any = None

    # What SB3 calls

    def _on_training_start(self) -> None:
        self._total = int(self.locals["total_timesteps"])
        self._begin = self._known = self.model.num_timesteps  # tokens of whole rollouts with their updates
        self._started_at = self._turned_at = time.monotonic()
        self._writing = self._learning = 0.0  # seconds of all rollouts, and of all updates
        self._steps = 0  # of the optimizer, in this update
        self._steps_before = 0  # in the one before
        self._figures: dict[str, float] = {}
        self._in_update = False
        tokens = self._total - self._begin
        rollout = getattr(self.model, "n_steps", 0) * self.training_env.num_envs
        if 0 < tokens <= 2 * rollout:
            updates = math.ceil(tokens / rollout)
            self._say(
                f"{tokens:,} tokens are about {updates} update{'s' * (updates > 1)}, as a rollout has up to "
                f"{rollout:,} tokens: too few to see what is learned. More timesteps, or fewer rows or n_steps, "
                "make more of them"
            )
        if self.bar:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError as missing:
                raise ModuleNotFoundError("the progress bar needs tqdm: pip install 'textgym[extra]'") from missing
            form = "{percentage:3.0f}% |{bar}| {desc} [{elapsed}<{remaining}{postfix}]"
            self._tqdm = tqdm(total=max(tokens, 1), bar_format=form, smoothing=0.0, dynamic_ncols=True)
            self._move(0.0)
        self._hook = self.model.policy.optimizer.register_step_post_hook(self._on_optimizer_step)

    def _on_rollout_start(self) -> None:
        self._end_update()

    def _on_step(self) -> bool:
        tokens = self.model.num_timesteps - self._known
        # What learning from these tokens takes is not done yet.
        self._move(tokens * self._share_of_writing())
        return True

    def _on_rollout_end(self) -> None:
        now = time.monotonic()
        self._writing += now - self._turned_at
        self._turned_at = now
        self._in_update, self._steps = True, 0
        self._figures = figures_of(getattr(self.model, "finished_episodes", []))
        self._move((self.model.num_timesteps - self._known) * self._share_of_writing())

    def _on_optimizer_step(self, *_: Any) -> None:
        if not self._in_update:
            return
        self._steps += 1
        tokens, written = self.model.num_timesteps - self._known, self._share_of_writing()
        learned = min(self._steps / self._steps_before, 1.0) if self._steps_before else 0.0
        self._move(tokens * (written + (1 - written) * learned))

    def _on_training_end(self) -> None:
        self._end_update()
        self.close()

    def close(self) -> None:
        """Leave the bar as it is and write no further; also after an error."""
        if self._tqdm is not None:
            self._tqdm.close()
            self._tqdm = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # Parts

    def _end_update(self) -> None:
        """A rollout has been learned from, and what is done between two of them is done."""
        now = time.monotonic()
        if self._in_update:
            self._learning += now - self._turned_at
            self._in_update, self._steps_before = False, self._steps
            self._known = self.model.num_timesteps
            self._move(0.0)
            if not self.bar:
                self._say(self._line(now))
        self._turned_at = now

    def _share_of_writing(self) -> float:
        """What part of the time rollouts take, as far as it has been measured."""
        both = self._writing + self._learning
        return self._writing / both if self._learning and both else 0.5

    def _move(self, beyond: float) -> None:
        """Show that ``beyond`` tokens' work is done after the last whole rollout."""
        if self._tqdm is None:
            return
        written = self.model.num_timesteps
        self._tqdm.n = min(self._known - self._begin + beyond, self._tqdm.total)
        figures = "".join(f", {text}" for text in self._shown_figures())
        self._tqdm.set_description_str(f"{written:,} of {self._total:,} tokens", refresh=False)
        self._tqdm.set_postfix_str(f"{_speed(self._rate(time.monotonic()))}{figures}", refresh=False)
        if time.monotonic() - self._tqdm.last_print_t >= self._tqdm.mininterval:
            self._tqdm.last_print_t = time.monotonic()
            self._tqdm.refresh()

    def _rate(self, now: float) -> float:
        """Tokens per second since the beginning."""
        return (self.model.num_timesteps - self._begin) / max(now - self._started_at, 1e-9)

    def _line(self, now: float) -> str:
        done, rate = self.model.num_timesteps, self._rate(now)
        left = max(self._total - done, 0) / rate if rate else math.nan
        parts = [f"{done:,} of {self._total:,} tokens", *self._shown_figures(), _speed(rate)]
        return ", ".join(
            [*parts, f"{_duration(left)} left" if done < self._total else _duration(now - self._started_at)]
        )

    def _shown_figures(self) -> list[str]:
        return [form.format(self._figures[name]) for name, form in _FORMS.items() if name in self._figures]

    def _say(self, line: str) -> None:
        print(line, flush=True)


def figures_of(episodes: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the episodes that ended in a rollout: ``score`` (or ``return`` without one), ``kl`` in nats,
    ``length`` in tokens; those that are known."""
    figures = {}
    for name, key in (("score", "score"), ("return", "r"), ("kl", "kl"), ("length", "l")):
        values = np.array([episode.get(key, np.nan) for episode in episodes], dtype=np.float64)
        if np.isfinite(values).any():
            figures[name] = float(values[np.isfinite(values)].mean())
    if "score" in figures:
        figures.pop("return", None)
    return figures


def _speed(rate: float) -> str:
    """Large models on small machines write less than a token in a second."""
    return f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.2g} tokens/s"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
