"""Token-by-token text generation, many rows at once: the implementation behind every form of ``TextGen-v0``.

``gym.make_vec("TextGen-v0", num_envs=64)`` gives a :class:`TextGenVectorEnv`; :class:`~textgym.envs.env.TextGenEnv` is
one with a single row. The options and everything observable are documented there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import error, spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from transformers import PreTrainedTokenizerBase

from textgym.action_masks import ActionMasks
from textgym.chat.between_turns import BetweenTurns
from textgym.chat.reply_spans import action_positions
from textgym.checks import check_int, check_number, shown
from textgym.envs.arguments import log_probabilities, reset_options, seeds_of_rows, token_ids
from textgym.envs.calibration import calibrate
from textgym.envs.environment_model import EnvironmentModel
from textgym.envs.infos import VectorInfos
from textgym.envs.options import TextGenOptions
from textgym.envs.prompt_stream import PromptStream
from textgym.envs.record import RolloutRecord
from textgym.envs.rendering import RenderedEpisode, render_ansi, render_rgb
from textgym.envs.scoring import RolloutScores, Scorer, StepParts
from textgym.envs.sharing import share
from textgym.envs.texts import EpisodeTexts
from textgym.episode_rules import EpisodeRules, prompt_room
from textgym.language_model import LanguageModel
from textgym.prompts.fitting import all_chat
from textgym.prompts.opening import as_prompt_source
from textgym.prompts.rows import PromptRow, PromptSource
from textgym.replies import Reply, as_reply
from textgym.rewards import Reward, as_reward
from textgym.sampling import SamplingSettings

ENDS = ("eos", "stop", "reply")  # the reasons with which an episode has terminated
CUTS = ("length", "turns")  # and those with which it was truncated


class TextGenVectorEnv(VectorEnv):
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
        self.options = TextGenOptions.from_keywords(options)
        check_int("num_envs", num_envs, low=1)
        max_actions: int | None = None
        if max_episode_steps is not None and max_episode_steps != -1:  # -1 is Gymnasium's word for no limit
            check_int("max_episode_steps", max_episode_steps, low=1)
            max_actions = max_episode_steps
        self.num_envs = num_envs
        self.render_mode = self.options.render_mode
        self.metadata = {
            "render_modes": ["ansi", "human", "rgb_array"],
            "render_fps": 10,
            "autoreset_mode": self.options.autoreset_mode,
        }
        self._reward = as_reward(self.options.reward)
        self._language_model = EnvironmentModel(self.options)
        self.vocabulary = self._language_model.vocabulary()
        self.tokenizer: PreTrainedTokenizerBase = self.vocabulary.tokenizer
        self.vocab_size = self.vocabulary.size
        source = as_prompt_source(self.options.prompts, tokenizer=self.tokenizer)
        turns = self.options.turn_limits(self.vocabulary.context_limit)
        total, name = self.options.max_new_tokens, "max_new_tokens"
        if turns is not None:
            total, name = turns.max_total_tokens, "max_total_tokens"
        room = prompt_room(self.options.max_prompt_tokens, total, self.vocabulary.context_limit, name)
        longest = self.vocabulary.completion_limit
        if longest is not None and total > longest:
            raise ValueError(
                f"{name}={total} is more than the {longest} tokens that the model's decoder has positions for"
            )
        rows = source.rows
        sampling = SamplingSettings(
            max_new_tokens=min(self.options.max_new_tokens, max_actions or self.options.max_new_tokens),
            min_new_tokens=self.options.min_new_tokens,
            max_prompt_tokens=room,
            temperature=float(self.options.temperature),
            stop=self.options.stop_strings,
            action_masking=self.options.action_masking,
            top_k=self.options.top_k,
            top_p=float(self.options.top_p),
            chat=rows is not None and all_chat(rows, self.vocabulary),
        )
        self._rules = EpisodeRules(self.vocabulary, sampling, turns, max_actions)
        reply = None if self.options.reply is None else as_reply(self.options.reply)
        if reply is not None and sampling.chat:
            BetweenTurns(self.vocabulary.turns).check(reply.role)
        told_long = rows is not None and self._rules.judge(rows, self.options.prompt_overflow)
        self._stream = PromptStream(source, self._rules, self.options.prompt_overflow, told_long, num_envs)
        self.context = room + total
        self._kl_coef = float(self.options.kl_coef)
        self._scorer = Scorer(
            self._reward,
            self.options.reward_every,
            self._language_model.held if self._kl_coef > 0 else None,
            self.options.kl_estimator,
            self.temperature,
            self.context,
            num_envs,
        )
        self._masks: ActionMasks | None = None
        if self.masking:
            self._masks = ActionMasks(sampling, self.vocabulary, self._language_model.held)
            self._allowed = np.ones((num_envs, self.vocab_size), dtype=bool)  # in the current states

        self.single_observation_space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, self.vocab_size - 1, (self.context,), np.int64),
                "attention_mask": spaces.Box(0, 1, (self.context,), np.int8),
                "prompt_length": spaces.Box(0, self.context, (1,), np.int64),
            }
        )
        if reply is not None:
            self.single_observation_space["completion_mask"] = spaces.Box(0, 1, (self.context,), np.int8)
        self.single_action_space = spaces.Discrete(self.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        self._texts = EpisodeTexts(
            num_envs, self.context, self._rules, total, float(self.options.missing_eos_penalty), reply
        )
        self._reported: np.ndarray | None = None
        self._record: RolloutRecord | None = None  # within a rollout
        self._starts_due = np.zeros(self.num_envs, dtype=bool)

    # ------------------------------------------------------------------ what agents ask for

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When a row that has finished begins anew; some clients look for it here and not in ``metadata``."""
        mode = self.options.autoreset_mode
        assert isinstance(mode, AutoresetMode)
        return mode

    @property
    def sampling(self) -> SamplingSettings:
        """How an agent samples here: what else samples from its policy does so, too."""
        return self._rules.sampling

    @property
    def temperature(self) -> float:
        """Divides the logits of reference and policy alike."""
        return self.sampling.temperature

    @property
    def max_new_tokens(self) -> int:
        """After how many tokens a turn is cut off."""
        return self.sampling.max_new_tokens

    @property
    def max_actions(self) -> int:
        """Most tokens that a policy writes in an episode."""
        return self._rules.max_actions

    @property
    def reply(self) -> Reply | None:
        """Who speaks after each turn; None where an episode is one turn."""
        return self._texts.reply

    @property
    def max_prompt_tokens(self) -> int:
        """Most tokens of a prompt; longer ones are cut."""
        limit = self.sampling.max_prompt_tokens
        assert limit is not None
        return limit

    @property
    def masking(self) -> bool:
        """Whether :meth:`action_masks` restricts the actions."""
        return self.options.action_masking

    @property
    def kl_coef(self) -> float:
        """β, the weight of the KL penalty; may be changed at any time."""
        return self._kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        check_number("kl_coef", value, low=0.0)
        self._kl_coef = float(value)
        if value > 0 and self._scorer.reference is None:
            self._scorer.reference = self._language_model.hold()

    def action_masks(self) -> np.ndarray:
        """Which actions the current states allow, ``(N, V)`` bool.

        :raises ValueError: without ``action_masking=True``
        """
        if self._masks is None:
            raise ValueError("this environment doesn't mask actions; make it with action_masking=True")
        self._check_ready("action_masks")
        return self._allowed.copy()

    @property
    def reward(self) -> Reward:
        """Φ, what texts are scored with."""
        return self._reward

    def reference_language_model(self) -> LanguageModel:
        """The frozen model that the KL is measured against; opened now if nothing has needed it yet."""
        return self._language_model.hold()

    def policy_language_model(self, device: Any = None) -> LanguageModel:
        """A trainable copy of the environment's language model: where a policy starts, at KL 0 to the reference."""
        return self._language_model.trainable_copy(device)

    def observation(self) -> dict[str, np.ndarray]:
        """The current observation, as ``reset`` and ``step`` return it."""
        self._check_ready("observation")
        return self._texts.observation()

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
        rows = np.arange(self.num_envs) if mask is None else np.flatnonzero(self._checked_mask(mask))
        if mask is not None and self._record is not None and len(self._record):
            raise RuntimeError("reset of some rows with steps in the record; call scores() first")
        if mask is not None and self._stream.round is not None:
            raise RuntimeError("reset of some rows within a round of episodes; reset() of all rows ends the round")
        self._stream.round = None
        self._reported = None
        # The option seeds the first reset.
        self._stream.seed(seeds, rows, seeds_of_rows(self.options.seed, self.num_envs))
        if self._reward.needs_calibration:
            calibrate(
                self._reward,
                self._language_model.open(),
                self._stream.source,
                self.sampling,
                self._stream.fit,
            )
        fixed = self._stream.read(prompt, rows)
        self._scorer.forget(rows)
        self._begin(rows, fixed)
        self._note_starts()
        if self._record is not None:
            self._record.clear()  # of episodes that are given up
        infos = VectorInfos(self.num_envs)
        self._add_reset_info(infos, rows)
        self._add_mask_info(infos, rows)
        if self.render_mode == "human":
            self._show()
        return self._texts.observation(), infos.values

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

        texts, mode = self._texts, self.options.autoreset_mode
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
        self._note_starts()
        active = np.flatnonzero(~waiting)
        infos = VectorInfos(self.num_envs)
        reward = np.zeros(self.num_envs)
        parts = StepParts.nothing((self.num_envs,))
        turn_ends = np.zeros(self.num_envs, dtype=bool)
        if len(active):
            parts.ref_log_prob[active] = self._reference_log_prob(active, actions[active])
            with self._taken_back_where_it_fails(active):
                texts.append(active, actions[active])
                parts.penalty[active] = texts.missing_eos_penalties(active)
                turn_ends[active] = [texts.turn_reasons[row] is not None for row in active.tolist()]
                self._answer(np.flatnonzero(turn_ends & ~texts.done), parts, infos)
                if not self.scoring_deferred:
                    reward[active] = self._reward_step(active, log_prob[active], turn_ends[active], parts, infos)
            texts.keep()
        if self._record is not None:
            allowed = None if self._masks is None else self._allowed
            self._record.add(log_prob, allowed, parts, turn_ends, self._kl_coef)
        self._mask_actions(active)
        self._end_episodes(active[texts.done[active]], infos)
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
                self._begin(begun)
                self._add_reset_info(infos, begun)
        elif mode == AutoresetMode.NEXT_STEP and waiting.any():
            rows = np.flatnonzero(waiting)
            self._begin(rows)
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
        return tuple(draw(self._rendered(row)) for row in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Let go of the models."""
        self._language_model.held = None
        self._scorer.reference = None

    @property
    def spec(self) -> Any:
        """The specification that makes this environment again; models in it are shared, not copied."""
        return self._spec

    @spec.setter
    def spec(self, spec: Any) -> None:
        if spec is not None:
            spec.kwargs = {name: share(value) for name, value in spec.kwargs.items()}
        self._spec = spec

    _spec: Any = None

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
        if group_size < 1 or episodes < 1 or episodes % group_size:
            raise ValueError(f"episodes={episodes} must be a multiple of group_size={group_size}, both at least 1")
        if episodes < self.num_envs:
            raise ValueError(
                f"episodes={episodes} is less than num_envs={self.num_envs}: rows would never have one; make the "
                "environment with fewer rows, or the round longer"
            )
        self._check_nothing_recorded("begin_round")
        self._stream.begin_round(episodes, group_size)
        self._reported = None
        rows = np.arange(self.num_envs)
        self._scorer.forget(rows)
        self._begin(rows)
        return self._texts.observation()

    def end_round(self) -> None:
        """Let finished rows begin anew from drawn prompts again; those that wait do so at the next ``reset``."""
        self._stream.round = None

    @property
    def token_ids(self) -> tuple[list[int], ...]:
        """The text so far of each row, prompt and completion, as token ids."""
        self._check_ready("token_ids")
        ids, lengths = self._texts.ids, self._texts.lengths.tolist()
        return tuple(row[:length].tolist() for row, length in zip(ids, lengths, strict=True))

    @property
    def prompts(self) -> PromptSource:
        """What prompts are drawn from."""
        return self._stream.source

    @property
    def episode_lengths(self) -> np.ndarray:
        """``(N,)`` how many actions each row's episode has had so far."""
        self._check_ready("episode_lengths")
        return self._texts.taken.copy()

    @property
    def prompt_rows(self) -> tuple[PromptRow, ...]:
        """The prompt of the episode in each row, with its columns."""
        return tuple(self._texts.prompts)

    @property
    def episode_numbers(self) -> np.ndarray:
        """``(N,)`` the number, in its round, of the episode that each row writes; -1 without a round and where a row
        waits."""
        if self._stream.round is None:
            return np.full(self.num_envs, -1, dtype=np.int64)
        return np.where(self._texts.done, -1, self._stream.round.numbers)

    @property
    def in_round(self) -> bool:
        """Whether the episodes are those of a round."""
        return self._stream.round is not None

    # ------------------------------------------------------------------ rollouts, and what they earned

    @property
    def in_rollout(self) -> bool:
        """Whether steps are recorded, see :meth:`begin_rollout`."""
        return self._record is not None

    @property
    def scoring_deferred(self) -> bool:
        """Whether rewards come from :meth:`scores` instead of ``step``, which pays zero."""
        return self._record is not None and self._record.deferred

    @property
    def steps_waiting(self) -> int:
        """Steps that were taken and not scored."""
        return 0 if self._record is None else self._record.waiting

    def begin_rollout(self, defer_scoring: bool = True) -> None:
        """Record what is written from now on, and what it earns, until :meth:`scores` asks for it.

        :param defer_scoring: True: ``step`` pays zero, and :meth:`scores` scores all steps in a few passes; False: each
            step is scored and paid at once. The scores are the same
        :raises RuntimeError: within a rollout that is scored in the other way
        """
        if self._record is not None:
            if self._record.deferred != defer_scoring:
                raise RuntimeError(f"the rollout has defer_scoring={self._record.deferred}: end_rollout() first")
            return
        self._record = RolloutRecord(self._texts, self._scorer, defer_scoring)
        if defer_scoring:
            self._starts_due[:] = False

    def scores(self, log_probs: np.ndarray | None = None) -> RolloutScores:
        """What the steps since the last call earned, and the episodes that ended in them.

        :param log_probs: ``(K, N)`` log-probabilities, in nats, of the last K steps' actions, where the agent knows
            better by now than when it reported them; KL and rewards are then made of these
        :raises RuntimeError: if no step was recorded
        :raises ValueError: if ``log_probs`` has another shape
        :raises RewardError: if the reward fails; the steps stay in the record, and can be asked for again
        """
        if self._record is None or not len(self._record):
            raise RuntimeError("no step was recorded: begin_rollout(), then step")
        return self._record.scores(self._kl_coef, log_probs)

    def end_rollout(self) -> None:
        """Stop recording.

        :raises RuntimeError: while steps wait to be scored
        """
        if self._record is None:
            return
        if self._record.waiting:
            raise RuntimeError(f"{self._record.waiting} steps wait to be scored; call scores() before end_rollout()")
        if self._record.deferred:
            # Φ of the prompts of rows that began while scoring was deferred. Where it is deferred again, they are read
            # together with what follows.
            self._starts_due = self._texts.started & (self._texts.taken == 0)
        self._record = None

    def _note_starts(self) -> None:
        """Ask for Φ of prompts that is due by now: at a reset, or before the first step from them, which can be taken
        again after an error of the reward.
        """
        rows = np.flatnonzero(self._starts_due)
        if len(rows) and not self.scoring_deferred:
            self._scorer.start_rows(self._texts.batch(rows))
            self._starts_due[:] = False

    def _check_nothing_recorded(self, what: str) -> None:
        if self._record is not None and len(self._record):
            raise RuntimeError(f"{len(self._record)} steps are in the record; call scores() before {what}()")

    # ------------------------------------------------------------------ the state, for checkpoints

    def forget_cached(self) -> None:
        """Drop what the models have cached of all rows, so that what comes does not depend, in its last bits, on when.

        An agent does this before each rollout: then a run that is resumed from any rollout's beginning, with nothing
        cached, computes the same as one that was never stopped.
        """
        self._scorer.forget(np.arange(self.num_envs))
        if self._masks is not None:
            self._masks.forget(np.arange(self.num_envs), self.context)

    def state_dict(self) -> dict[str, Any]:
        """Where every episode stands, the random state and β, as arrays and plain data.

        An environment made with the same options goes on from it exactly (:meth:`load_state_dict`). Models, prompts
        and options are not part of it.

        :raises RuntimeError: while steps are in the record
        """
        self._check_nothing_recorded("state_dict")
        return {
            "texts": self._texts.state_dict(),
            "potential": self._scorer.potential.copy(),
            # Asked for with the first step, and not for the state: what is cached then decides about the last bits.
            "starts_due": self._starts_due.copy(),
            "kl_coef": self._kl_coef,
            "reward": self._reward.state_dict(),
            "allowed": None if self._masks is None else np.packbits(self._allowed, axis=1),
            **self._stream.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave.

        :raises ValueError: if it is the state of an environment with other options
        """
        self._check_open("load_state_dict")
        if (state["allowed"] is None) != (self._masks is None):
            raise ValueError(
                f"action_masking={self.masking} here, but the state is of an environment with "
                f"action_masking={state['allowed'] is not None}"
            )
        self._texts.load_state_dict(state["texts"])
        if self._record is not None:
            self._record.clear()
        self._starts_due[:] = state["starts_due"]
        self._scorer.potential[:] = state["potential"]
        self.kl_coef = state["kl_coef"]
        self._stream.load_state_dict(state)
        self._reward.load_state_dict(state["reward"])
        if self._masks is not None:
            self._allowed = np.unpackbits(state["allowed"], axis=1, count=self.vocab_size).astype(bool)
        self._reported = None
        self.forget_cached()

    # ------------------------------------------------------------------ one step, in parts

    def _reference_log_prob(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """``(B,)`` log π_ref of each row's token in the state before it; NaN where unknown or deferred."""
        if self._scorer.reference is None or self.scoring_deferred:
            return np.full(len(rows), np.nan)
        allowed = None if self._masks is None else self._allowed[rows]
        texts = self._texts
        return self._scorer.reference_log_probs(
            texts.ids[rows], texts.lengths[rows], texts.prompt_lengths[rows], rows, tokens, allowed
        )

    def _mask_actions(self, rows: np.ndarray) -> None:
        """Bring the action masks of rows up to date with their states."""
        if self._masks is not None:
            texts = self._texts
            self._allowed[rows] = self._masks.of(
                texts.ids[rows],
                texts.lengths[rows],
                texts.prompt_lengths[rows],
                rows,
                texts.turn_tokens[rows],
                texts.done[rows],
            )

    def _answer(self, rows: np.ndarray, parts: StepParts, infos: VectorInfos) -> None:
        """Let the reply speak after turns that have ended, and say so in infos."""
        if self._texts.reply is None or not len(rows):
            return
        results = self._texts.answer(rows)
        parts.reply[rows] = [result.reward for result in results]
        infos.put("reply", rows, [result.text for result in results], object)
        infos.put("reply_reward", rows, parts.reply[rows])
        infos.put("reply_truncated", rows, self._texts.cut[rows], bool)
        infos.put("turn", rows, self._texts.turn_numbers[rows], np.int64)

    def _reward_step(
        self, rows: np.ndarray, log_prob: np.ndarray, turn_ends: np.ndarray, parts: StepParts, infos: VectorInfos
    ) -> np.ndarray:
        """``(B,)`` rewards of the newest tokens of rows, with what they are made of put into ``parts`` and infos."""
        texts = self._texts
        batch, taken = texts.batch(rows), texts.taken[rows]
        reward_model = self._scorer.reward_step(batch, self._scorer.is_due(taken, turn_ends, texts.done[rows]))
        ref_log_prob, penalty = parts.ref_log_prob[rows], parts.penalty[rows]
        parts.taken[rows], parts.reward_model[rows] = True, reward_model
        kl = self._scorer.kl(log_prob, ref_log_prob)
        reward = reward_model + parts.reply[rows] - penalty - (self._kl_coef * kl if self._kl_coef else 0.0)
        texts.token_rewards[rows, taken - 1] = reward
        texts.token_kl[rows, taken - 1] = kl
        infos.put("reward_model", rows, reward_model)
        if self._scorer.reference is not None:
            infos.put("kl", rows, kl)
            infos.put("ref_log_prob", rows, ref_log_prob)
        if self.options.missing_eos_penalty:
            infos.put("missing_eos_penalty", rows, penalty)
        ended = rows[texts.done[rows]]
        infos.put("score", ended, self._scorer.potential[ended])
        infos.put("applies", ended, self._scorer.applies[ended], bool)
        return reward

    @contextmanager
    def _taken_back_where_it_fails(self, rows: np.ndarray) -> Iterator[None]:
        """After an error, the texts of rows are what they were before."""
        mark = self._texts.mark(rows)
        try:
            yield
        except BaseException:
            self._texts.take_back(rows, mark)
            raise

    def _end_episodes(self, rows: np.ndarray, infos: VectorInfos) -> None:
        """Say how the episodes of these rows ended, and keep them if they are to be scored later."""
        if not len(rows):
            return
        batch = self._texts.batch(rows)
        if self._record is not None:
            self._record.end(rows, batch.completions)
        infos.put("finish_reason", rows, [self._texts.finish_reasons[row] for row in rows], object)
        infos.put("prompt", rows, batch.prompts, object)
        infos.put("completion", rows, batch.completions, object)
        if self._texts.reply is not None:
            infos.put("transcript", rows, batch.transcripts, object)

    # ------------------------------------------------------------------ episodes

    def _begin(self, rows: np.ndarray, prompts: list[PromptRow | None] | None = None) -> None:
        """Put a prompt into each of the rows and start its episode."""
        for i, row in enumerate(rows.tolist()):
            self._texts.begin(row, *self._stream.take(row, None if prompts is None else prompts[i]))
        if self._texts.reply is not None:
            self._texts.reply.begin(rows)
        if self._record is not None:
            self._record.begin(rows)
        self._mask_actions(rows)
        self._starts_due[rows] = not self.scoring_deferred

    def _add_reset_info(self, infos: VectorInfos, rows: np.ndarray) -> None:
        infos.put("prompt", rows, [self._texts.prompts[row].prompt for row in rows], object)

    def _add_mask_info(self, infos: VectorInfos, rows: np.ndarray) -> None:
        if self._masks is not None:
            infos.put("action_mask", rows, self._allowed[rows], np.int8)

    def _rendered(self, row: int) -> RenderedEpisode:
        texts, taken = self._texts, int(self._texts.taken[row])
        known = not self.scoring_deferred
        self._note_starts()
        return RenderedEpisode(
            prompt=texts.prompts[row].prompt,
            tokens=texts.token_texts(row),
            rewards=self._rewards_of_tokens(row),
            score=float(self._scorer.potential[row]) if known else None,
            kl=float(texts.token_kl[row, :taken].sum()) if known and self._scorer.reference is not None else None,
            ret=float(texts.token_rewards[row, :taken].sum()),
            finish_reason=texts.finish_reasons[row],
        )

    def _rewards_of_tokens(self, row: int) -> list[float | None]:
        """The reward of each token behind a row's prompt; None where somebody else spoke."""
        texts = self._texts
        start, end = int(texts.prompt_lengths[row]), int(texts.lengths[row])
        rewards: list[float | None] = [None] * (end - start)
        for place, reward in zip(
            action_positions(texts.replies[row], start, end), texts.token_rewards[row].tolist(), strict=False
        ):
            rewards[place - start] = reward
        return rewards

    def _show(self) -> None:
        for row in range(self.num_envs):
            print(render_ansi(self._rendered(row)), flush=True)

    # ------------------------------------------------------------------ set-up and checks

    @property
    def np_random_seed(self) -> Any:
        """The seed of each row's random numbers."""
        return self._stream.seeds

    @property  # type: ignore[misc]
    def np_random(self) -> Any:
        """The random number generator of each row; it draws the prompts."""
        return tuple(self._stream.rngs)

    def _checked_mask(self, mask: Any) -> np.ndarray:
        if not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise TypeError(
                f"options['reset_mask']={shown(mask)} must be a bool array (NumPy) of shape ({self.num_envs},)"
            )
        if not mask.any():
            raise ValueError("options['reset_mask'] selects no row")
        return mask

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise error.ClosedEnvironmentError(f"{what} after close(): make the environment anew")

    def _check_ready(self, what: str) -> None:
        self._check_open(what)
        if not self._texts.started.all():
            raise error.ResetNeeded(f"{what} before reset(): call reset() first")
