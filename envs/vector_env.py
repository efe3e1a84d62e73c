"""Token-by-token text generation, many rows at once: the implementation behind every form of ``TextGen-v0``.

``gym.make_vec("TextGen-v0", num_envs=64)`` gives a :class:`TextGenVectorEnv`; :class:`~textgym.envs.env.TextGenEnv` is
one with a single row. The options and everything observable are documented there.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from gymnasium import error, spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from textgym.checks import check_int
from textgym.envs.arguments import log_probabilities, reset_mask, reset_options, seeds_of_rows, token_ids
from textgym.envs.asked import AskedByAgents
from textgym.envs.decision_process import DecisionProcess
from textgym.envs.infos import VectorInfos
from textgym.envs.options import TextGenOptions
from textgym.envs.rendering import render_ansi, render_rgb
from textgym.envs.scoring import RolloutScores
from textgym.prompts.rows import PromptRow

ENDS = ("eos", "stop", "reply")  # the reasons with which an episode has terminated
CUTS = ("length", "turns")  # and those with which it was truncated


class TextGenVectorEnv(AskedByAgents, VectorEnv):
    """N independent text-generation episodes, with one batched forward of each model per step.

    Spaces, rewards and options are those of :class:`~textgym.envs.env.TextGenEnv`, batched as Gymnasium does; row i
    behaves like a single environment that was reset with ``seed + i``. ``step`` takes the log-probabilities under
    which the agent sampled, too, for the KL penalty::

        >>> import gymnasium as gym, textgym
        >>> envs = gym.make_vec("TextGen-v0", num_envs=2, max_new_tokens=4)
        >>> observation, info = envs.reset(seed=0)
        >>> actions = envs.action_space.sample()
        >>> _, reward, terminated, truncated, info = envs.unwrapped.step(actions, log_probs=[-8.3, -8.3])
        >>> reward.shape
        (2,)
        >>> envs.close()

    :param num_envs: number of rows N
    :param max_episode_steps: Gymnasium's limit, of ``make_vec`` or of a registered id: episodes are truncated after so
        many tokens, as those of a single environment are in ``TimeLimit``; what they are worth then is paid
    :param options: see :class:`~textgym.envs.env.TextGenEnv`
    """

    def __init__(self, num_envs: int = 1, max_episode_steps: int | None = None, **options: Any) -> None:
        checked = TextGenOptions.from_keywords(options)
        check_int("num_envs", num_envs, low=1)
        max_actions: int | None = None
        if max_episode_steps is not None and max_episode_steps != -1:  # -1 is Gymnasium's word for no limit
            check_int("max_episode_steps", max_episode_steps, low=1)
            max_actions = max_episode_steps
        self.num_envs = num_envs
        self._process = DecisionProcess(checked, num_envs, max_actions)
        self._stream, self._episodes = self._process.stream, self._process.episodes
        self.render_mode = self.options.render_mode
        self.metadata = {
            "render_modes": ["ansi", "human", "rgb_array"],
            "render_fps": 10,
            "autoreset_mode": self.options.autoreset_mode,
        }
        self.vocab_size = self.vocabulary.size
        self.context = self._process.context
        self._reported: np.ndarray | None = None

        self.single_observation_space = self._episodes.texts.observation_space()
        self.single_action_space = spaces.Discrete(self.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    # ------------------------------------------------------------------ what agents ask for

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When a row that has finished begins anew; some clients look for it here and not in ``metadata``."""
        mode = self.options.autoreset_mode
        assert isinstance(mode, AutoresetMode)
        return mode

    def action_masks(self) -> np.ndarray:
        """Which actions the current states allow, ``(N, V)`` bool.

        :raises ValueError: without ``action_masking=True``
        """
        if self._episodes.allowed is None:
            raise ValueError("this environment doesn't mask actions; make it with action_masking=True")
        self._check_ready("action_masks")
        return self._episodes.allowed.copy()

    def observation(self) -> dict[str, np.ndarray]:
        """The current observation, as ``reset`` and ``step`` return it."""
        self._check_ready("observation")
        return self._episodes.texts.observation()

    def report_log_probs(self, log_probs: Any) -> None:
        """Tell under which log-probabilities, ``(N,)`` in nats, the actions of the coming step were sampled.

        For clients that step through wrappers, whose ``step`` passes actions only. Holds for one step.

        :raises TypeError: if they are not numbers
        :raises ValueError: if the shape is wrong or a value is not a log-probability
        """
        self._reported = log_probabilities("log_probs", log_probs, (self.num_envs,))

    # ------------------------------------------------------------------ Gymnasium

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode in every row, or in those of ``options["reset_mask"]``.

        Beginning anew in every row also drops the steps that are recorded and were not asked for.

        :param seed: of row 0, the following rows get the following numbers; or a list with one seed per row
        :param options: ``reset_mask``: ``(N,)`` bool; ``prompt``: a text or a conversation for all rows, or a
            list of N of them, instead of drawn prompts; None in the list for one that is drawn
        :raises TypeError: for a seed, options or a prompt of another kind
        :raises ValueError: for a seed below 0, unknown options, an empty prompt, or not N of them
        """
        self._check_open("reset")
        options = reset_options(options, ("prompt", "reset_mask"))
        mask, prompt = options.get("reset_mask"), options.get("prompt")
        seeds = seeds_of_rows(seed, self.num_envs)
        rows = np.arange(self.num_envs) if mask is None else np.flatnonzero(reset_mask(mask, self.num_envs))
        if mask is not None and self._episodes.recorded:
            raise RuntimeError("reset of some rows with steps in the record; call scores() first")
        if mask is not None and self._stream.round is not None:
            raise RuntimeError("reset of some rows within a round of episodes; reset() of all rows ends the round")
        self._stream.round = None
        self._reported = None
        # The option seeds the first reset.
        self._stream.seed(seeds, rows, seeds_of_rows(self.options.seed, self.num_envs))
        self._process.calibrate()
        fixed = self._stream.read(prompt, rows)
        self._episodes.scorer.forget(rows)
        self._process.begin(rows, fixed)
        self._episodes.note_starts()
        self._episodes.drop_recorded()  # of episodes that are given up
        infos = VectorInfos(self.num_envs)
        self._add_reset_info(infos, rows)
        self._add_mask_info(infos, rows)
        if self.render_mode == "human":
            self._show()
        return self._episodes.texts.observation(), infos.values

    def step(
        self, actions: Any, log_probs: Any = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Append one token to every row.

        :param actions: ``(N,)`` token ids
        :param log_probs: ``(N,)`` log-probabilities, in nats, under which the agent drew them; left out, the agent
            is treated as deterministic (log π = 0)
        :return: observation, rewards ``(N,)`` float64, terminated and truncated ``(N,)`` bool, infos
        :raises TypeError: if actions or log-probabilities are of a kind that can't hold numbers
        :raises ValueError: if one is no token id or no log-probability, or there are not N of them
        :raises RewardError: if the reward fails; nothing has changed then, and the step can be taken again
        """
        self._check_ready("step")
        actions = token_ids("actions", actions, (self.num_envs,), self.vocab_size)
        if log_probs is not None:
            self.report_log_probs(log_probs)
        log_prob = np.zeros(self.num_envs) if self._reported is None else self._reported

        texts, mode = self._episodes.texts, self.options.autoreset_mode
        waiting = texts.done.copy()  # rows that finished and haven't begun anew
        if waiting.all() and self._stream.round is not None:
            raise error.ResetNeeded(
                f"all {len(self._stream.round)} episodes of the round are finished: begin another one"
            )
        if waiting.any() and mode != AutoresetMode.NEXT_STEP and self._stream.round is None:
            row = int(np.flatnonzero(waiting)[0])
            if mode == AutoresetMode.SAME_STEP:
                raise error.ResetNeeded(f"row {row} has finished with the round of episodes it was in: reset() first")
            raise error.ResetNeeded(
                f"row {row} has finished and autoreset is disabled: reset(options={{'reset_mask': ...}}) first"
            )
        infos = VectorInfos(self.num_envs)
        reward = self._episodes.step(np.flatnonzero(~waiting), actions, log_prob, infos)
        self._reported = None
        terminated = np.array([reason in ENDS for reason in texts.finish_reasons]) & ~waiting
        truncated = np.array([reason in CUTS for reason in texts.finish_reasons]) & ~waiting
        if self.render_mode == "human":
            self._show()

        finished = np.flatnonzero(terminated | truncated)
        if mode == AutoresetMode.SAME_STEP and len(finished):
            self._add_mask_info(infos, finished)
            infos.move_to_final(finished, [texts.observation(row) for row in finished.tolist()])
            begun = finished if self._stream.round is None else finished[: self._stream.round.left]
            if len(begun):
                self._process.begin(begun)
                self._add_reset_info(infos, begun)
        elif mode == AutoresetMode.NEXT_STEP and waiting.any():
            rows = np.flatnonzero(waiting)
            self._process.begin(rows)
            self._add_reset_info(infos, rows)
        self._add_mask_info(infos, np.arange(self.num_envs))
        return texts.observation(), reward, terminated, truncated, infos.values

    def render(self) -> tuple[Any, ...] | None:
        """One string (``ansi``) or picture (``rgb_array``) per row; ``human`` prints at each step instead."""
        if self.render_mode is None:
            warnings.warn("render() needs a render_mode: 'ansi', 'human' or 'rgb_array'", stacklevel=2)
            return None
        if self.render_mode == "human":
            return None
        draw = render_ansi if self.render_mode == "ansi" else render_rgb
        return tuple(draw(self._episodes.rendered(row)) for row in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Let go of the models."""
        self._process.let_go()

    # ------------------------------------------------------------------ rounds of episodes

    def begin_round(self, episodes: int, group_size: int = 1) -> dict[str, np.ndarray]:
        """Begin a round: a fixed number of whole episodes, ``group_size`` of them from each prompt drawn.

        A row that finishes takes the next episode of the round at once; where none is left it waits: its observation
        stays, ``step`` neither reads its action nor pays it anything. :meth:`end_round` goes back to episodes without
        end. For agents that compare completions of one prompt with each other.

        :param episodes: E, a multiple of ``group_size`` and at least the number of rows
        :param group_size: completions of each prompt
        :return: the observation, as of ``reset``
        :raises ValueError: if the numbers do not fit each other, or the environment does not reset in the same step
        :raises RuntimeError: while steps are in the record
        """
        self._check_ready("begin_round")
        if self.options.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ValueError(
                f"autoreset_mode={self.options.autoreset_mode}: rounds need rows that reset in the same step"
            )
        self._check_nothing_recorded("begin_round")
        self._stream.begin_round(episodes, group_size)
        self._reported = None
        rows = np.arange(self.num_envs)
        self._episodes.scorer.forget(rows)
        self._process.begin(rows)
        return self._episodes.texts.observation()

    def end_round(self) -> None:
        """Let finished rows begin anew from drawn prompts again; those that wait do so at the next ``reset``."""
        self._stream.round = None

    @property
    def token_ids(self) -> tuple[list[int], ...]:
        """The text so far of each row, prompt and completion, as token ids."""
        self._check_ready("token_ids")
        ids, lengths = self._episodes.texts.ids, self._episodes.texts.lengths.tolist()
        return tuple(row[:length].tolist() for row, length in zip(ids, lengths, strict=True))

    @property
    def episode_lengths(self) -> np.ndarray:
        """``(N,)`` how many actions each row's episode has had so far."""
        self._check_ready("episode_lengths")
        return self._episodes.texts.taken.copy()

    @property
    def prompt_rows(self) -> tuple[PromptRow, ...]:
        """The prompt of the episode in each row, with its columns."""
        return tuple(self._episodes.texts.prompts)

    @property
    def episode_numbers(self) -> np.ndarray:
        """``(N,)`` the number, in its round, of the episode that each row writes; -1 without a round and where a row
        waits."""
        if self._stream.round is None:
            return np.full(self.num_envs, -1, dtype=np.int64)
        return np.where(self._episodes.texts.done, -1, self._stream.round.numbers)

    @property
    def in_round(self) -> bool:
        """Whether the episodes are those of a round."""
        return self._stream.round is not None

    # ------------------------------------------------------------------ rollouts, and what they earned

    @property
    def in_rollout(self) -> bool:
        """Whether steps are recorded, see :meth:`begin_rollout`."""
        return self._episodes.record is not None

    @property
    def scoring_deferred(self) -> bool:
        """Whether rewards come from :meth:`scores` instead of ``step``, which pays zero."""
        return self._episodes.deferred

    @property
    def steps_waiting(self) -> int:
        """Steps that were taken and not scored."""
        return self._episodes.waiting

    def begin_rollout(self, defer_scoring: bool = True) -> None:
        """Record what is written from now on, and what it earns, until :meth:`scores` asks for it.

        :param defer_scoring: True: ``step`` pays zero, and :meth:`scores` scores all steps in a few passes; False: each
            step is scored and paid at once. The scores are the same
        :raises RuntimeError: within a rollout that is scored in the other way
        """
        self._episodes.begin_rollout(defer_scoring)

    def scores(self, log_probs: np.ndarray | None = None) -> RolloutScores:
        """What the steps since the last call earned, and the episodes that ended in them.

        :param log_probs: ``(K, N)`` log-probabilities, in nats, of the last K steps' actions, where the agent knows
            better by now than when it reported them; KL and rewards are then made of these
        :raises RuntimeError: if no step was recorded
        :raises ValueError: if ``log_probs`` has another shape
        :raises RewardError: if the reward fails; the steps stay in the record, and can be asked for again
        """
        return self._episodes.scores(log_probs)

    def end_rollout(self) -> None:
        """Stop recording.

        :raises RuntimeError: while steps wait to be scored
        """
        self._episodes.end_rollout()

    def _check_nothing_recorded(self, what: str) -> None:
        if self._episodes.recorded:
            raise RuntimeError(f"{self._episodes.recorded} steps are in the record; call scores() before {what}()")

    # ------------------------------------------------------------------ the state, for checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Where every episode stands, the random state and β, as arrays and plain data.

        An environment made with the same options goes on from it exactly (:meth:`load_state_dict`). Models, prompts
        and options are not part of it.

        :raises RuntimeError: while steps are in the record
        """
        self._check_nothing_recorded("state_dict")
        return {
            **self._episodes.state_dict(),
            **self._stream.state_dict(),
            "reward": self.reward.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        :raises ValueError: if it is the state of an environment with other options
        """
        self._check_open("load_state_dict")
        self._episodes.load_state_dict(state)
        self.kl_coef = state["kl_coef"]
        self._stream.load_state_dict(state)
        self.reward.load_state_dict(state["reward"])
        self._reported = None
        self.forget_cached()

    # ------------------------------------------------------------------ parts of reset and step

    def _add_reset_info(self, infos: VectorInfos, rows: np.ndarray) -> None:
        infos.put("prompt", rows, [self._episodes.texts.prompts[row].prompt for row in rows], object)

    def _add_mask_info(self, infos: VectorInfos, rows: np.ndarray) -> None:
        if self._episodes.allowed is not None:
            infos.put("action_mask", rows, self._episodes.allowed[rows], np.int8)

    def _show(self) -> None:
        for row in range(self.num_envs):
            print(render_ansi(self._episodes.rendered(row)), flush=True)

    # ------------------------------------------------------------------ set-up and checks

    @property
    def np_random_seed(self) -> Any:
        """The seed of each row's random numbers."""
        return self._stream.seeds

    @property  # type: ignore[misc]
    def np_random(self) -> Any:
        """The random number generator of each row; it draws the prompts."""
        return tuple(self._stream.rngs)

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise error.ClosedEnvironmentError(f"{what} after close(): make the environment anew")

    def _check_ready(self, what: str) -> None:
        self._check_open(what)
        if not self._episodes.texts.started.all():
            raise error.ResetNeeded(f"{what} before reset(): call reset() first")
