"""A training run from its configuration: prompts, environment and agent, and the run's folder from start to end."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule

import textgym  # noqa: F401  registers the environment ids
from textgym.agents.callbacks.adaptive_kl import AdaptiveKLCallback
from textgym.agents.callbacks.checkpoints import checkpoints_in, load_training_state, read_latest
from textgym.agents.callbacks.early_stopping import StopOnKL
from textgym.agents.callbacks.learning_rewards import LearningRewards
from textgym.agents.common.on_policy import TextOnPolicyAlgorithm
from textgym.agents.distributed.processes import ProcessError, Processes
from textgym.agents.distributed.shared_prompts import DividePrompts, SharedPrompts
from textgym.agents.dpo import DPO, check_no_stored_pairs
from textgym.agents.policy.language_model_policy import LanguageModelPolicy
from textgym.agents.runs.agents import agent_class, agent_name, arguments_of, resolved
from textgym.agents.runs.changes import check_changes
from textgym.agents.runs.config import RunConfig, read_config
from textgym.agents.runs.folder import RunFolder, write_csv
from textgym.agents.runs.paths import with_absolute_paths
from textgym.agents.runs.plots import plot_runs
from textgym.agents.runs.prompt_record import check_same_prompts, write_prompt_record
from textgym.agents.runs.prompts import load_prompts
from textgym.agents.runs.recorder import RunRecorder, StopRun, sample_table
from textgym.agents.runs.trust import code_of, seals
from textgym.checkpoint_folders import CheckpointError, FolderLock, is_whole, write_text_whole
from textgym.divergence import DivergedError
from textgym.envs import TextGenVectorEnv
from textgym.prompts.fitting import judge_lengths
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply
from textgym.replies.opening import load_reply
from textgym.rewards.errors import RewardValueError
from textgym.rewards.learning import has_learning_parts
from textgym.rewards.opening import load_reward
from textgym.sampling import DEFAULT_MAX_REPLY_TOKENS

# From options to objects


def make_envs(config: RunConfig, prompts: Any, processes: Processes | None = None) -> TextGenVectorEnv:
    """The training environment.

    :param prompts: what it draws from
    :param processes: those that train together; default one alone
    """
    processes = processes or Processes()
    options = {name: getattr(config, name) for name in _ENV_OPTIONS}
    options["device"] = device_of(config, processes)
    options["chat_template_kwargs"] = config.template_arguments()
    every = config.reward_every
    reply = None
    if config.reply is not None:
        seed = processes.seed(config.seed) or 0
        reply = reply_of(config.reply, config, config.max_reply_tokens, str(options["device"]), seed)
    envs = gym.make_vec(
        "TextGen-v0",
        num_envs=config.rows,
        vectorization_mode="vector_entry_point",
        language_model=config.model,
        tokenizer=config.tokenizer,
        prompts=prompts,
        reward=load_reward(config.reward, config.trust_remote_code),
        reward_every=every if every in ("turn", "end") else int(every),
        reply=reply,
        seed=processes.seed(config.seed),
        **options,
    )
    assert isinstance(envs, TextGenVectorEnv)
    return envs


_ENV_OPTIONS = (
    "kl_coef kl_estimator max_new_tokens min_new_tokens max_prompt_tokens prompt_overflow stop missing_eos_penalty "
    "temperature action_masking top_k top_p device dtype trust_remote_code max_turns max_reply_tokens max_total_tokens "
    "reply_overflow"
).split()


def reply_of(
    name: str, config: RunConfig, max_reply_tokens: int | None, device: str | None = None, seed: int = 0
) -> Reply:
    """Who an option names, opened for a run.

    :param name: as ``load_reply`` takes it
    :param config: how a language model is loaded
    :param max_reply_tokens: most that it says
    :param device: where it goes; default the run's
    :param seed: of what it says
    """
    return load_reply(
        name,
        seed,
        max_new_tokens=max_reply_tokens or DEFAULT_MAX_REPLY_TOKENS,
        device=device or config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )


def device_of(config: RunConfig, processes: Processes) -> str:
    """The option ``device``; of several processes each has one of its own."""
    if config.device == "auto" and processes.world_size > 1:
        return str(processes.device)
    if config.device.startswith("cuda:") and processes.world_size > 1:
        raise ValueError(
            f"device={config.device!r} would be that of all {processes.world_size} processes: leave it 'auto', and "
            "each gets its own"
        )
    return config.device


def make_agent(
    algorithm: str | type[TextOnPolicyAlgorithm],
    config: RunConfig,
    envs: TextGenVectorEnv,
    processes: Processes | None = None,
) -> TextOnPolicyAlgorithm:
    """The agent, with the environment's language model as its policy.

    :param algorithm: ``"ppo"``, ``"grpo"`` ..., ``"file.py:Class"``, or a class
    :param config: may leave the agent's own options open
    :raises ValueError: if it has an option that the agent doesn't have
    """
    config = resolved(algorithm, config)
    names = ("value_head", "value_trunk", "autocast", "gradient_checkpointing", "rollout_dtype", "compile")
    policy: dict[str, Any] = {name: getattr(config, name) for name in names}
    if config.autocast is not None and config.lora_rank is None:
        policy["dtype"] = "float32"
    if config.lora_rank is not None:
        policy["lora"] = {"r": config.lora_rank, "lora_alpha": config.lora_alpha or 2 * config.lora_rank}
        if config.lora_target_modules is not None:
            policy["lora"]["target_modules"] = config.lora_target_modules
    options = arguments_of(algorithm, config)
    if config.lr_schedule == "linear":
        options["learning_rate"] = LinearSchedule(options["learning_rate"], 0.0, 1.0)
    return agent_class(algorithm)(
        "LanguageModelPolicy",
        envs,
        policy_kwargs=policy,
        seed=config.seed,
        device=device_of(config, processes or Processes()),
        **options,
    )


# Runs


class Run:
    """A training run: its configuration, its folder, its environment and its agent.

    Under ``accelerate launch`` every process has its own environment and its own share of the prompts, and the first
    one alone writes to the folder (:mod:`textgym.agents.distributed`).

    :param algorithm: ``"ppo"``, ``"a2c"``, ``"reinforce"``, ``"rloo"``, ``"grpo"`` ..., a class of your own, or where
        one is: ``"file.py:Class"`` or ``"module:Class"``
    :param config: its options
    :param path: its folder
    :param resume: go on from the newest checkpoint in the folder; else the folder must be empty, or hold no more than a
        run that ended before its first checkpoint
    """

    def __init__(
        self,
        algorithm: str | type[TextOnPolicyAlgorithm],
        config: RunConfig,
        path: str | Path,
        resume: bool = False,
    ) -> None:
        agent = agent_class(algorithm)
        config = resolved(agent, config if resume else with_absolute_paths(config))
        self.algorithm, self.config, self.folder = agent_name(algorithm), config, RunFolder(path)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.processes = Processes.join(config.process_timeout, cpu=config.device == "cpu")
        self._lock: FolderLock | None = None
        self.resumed_from: Path | None = None
        try:
            self._prepare(agent, resume)
        except BaseException:
            self._unlock()
            raise

    def _prepare(self, agent: type[TextOnPolicyAlgorithm], resume: bool) -> None:
        config, checkpoint = self.config, None
        if resume:
            self.processes.on_main(self._take_over)
            checkpoint = self._newest_checkpoint()
        # Everything that can be wrong is found before the folder is made.
        train, held_out = load_prompts(config)
        if issubclass(agent, DPO):
            check_no_stored_pairs(train)
        self.holds_out = held_out is not train
        prompts: Any = train
        if self.processes.world_size > 1:
            prompts = SharedPrompts(train, config.seed, self.processes)
        self.envs = make_envs(config, prompts, self.processes)
        judge_lengths(held_out, self.envs.vocabulary, self.envs.max_prompt_tokens, config.prompt_overflow)
        self.agent = make_agent(agent, config, self.envs, self.processes)
        if not resume:
            self.processes.on_main(self._create)
        held_out_rows: list[PromptRow] = list(held_out)
        recorded = held_out_rows if self.holds_out else []
        self.recorder = RunRecorder(self.algorithm, config, self.folder, self.envs, held_out_rows, self.processes)
        self.callbacks: list[BaseCallback] = []
        if isinstance(prompts, SharedPrompts):
            self.callbacks.append(DividePrompts(prompts))
        if has_learning_parts(self.envs.reward):
            self.callbacks.append(LearningRewards())
        if config.kl_target:
            assert config.kl_horizon is not None  # it is resolved
            least = config.kl_coef_min or 0.0
            self.callbacks.append(AdaptiveKLCallback(config.kl_target, config.kl_horizon, least=least))
        if config.max_kl is not None:
            self.callbacks.append(StopOnKL(config.max_kl, verbose=1))
        self.callbacks.append(self.recorder)  # last, so that its checkpoints see what the others remember
        if checkpoint is not None:
            self.resumed_from, state = checkpoint
            self.processes.on_main(lambda: check_same_prompts(self.folder.held_out, train, recorded))
            load_training_state(self.agent, state, self.callbacks)
            self._note({"resumed_from": self.resumed_from.name})
        elif self.processes.is_main:
            text = f"algorithm: {self.algorithm}\n\n{config.to_yaml()}"
            write_text_whole(self.folder.config, text)
            write_prompt_record(self.folder.held_out, train, recorded)
            if not resume:
                self._note({"code": seals(code_of(config, self.algorithm))})
        self._note({"status": "running", "reason": None, "processes": self.processes.world_size})

    def _create(self) -> None:
        self._lock = self.folder.create()

    def _take_over(self) -> None:
        """Keep others out of the folder, and put it in order after a process that was killed."""
        self._lock = FolderLock(self.folder.path)
        self.folder.remove_leftovers()
        if not checkpoints_in(self.folder.checkpoints):
            self.folder.forget_progress()

    def _newest_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint and its state; None where the run ended before its first."""
        begun = bool(checkpoints_in(self.folder.checkpoints))
        found = read_latest(self.folder.checkpoints) if begun else None
        names = self.processes.gather(None if found is None else found[0].name)
        if len(set(names)) > 1:
            raise CheckpointError(f"the processes found different checkpoints in {self.folder.path}, {names}")
        if found is not None:
            check_changes(found[1], self.algorithm, self.config, self.folder.path)
        return found

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @classmethod
    def resumed(
        cls,
        path: str | Path,
        timesteps: int | None = None,
        agent: type[TextOnPolicyAlgorithm] | None = None,
    ) -> Run:
        """A run that was stopped, at its newest whole checkpoint; one without any begins anew.

        :param path: its folder
        :param timesteps: another number of tokens to train on, counted from the run's beginning
        :param agent: its class; default what its configuration names, whose code is run if it is your own
        :raises FileNotFoundError: if it has no configuration
        :raises FileExistsError: if another process is at work in the folder
        :raises CheckpointError: if it has checkpoints, and none is whole
        :raises ValueError: if its configuration was changed in a way that would make another run of it
        """
        algorithm, config = run_config(path)
        if timesteps is not None:
            config.timesteps = timesteps
        return cls(agent or algorithm, config, path, resume=True)

    def train(self, progress_bar: bool = False) -> bool:
        """Train to the end, or until Ctrl-C or SIGTERM, which end it at the next boundary between rollouts.

        In several processes one that gets the signal is enough to end all of them.

        :param progress_bar: whether to show one
        :return: whether the end was reached
        :raises KeyboardInterrupt: at a second Ctrl-C; the newest checkpoint stays as it is
        :raises DivergedError: if something is not finite any more; ``run.json`` then says so, as it does of every error
            that ends a run
        """
        try:
            finished = self._train(progress_bar)
        except BaseException as error:
            told = self._told(error)
            with contextlib.suppress(OSError):  # of a full disk, say: what has gone wrong first is to be said
                self._note(_end_of(told))
            if told is error:
                raise
            raise told from error
        finally:
            self._unlock()
        return finished

    def _train(self, progress_bar: bool) -> bool:
        begin = self.agent.num_timesteps
        self.agent.set_logger(self.recorder.loggers(begin))
        finished = True
        try:
            with self._stopping_at_a_boundary():
                self.agent.learn(
                    self.config.timesteps - begin,
                    callback=self.callbacks,
                    reset_num_timesteps=begin == 0,
                    progress_bar=progress_bar and self.processes.is_main,
                )
        except StopRun:
            finished = False
        finally:
            self.agent.logger.close()
        self.processes.on_main(self._write_tables)
        self._note({"status": "finished" if finished else "stopped", "seconds": round(self.recorder.seconds, 1)})
        return finished

    def _told(self, error: BaseException) -> BaseException:
        """What is said of an error: where training diverged, after how many tokens it did."""
        if isinstance(error, RewardValueError):
            return DivergedError(str(error), self.agent.num_timesteps)
        if isinstance(error, DivergedError) and error.timesteps is None:
            return DivergedError(error.what, self.agent.num_timesteps)
        return error

    @property
    def remains(self) -> str:
        """What is left of a run that has ended early, and how to go on with it."""
        found = [path for _, path in checkpoints_in(self.folder.checkpoints) if is_whole(path)]
        command = f"textgym train --resume {self.folder.path}"
        if found:
            return f"Its newest checkpoint, {found[-1].name}, is whole, and {command} goes back to it"
        return f"It has no checkpoint yet, so {command} begins anew"

    @contextmanager
    def _stopping_at_a_boundary(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a request that the recorder sees; the second one interrupts."""
        seen: set[int] = set()

        def request(number: int, frame: FrameType | None) -> None:
            # After Ctrl-C, which reaches all processes, their launcher sends a SIGTERM; nobody asked twice.
            again = self.recorder.stop_requested if self.processes.world_size == 1 else number in seen
            seen.add(number)
            if again:
                raise KeyboardInterrupt
            if self.recorder.stop_requested:
                return
            self.recorder.stop_requested = True
            print("\nStopping after this rollout and its update; once more to stop at once", file=sys.stderr)

        before: dict[signal.Signals, Any] = {}
        try:
            for which in (signal.SIGINT, signal.SIGTERM):
                before[which] = signal.signal(which, request)
        except ValueError:  # not in the main thread, which alone gets signals
            pass
        try:
            yield
        except ProcessError:
            # Their launcher now sends SIGTERM to those that are left; they end by themselves, after saying why.
            if before.pop(signal.SIGTERM, None) is not None:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
        finally:
            for which, handler in before.items():
                signal.signal(which, handler)

    def _write_tables(self) -> None:
        rows = self.recorder.metrics.rows()
        write_csv(rows, self.folder.metrics_csv)
        samples = self.recorder.sample_file.rows()
        if samples:
            self.folder.samples_table.write_text(sample_table(samples), encoding="utf-8")
        if rows:
            plot_runs([self.folder.path], self.folder.curves)

    def _note(self, facts: dict[str, Any]) -> None:
        """Put facts into ``run.json``."""
        if self.processes.is_main:
            self.folder.note(facts)


def _end_of(error: BaseException) -> dict[str, Any]:
    """What ``run.json`` says of a run that an error has ended."""
    if isinstance(error, KeyboardInterrupt):
        return {"status": "stopped", "reason": "interrupted at once, before a checkpoint"}
    return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}


def policy_of(path: str | Path) -> LanguageModelPolicy:
    """The policy of a run's newest checkpoint; the run itself, which may be going on, is left alone.

    :param path: the run's folder
    :raises FileNotFoundError: if it has no configuration or no checkpoint
    :raises CheckpointError: if no checkpoint is whole
    """
    algorithm, config = run_config(path)
    _, state = read_latest(RunFolder(path).checkpoints)
    agent = make_agent(algorithm, config, make_envs(config, load_prompts(config)[0]))
    agent.policy.load_state_dict(state["policy"], strict=False)
    return agent.policy


def run_config(path: str | Path) -> tuple[str, RunConfig]:
    """The algorithm and the configuration of a run.

    :param path: its folder
    :raises FileNotFoundError: if it holds none
    """
    file = RunFolder(path).config
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no {file.name}: it is not the folder of a run")
    options = read_config(file)
    algorithm = str(options.pop("algorithm", "ppo"))
    return algorithm, RunConfig.from_mapping(options, str(file))
