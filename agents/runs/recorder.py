"""What a run does between two rollouts: evaluate on held-out prompts, keep the best model and samples, checkpoint."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger

from textgym.agents.callbacks.checkpoints import training_state, write_checkpoint
from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.distributed.processes import Processes
from textgym.agents.runs.config import RunConfig
from textgym.agents.runs.diagnosis import diagnose
from textgym.agents.runs.folder import GrowingFile, JSONLines, ResumableTensorBoard, RunFolder
from textgym.agents.runs.held_out import BestEvaluation, HeldOutPrompts, held_out_figures
from textgym.divergence import DivergedError
from textgym.envs import TextGenVectorEnv
from textgym.prompts.rows import PromptRow


class StopRun(Exception):
    """The run was asked to stop and has written its checkpoint."""


class RunRecorder(BaseCallback):
    """Keeps a run's folder up to date, and stops the run at the next boundary between rollouts when asked to.

    Of several processes the main one evaluates and writes, while the others wait.

    :param algorithm: the agent's name
    :param config: of the run
    :param folder: of the run
    :param envs: the training environment, whose reward and reference the held-out texts are measured with
    :param held_out: held-out prompts
    :param processes: those that train together; default one alone
    """

    def __init__(
        self,
        algorithm: str,
        config: RunConfig,
        folder: RunFolder,
        envs: TextGenVectorEnv,
        held_out: list[PromptRow],
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        self.processes = processes or Processes()
        self.algorithm, self.config = algorithm, config
        self.folder = folder
        self.envs = envs
        self.held_out = HeldOutPrompts(held_out, config)
        self.metrics, self.sample_file = GrowingFile(folder.metrics), GrowingFile(folder.samples)
        self.evaluations: list[dict[str, Any]] = []  # figures of each, with the timesteps
        self.stop_requested = False
        self._evaluated: int | None = None  # timesteps of the newest evaluation
        self._checkpointed: int | None = None
        self._best = BestEvaluation()
        self.out_of_patience = False
        self._seconds = 0.0  # of training, without what was lost after a checkpoint
        self._resumed_at = time.monotonic()

    def loggers(self, timesteps: int) -> Logger:
        """The logger of the run.

        :param timesteps: where the run begins; greater than 0 when it is resumed
        """
        if not self.processes.is_main:
            return Logger(None, [])
        formats: list[KVWriter] = [JSONLines(self.metrics)]
        if self.config.tensorboard:
            formats.append(ResumableTensorBoard(str(self.folder.tensorboard), timesteps))
        return Logger(str(self.folder.path), formats)

    # What SB3 calls

    def _on_step(self) -> bool:
        return not self.out_of_patience

    def _on_training_start(self) -> None:
        self._resumed_at = time.monotonic()

    def _on_rollout_start(self) -> None:
        self._between_rollouts(last=False)

    def _on_training_end(self) -> None:
        self._between_rollouts(last=True)

    def _keep_model(self) -> None:
        """Put the agent into ``model``."""
        model = self.model
        assert isinstance(model, TextOnPolicyAlgorithm)
        model.check_finite()
        self.processes.on_main(lambda: self.folder.replace(self.folder.model, model.save_pretrained))

    def _between_rollouts(self, last: bool) -> None:
        steps = self.model.num_timesteps
        stop = self.processes.any(self.stop_requested)
        due = self._evaluated is None or steps - self._evaluated >= self.config.eval_every
        if due or (last and self._evaluated != steps and not self.out_of_patience):
            self._evaluate(steps)
        # The figures of an update, which SB3 would write with the next rollout, stand at the tokens they belong to.
        self.logger.dump(steps)
        if last:
            self._keep_model()  # first: whatever can't be kept of a run's state, what it has learned is
        first = self._checkpointed is None and steps == 0
        due = not first and steps - (self._checkpointed or 0) >= self.config.checkpoint_every
        if due or ((last or stop) and self._checkpointed != steps):
            self._checkpoint(steps)
        if stop and not last:
            raise StopRun

    # Parts

    def _evaluate(self, steps: int) -> None:
        self._evaluated = steps
        self.processes.on_main(lambda: self._evaluate_here(steps))
        if self.config.patience is not None:
            waited = self.processes.is_main and self._best.without_better >= self.config.patience
            self.out_of_patience = self.processes.any(waited)

    def _evaluate_here(self, steps: int) -> None:
        assert isinstance(self.model, TextOnPolicyAlgorithm)
        evaluation = self.held_out.evaluate(self.model, self.envs)
        figures = held_out_figures(evaluation)
        self.evaluations.append({"timesteps": steps, **figures})
        names = {"score": "score_mean", "length": "ep_len_mean"}
        for name, value in figures.items():
            self.logger.record(f"eval/{names.get(name, name)}", value)
        every = self.held_out.completions_per_prompt
        for i in range(0, every * min(self.config.samples, len(self.held_out.rows)), every):
            sample = {
                "timesteps": steps,
                "prompt": evaluation.prompts[i],
                "completion": evaluation.completions[i],
                "score": float(evaluation.scores[i]),
                "kl": float(evaluation.kl[i]),
            }
            if (turns := evaluation.turns) is not None:
                sample |= {"reply_reward": float(turns.reply_rewards[i]), "transcript": turns.transcripts[i]}
            self.sample_file.append(sample)
        for name in ("score", "kl"):
            if not math.isfinite(figures[name]):
                raise DivergedError(f"{name} of held-out completions is {figures[name]}", steps)
        if steps and self._best.take(self.held_out.scores(evaluation)):
            self._keep_best(steps, figures)

    def _keep_best(self, steps: int, figures: dict[str, float]) -> None:
        """Put the agent into ``best``."""

        def write(path: Path) -> None:
            assert isinstance(self.model, TextOnPolicyAlgorithm)
            self.model.save_pretrained(path)
            (path / "evaluation.json").write_text(json.dumps({"timesteps": steps, **figures}, indent=2) + "\n")

        self.folder.replace(self.folder.best, write)

    def _checkpoint(self, steps: int) -> None:
        assert isinstance(self.model, TextOnPolicyAlgorithm)
        self._checkpointed = steps
        state = training_state(self.model, self.locals.get("callback"))
        keep = self.config.keep_checkpoints
        self.processes.on_main(lambda: write_checkpoint(self.folder.checkpoints, state, steps, keep))

    def diagnosis(self) -> list[str]:
        """What is conspicuous in the held-out figures, a sentence each."""
        return diagnose(self.evaluations[0], self.evaluations[-1]) if len(self.evaluations) > 1 else []

    # Checkpoints

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all the processes that took part."""
        return self._seconds + time.monotonic() - self._resumed_at

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluated": self._evaluated,
            "checkpointed": self._checkpointed,
            "best": self._best.state_dict(),
            "out_of_patience": self.out_of_patience,
            "algorithm": self.algorithm,
            "config": self.config.as_dict(),
            "evaluations": self.evaluations,
            "metrics_bytes": self.metrics.size,
            "samples_bytes": self.sample_file.size,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._evaluated, self._checkpointed = state["evaluated"], state["checkpointed"]
        self._best.load_state_dict(state["best"])
        self.out_of_patience, self.evaluations = state["out_of_patience"], state["evaluations"]
        self._seconds = state["seconds"]
        if self.processes.is_main:
            self.metrics.cut(state["metrics_bytes"])
            self.sample_file.cut(state["samples_bytes"])


def sample_table(rows: list[dict[str, Any]]) -> str:
    """Samples as a Markdown table: a prompt a row, its completions at the first, the middle and the last evaluation.

    Of a conversation each message has a line, with who said it; below is its score, and what replies paid.

    :param rows: the lines of ``samples.jsonl``
    """
    steps = sorted({row["timesteps"] for row in rows})
    shown = [steps[i] for i in sorted({0, len(steps) // 2, len(steps) - 1})] if steps else []
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    found = {(row["prompt"], row["timesteps"]): row for row in rows}
    lines = [
        "| prompt | " + " | ".join(f"after {step:,} tokens" for step in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for prompt in prompts:
        cells = [found.get((prompt, step)) for step in shown]
        texts = ["" if cell is None else _sample(cell) for cell in cells]
        lines.append(f"| {_cell(prompt)} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _sample(row: dict[str, Any]) -> str:
    if "transcript" not in row:
        return f"{_cell(row['completion'])} **{row['score']:+.2f}**"
    lines = [f"**{_cell(message['role'])}** {_cell(message['content'])}" for message in row["transcript"]]
    paid = f", replies {row['reply_reward']:+.2f}" if row["reply_reward"] else ""
    return "<br>".join([*lines, f"**{row['score']:+.2f}**{paid}"])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
