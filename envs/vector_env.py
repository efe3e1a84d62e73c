"""Token-by-token text generation, many rows at once: the implementation behind every form of ``TextGen-v0``.

``gym.make_vec("TextGen-v0", num_envs=64)`` gives a :class:`TextGenVectorEnv`; :class:`~textgym.envs.env.TextGenEnv` is
one with a single row. The options and everything observable are documented there.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
from gymnasium import error, spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from transformers import PreTrainedTokenizerBase

from textgym.envs.action_masks import ActionMasks
from textgym.envs.calibration import calibrate
from textgym.envs.options import TextGenOptions, check_number, share
from textgym.envs.rendering import RenderedEpisode, render_ansi, render_rgb
from textgym.envs.scoring import DeferredScores, Scorer, Stretch
from textgym.language_model import (
    LanguageModel,
    load_language_model,
    load_vocabulary,
    resolve_device,
    resolve_dtype,
)
from textgym.prompts import PromptRow, as_columns, as_prompt_source
from textgym.rewards import PrefixBatch, as_reward

DEFAULT_MAX_PROMPT_TOKENS = 64


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
    :param options: see :class:`~textgym.envs.env.TextGenEnv`
    """

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        self.options = TextGenOptions.from_keywords(options)
        if isinstance(num_envs, bool) or not isinstance(num_envs, int) or num_envs < 1:
            raise ValueError(f"num_envs={num_envs!r} must be a whole number, at least 1")
        resolve_device(self.options.device)  # wrong values are errors now, though the model may be loaded later
        resolve_dtype(self.options.dtype)
        self.num_envs = num_envs
        self.render_mode = self.options.render_mode
        self.metadata = {
            "render_modes": ["ansi", "human", "rgb_array"],
            "render_fps": 10,
            "autoreset_mode": self.options.autoreset_mode,
        }
        self._prompts = as_prompt_source(self.options.prompts)
        self._reward = as_reward(self.options.reward)
        # Without a penalty or a restriction nobody needs the model's weights, only its vocabulary.
        needs_model = self.options.kl_coef > 0 or self.options.top_k > 0 or self.options.top_p < 1.0
        self._model: LanguageModel | None = None
        if needs_model:
            self._model = self._load_model()
            self.vocabulary = self._model.vocabulary
        else:
            self.vocabulary = load_vocabulary(self.options.language_model, tokenizer=self.options.tokenizer)
        self.tokenizer: PreTrainedTokenizerBase = self.vocabulary.tokenizer
        self.vocab_size = self.vocabulary.size
        self.max_new_tokens = self.options.max_new_tokens
        self.max_prompt_tokens = self._prompt_room(self.vocabulary.context_limit)
        self.context = self.max_prompt_tokens + self.max_new_tokens
        self._kl_coef = float(self.options.kl_coef)
        self._scorer = Scorer(
            self._reward,
            self.options.reward_every,
            self._model if self._kl_coef > 0 else None,
            self.options.kl_estimator,
            self.temperature,
            self.context,
            num_envs,
        )
        self._masks: ActionMasks | None = None
        if self.masking:
            self._masks = ActionMasks(self.options, self.vocabulary, self._model, self.context)
            self._allowed = np.ones((num_envs, self.vocab_size), dtype=bool)  # in the current states

        self.single_observation_space = spaces.Dict(
            {
                "input_ids": spaces.Box(0, self.vocab_size - 1, (self.context,), np.int64),
                "attention_mask": spaces.Box(0, 1, (self.context,), np.int8),
                "prompt_length": spaces.Box(0, self.context, (1,), np.int64),
            }
        )
        self.single_action_space = spaces.Discrete(self.vocab_size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        n, t = num_envs, self.max_new_tokens
        self._ids = np.full((n, self.context), self.vocabulary.pad_token_id, dtype=np.int64)
        self._lengths = np.zeros(n, dtype=np.int64)
        self._prompt_lengths = np.zeros(n, dtype=np.int64)
        self._text_lengths = np.zeros(n, dtype=np.int64)  # characters of each completion, for stop strings
        self._rows: list[PromptRow] = [PromptRow("", {}) for _ in range(n)]
        self._done = np.zeros(n, dtype=bool)
        self._finish_reasons: list[str | None] = [None] * n
        self._token_rewards = np.zeros((n, t))  # what rendering shows
        self._token_kl = np.zeros((n, t))
        self._started = np.zeros(n, dtype=bool)
        self._rngs: list[np.random.Generator] = [np.random.default_rng() for _ in range(n)]
        self._seeds: tuple[int | None, ...] | None = None
        self._reported: np.ndarray | None = None
        self._warned_truncation = False
        # Deferred scoring: what waits to be scored.
        self._deferred = False
        self._pending_log_probs: list[np.ndarray] = []
        self._pending_masks: list[np.ndarray] = []
        self._pending: list[Stretch] = []
        self._stretch_start = np.zeros(n, dtype=np.int64)  # completion tokens already scored
        self._earned = np.zeros((n, 2))  # return and KL of the running episodes, up to what is scored

    # ------------------------------------------------------------------ what agents ask for

    @property
    def temperature(self) -> float:
        """Divides the logits of reference and policy alike."""
        return float(self.options.temperature)

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
            self._model = self._scorer.reference = self._load_model()

    def action_masks(self) -> np.ndarray:
        """Which actions the current states allow, ``(N, V)`` bool.

        :raises ValueError: without ``action_masking=True``
        """
        if self._masks is None:
            raise ValueError("this environment doesn't mask actions; make it with action_masking=True")
        self._check_ready("action_masks")
        return self._allowed.copy()

    def policy_language_model(self, device: Any = None) -> LanguageModel:
        """A trainable copy of the environment's language model: where a policy starts, at KL 0 to the reference."""
        copy = self._load_model().trainable_copy()
        if device is not None:
            copy.model.to(device)
        return copy

    def report_log_probs(self, log_probs: Any) -> None:
        """Tell under which log-probabilities, ``(N,)`` in nats, the actions of the coming step were sampled.

        For clients that step through wrappers, whose ``step`` passes actions only. Holds for one step.

        :raises ValueError: if the shape is wrong or a value is no log-probability
        """
        values = np.array(log_probs, dtype=np.float64)  # a copy: the caller's array may be used again before it counts
        if values.shape != (self.num_envs,):
            raise ValueError(f"log_probs has shape {values.shape}, expected ({self.num_envs},)")
        wrong = np.flatnonzero(~np.isfinite(values) | (values > 1e-3))
        if len(wrong):
            raise ValueError(f"log_probs[{wrong[0]}]={values[wrong[0]]} is no log-probability (finite, at most 0)")
        self._reported = values

    # ------------------------------------------------------------------ Gymnasium

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode in every row, or in those of ``options["reset_mask"]``.

        Beginning anew in every row also drops the steps that wait to be scored.

        :param seed: of row 0, the following rows get the following numbers; or a list with one seed per row
        :param options: ``reset_mask``: ``(N,)`` bool; ``prompt``: a text for all rows or a list of N texts, instead
            of drawn prompts
        """
        self._check_open("reset")
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        prompt = options.pop("prompt", None)
        if options:
            raise ValueError(f"unknown reset options {sorted(options)}; known are 'prompt' and 'reset_mask'")
        rows = np.arange(self.num_envs) if mask is None else np.flatnonzero(self._checked_mask(mask))
        if mask is not None and self._pending_log_probs:
            raise RuntimeError("reset of some rows while steps wait to be scored; call score_deferred() first")
        self._pending_log_probs, self._pending_masks, self._pending = [], [], []  # of episodes that are given up
        self._reported = None
        self._seed_rows(seed, rows)
        if self._reward.needs_calibration:
            calibrate(
                self._reward,
                self._load_model(),
                self._prompts,
                self.options,
                lambda prompt: self._fit(self.vocabulary.encode(prompt), prompt),
            )
        fixed = self._fixed_prompts(prompt, rows)
        self._scorer.forget(rows)
        self._begin(rows, fixed)
        infos: dict[str, Any] = {}
        self._add_reset_info(infos, rows)
        self._add_mask_info(infos, rows)
        if self.render_mode == "human":
            self._show()
        return self._observation(), infos

    def step(
        self, actions: Any, log_probs: Any = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Append one token to every row.

        :param actions: ``(N,)`` token ids
        :param log_probs: ``(N,)`` log-probabilities, in nats, under which the agent drew them; left out, the agent
            counts as deterministic (log π = 0)
        :return: observation, rewards ``(N,)`` float64, terminated and truncated ``(N,)`` bool, infos
        """
        self._check_ready("step")
        actions = self._checked_actions(actions)
        if log_probs is not None:
            self.report_log_probs(log_probs)
        log_prob = np.zeros(self.num_envs) if self._reported is None else self._reported
        self._reported = None

        waiting = self._done.copy()  # rows that finished at the step before and haven't begun anew
        if waiting.any() and self.options.autoreset_mode == AutoresetMode.DISABLED:
            row = int(np.flatnonzero(waiting)[0])
            raise error.ResetNeeded(
                f"row {row} has finished and autoreset is disabled: reset(options={{'reset_mask': ...}}) first"
            )
        active = np.flatnonzero(~waiting)
        infos: dict[str, Any] = {}
        reward = np.zeros(self.num_envs)
        if self._deferred:
            self._pending_log_probs.append(log_prob)
            if self._masks is not None:
                self._pending_masks.append(np.packbits(self._allowed, axis=1))
        if len(active):
            ref_log_prob = self._reference_log_prob(active, actions)
            self._append(active, actions)
            reward[active] = self._reward_step(active, log_prob, ref_log_prob, infos)
        terminated = np.array([r in ("eos", "stop") for r in self._finish_reasons]) & ~waiting
        truncated = np.array([r == "length" for r in self._finish_reasons]) & ~waiting
        if self.render_mode == "human":
            self._show()

        finished = np.flatnonzero(terminated | truncated)
        if self.options.autoreset_mode == AutoresetMode.SAME_STEP and len(finished):
            self._add_mask_info(infos, finished)
            self._move_to_final(infos, finished)
            self._begin(finished)
            self._add_reset_info(infos, finished)
        elif self.options.autoreset_mode == AutoresetMode.NEXT_STEP and waiting.any():
            rows = np.flatnonzero(waiting)
            self._begin(rows)
            self._add_reset_info(infos, rows)
        self._add_mask_info(infos, np.arange(self.num_envs))
        return self._observation(), reward, terminated, truncated, infos

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
        self._model = None
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

    # ------------------------------------------------------------------ deferred scoring

    @property
    def scoring_deferred(self) -> bool:
        """Whether rewards come from :meth:`score_deferred` instead of ``step``."""
        return self._deferred

    def defer_scoring(self, on: bool) -> None:
        """Switch to deferred scoring, or back. While it is on, ``step`` pays zero and :meth:`score_deferred` the rest.

        :raises RuntimeError: when switched off while steps wait to be scored
        """
        if not on and self._pending_log_probs:
            raise RuntimeError(
                f"{len(self._pending_log_probs)} steps wait to be scored; call score_deferred() before switching off"
            )
        if on == self._deferred:
            return
        self._deferred = on
        t = self._lengths - self._prompt_lengths
        if on:
            self._stretch_start = t.copy()
            taken = np.arange(self.max_new_tokens) < t[:, None]
            kl = np.nan_to_num(self._token_kl)
            self._earned = np.stack([(self._token_rewards * taken).sum(1), (kl * taken).sum(1)], axis=1)
        else:
            fresh = np.flatnonzero(self._started & (t == 0))
            if len(fresh):
                self._scorer.start_rows(self._batch(fresh))

    def score_deferred(self) -> DeferredScores:
        """Score all steps since the last call: rewards ``(S, N)`` and the episodes that ended in them.

        :raises RuntimeError: if deferred scoring is off or no step was taken
        """
        if not self._deferred or not self._pending_log_probs:
            raise RuntimeError("nothing to score: defer_scoring(True), then step")
        for row in range(self.num_envs):
            t = int(self._lengths[row] - self._prompt_lengths[row])
            if not self._done[row] and t > self._stretch_start[row]:
                self._pending.append(self._stretch(row, finish_reason=None))
                self._stretch_start[row] = t
        stretches = self._pending
        masks = self._pending_masks if self.masking else None
        scores = self._scorer.score_stretches(
            stretches, np.stack(self._pending_log_probs), self.tokenizer, self._kl_coef, masks
        )
        self._pending_log_probs, self._pending_masks, self._pending = [], [], []
        for stretch in stretches:
            steps = slice(stretch.first_step, stretch.first_step + stretch.end - stretch.start)
            row = stretch.row
            rewards, kl = scores.rewards[steps, row], scores.kl[steps, row]
            if not stretch.start:
                self._earned[row] = 0.0
            self._earned[row] += rewards.sum(dtype=np.float64), np.nansum(kl, dtype=np.float64)
            if stretch.finish_reason is None:
                self._token_rewards[row, stretch.start : stretch.end] = rewards
                self._token_kl[row, stretch.start : stretch.end] = kl
                continue
            scores.episodes.append(
                {
                    "row": row,
                    "step": steps.stop - 1,
                    "r": float(self._earned[row, 0]),
                    "l": stretch.end,
                    "score": stretch.score,
                    "kl": float(self._earned[row, 1]) if self._scorer.reference is not None else float("nan"),
                    "finish_reason": stretch.finish_reason,
                    "prompt": stretch.prompt,
                    "completion": stretch.completion,
                }
            )
        return scores

    def _stretch(self, row: int, finish_reason: str | None, completion: str | None = None) -> Stretch:
        """The steps of a row since it was last scored; the newest is the newest pending step."""
        start = int(self._stretch_start[row])
        steps = int(self._lengths[row] - self._prompt_lengths[row]) - start
        return Stretch(
            row=row,
            first_step=len(self._pending_log_probs) - steps,
            start=start,
            ids=self._ids[row, : self._lengths[row]].copy(),
            prompt_length=int(self._prompt_lengths[row]),
            prompt=self._rows[row].prompt,
            columns=self._rows[row].columns,
            finish_reason=finish_reason,
            completion=completion,
            penalty=self._missing_eos_penalty(finish_reason),
        )

    # ------------------------------------------------------------------ one step, in parts

    def _reference_log_prob(self, active: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """``(N,)`` log π_ref of each active row's action in the state before it; NaN where unknown or deferred."""
        out = np.full(self.num_envs, np.nan)
        if self._scorer.reference is not None and not self._deferred:
            allowed = None if self._masks is None else self._allowed[active]
            out[active] = self._scorer.reference_log_probs(
                self._ids[active], self._lengths[active], active, actions[active], allowed
            )
        return out

    def _append(self, active: np.ndarray, actions: np.ndarray) -> None:
        """Append the actions and decide which rows finish, and why."""
        self._ids[active, self._lengths[active]] = actions[active]
        self._lengths[active] += 1
        taken = self._lengths[active] - self._prompt_lengths[active]
        stopped = self._stopped(active, taken)
        for row, count, stop in zip(active.tolist(), taken.tolist(), stopped, strict=True):
            if actions[row] == self.vocabulary.eos_token_id and count > self.options.min_new_tokens:
                self._finish_reasons[row] = "eos"
            elif stop:
                self._finish_reasons[row] = "stop"
            elif count == self.max_new_tokens:
                self._finish_reasons[row] = "length"
        self._done[active] = [self._finish_reasons[row] is not None for row in active]
        self._mask_actions(active)

    def _mask_actions(self, rows: np.ndarray) -> None:
        """Bring the action masks of rows up to date with their states."""
        if self._masks is not None:
            ids, lengths = self._ids[rows], self._lengths[rows]
            taken = lengths - self._prompt_lengths[rows]
            self._allowed[rows] = self._masks.of(ids, lengths, taken, self._done[rows], rows)

    def _stopped(self, active: np.ndarray, taken: np.ndarray) -> list[bool]:
        """Whether the newest token completed a stop string."""
        if not self.options.stop_strings:
            return [False] * len(active)
        texts = self._batch(active).completions
        before = self._text_lengths[active]
        # U+FFFD at the end stands for a character that isn't complete yet and may be part of a stop string.
        self._text_lengths[active] = [len(text.rstrip("\ufffd")) for text in texts]
        return [
            count >= self.options.min_new_tokens
            and any(stop in text[max(0, start - len(stop) + 1) :] for stop in self.options.stop_strings)
            for text, start, count in zip(texts, before.tolist(), taken.tolist(), strict=True)
        ]

    def _reward_step(
        self, active: np.ndarray, log_prob: np.ndarray, ref_log_prob: np.ndarray, infos: dict[str, Any]
    ) -> np.ndarray:
        """Rewards of the active rows, with their parts put into the infos; zeros while scoring is deferred."""
        finished = active[self._done[active]]
        if self._deferred:
            completions = self._batch(finished).completions if len(finished) else []
            for row, completion in zip(finished.tolist(), completions, strict=True):
                self._pending.append(self._stretch(row, self._finish_reasons[row], completion))
            self._add_episode_info(infos, finished, completions, with_score=False)
            return np.zeros(len(active))
        batch = self._batch(active)
        taken = batch.completion_lengths
        due = np.asarray(self._scorer.is_due(taken, self._done[active]), dtype=bool)
        reward_model = self._scorer.reward_step(batch, due)
        kl = self._scorer.kl(log_prob[active], ref_log_prob[active])
        penalty = np.array([self._missing_eos_penalty(self._finish_reasons[row]) for row in active])
        reward = reward_model - penalty - (self._kl_coef * kl if self._kl_coef else 0.0)
        self._token_rewards[active, taken - 1] = reward
        self._token_kl[active, taken - 1] = kl
        parts = {"reward_model": reward_model}
        if self._scorer.reference is not None:
            parts |= {"kl": kl, "ref_log_prob": ref_log_prob[active]}
        if self.options.missing_eos_penalty:
            parts["missing_eos_penalty"] = penalty
        for name, values in parts.items():
            self._put(infos, name, active, values, np.float64)
        if len(finished):
            completions = [c for c, row in zip(batch.completions, active, strict=True) if self._done[row]]
            self._add_episode_info(infos, finished, completions, with_score=True)
        return reward

    def _missing_eos_penalty(self, finish_reason: str | None) -> float:
        return float(self.options.missing_eos_penalty) if finish_reason == "length" else 0.0

    # ------------------------------------------------------------------ episodes

    def _begin(self, rows: np.ndarray, prompts: list[PromptRow] | None = None) -> None:
        """Put a prompt into each of the rows and start its episode."""
        for i, row in enumerate(rows.tolist()):
            prompt = self._prompts.sample(self._rngs[row]) if prompts is None else prompts[i]
            ids = self._fit(self.vocabulary.encode(prompt.prompt), prompt.prompt)
            self._ids[row] = self.vocabulary.pad_token_id
            self._ids[row, : len(ids)] = ids
            self._lengths[row] = self._prompt_lengths[row] = len(ids)
            self._rows[row] = prompt
            self._finish_reasons[row] = None
        self._done[rows] = False
        self._started[rows] = True
        self._text_lengths[rows] = 0
        self._stretch_start[rows] = 0
        self._mask_actions(rows)
        if not self._deferred:
            self._scorer.start_rows(self._batch(rows))

    def _fit(self, ids: list[int], prompt: str) -> list[int]:
        """A prompt's ids, cut on the left where they are too many."""
        if not ids:
            raise ValueError(
                f"the tokenizer makes no token of the prompt {prompt[:60]!r}; give prompts that have at least one"
            )
        if len(ids) <= self.max_prompt_tokens:
            return ids
        problem = f"a prompt of {len(ids)} tokens is longer than max_prompt_tokens={self.max_prompt_tokens}"
        if self.options.prompt_overflow == "error":
            raise ValueError(f"{problem}: {prompt[:60]!r}...; raise max_prompt_tokens or shorten the prompt")
        if not self._warned_truncation:
            self._warned_truncation = True
            warnings.warn(
                f"{problem} and was cut on the left, as later ones will be without a word: {prompt[:60]!r}...",
                UserWarning,
                stacklevel=2,
            )
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[0] == bos and self.max_prompt_tokens > 1:
            return [bos, *ids[-(self.max_prompt_tokens - 1) :]]  # models trained with BOS expect it
        return ids[-self.max_prompt_tokens :]

    def _batch(self, rows: np.ndarray) -> PrefixBatch:
        return PrefixBatch(
            input_ids=self._ids[rows],
            lengths=self._lengths[rows],
            prompt_lengths=self._prompt_lengths[rows],
            finished=np.array([self._finish_reasons[row] == "eos" for row in rows], dtype=bool),
            rows=rows,
            prompts=[self._rows[row].prompt for row in rows],
            columns=as_columns([self._rows[row].columns for row in rows]),
            tokenizer=self.tokenizer,
        )

    def _observation(self, row: int | None = None) -> dict[str, np.ndarray]:
        """A fresh copy of the observation of all rows, or of one."""
        rows: Any = slice(None) if row is None else row
        lengths = self._lengths[rows]
        return {
            "input_ids": self._ids[rows].copy(),
            "attention_mask": (np.arange(self.context) < np.asarray(lengths)[..., None]).astype(np.int8),
            "prompt_length": np.array(self._prompt_lengths[rows])[..., None],
        }

    # ------------------------------------------------------------------ infos, as Gymnasium's vector environments

    def _put(self, infos: dict[str, Any], name: str, rows: np.ndarray, values: Any, dtype: Any) -> None:
        """Set ``infos[name][rows]`` and the mask ``infos["_" + name]`` that says which rows have it."""
        values = np.asarray(values, dtype=dtype)
        if name not in infos:
            empty = None if dtype is object else 0
            infos[name] = np.full((self.num_envs, *values.shape[1:]), empty, dtype=dtype)
        infos[name][rows] = values
        infos.setdefault(f"_{name}", np.zeros(self.num_envs, dtype=bool))[rows] = True

    def _add_reset_info(self, infos: dict[str, Any], rows: np.ndarray) -> None:
        prompts = np.empty(len(rows), dtype=object)
        prompts[:] = [self._rows[row].prompt for row in rows]
        self._put(infos, "prompt", rows, prompts, object)

    def _add_mask_info(self, infos: dict[str, Any], rows: np.ndarray) -> None:
        if self._masks is not None:
            self._put(infos, "action_mask", rows, self._allowed[rows], np.int8)

    def _add_episode_info(
        self, infos: dict[str, Any], rows: np.ndarray, completions: list[str], with_score: bool
    ) -> None:
        if not len(rows):
            return
        texts: dict[str, list[Any]] = {
            "finish_reason": [self._finish_reasons[row] for row in rows],
            "prompt": [self._rows[row].prompt for row in rows],
            "completion": completions,
        }
        for name, values in texts.items():
            array = np.empty(len(rows), dtype=object)
            array[:] = values
            self._put(infos, name, rows, array, object)
        if with_score:
            self._put(infos, "score", rows, self._scorer.potential[rows], np.float64)

    def _move_to_final(self, infos: dict[str, Any], rows: np.ndarray) -> None:
        """Take the finished rows' infos and observations into ``final_info`` and ``final_obs``."""
        final: dict[str, Any] = {}
        for name in [key for key in infos if not key.startswith("_")]:
            has = infos[f"_{name}"]
            mine = rows[has[rows]]
            if len(mine):
                kind = object if infos[name].dtype == object else infos[name].dtype
                self._put(final, name, mine, infos[name][mine], kind)
            has[mine] = False
            infos[name][mine] = None if infos[name].dtype == object else 0
            if not has.any():
                del infos[name], infos[f"_{name}"]
        observations = np.full(self.num_envs, None, dtype=object)
        for row in rows.tolist():
            observations[row] = self._observation(row)
        finished = np.zeros(self.num_envs, dtype=bool)
        finished[rows] = True
        infos.update(final_obs=observations, _final_obs=finished, final_info=final, _final_info=finished.copy())

    # ------------------------------------------------------------------ rendering

    def _rendered(self, row: int) -> RenderedEpisode:
        taken = int(self._lengths[row] - self._prompt_lengths[row])
        start = int(self._prompt_lengths[row])
        ids = self._ids[row]
        texts = self.tokenizer.batch_decode(
            [ids[:end].tolist() for end in range(start, start + taken + 1)],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        # What each token adds to the text; a token that changes what stood there (half a character) adds its rest.
        tokens = [
            after[len(before) :] if after.startswith(before) else after[len(before) - 1 :]
            for before, after in itertools.pairwise(texts)
        ]
        kl = self._token_kl[row, :taken]
        return RenderedEpisode(
            prompt=self._rows[row].prompt,
            tokens=tokens,
            rewards=self._token_rewards[row, :taken].tolist(),
            score=None if self._deferred else float(self._scorer.potential[row]),
            kl=None if self._scorer.reference is None or self._deferred else float(kl.sum()),
            ret=float(self._token_rewards[row, :taken].sum()),
            finish_reason=self._finish_reasons[row],
        )

    def _show(self) -> None:
        for row in range(self.num_envs):
            print(render_ansi(self._rendered(row)), flush=True)

    # ------------------------------------------------------------------ set-up and checks

    def _load_model(self) -> LanguageModel:
        """The environment's language model: the one it holds, or a freshly opened one."""
        if self._model is not None:
            return self._model
        return load_language_model(
            self.options.language_model,
            tokenizer=self.options.tokenizer,
            device=self.options.device,
            dtype=self.options.dtype,
        )

    def _prompt_room(self, limit: int | None) -> int:
        """Most prompt tokens: as asked, or 64, or what the model's context leaves."""
        room = None if limit is None else limit - self.max_new_tokens
        if room is not None and room < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt: the model's context is {limit}"
            )
        asked = self.options.max_prompt_tokens
        if asked is None:
            return DEFAULT_MAX_PROMPT_TOKENS if room is None else min(DEFAULT_MAX_PROMPT_TOKENS, room)
        if room is not None and asked > room:
            raise ValueError(
                f"max_prompt_tokens={asked} and max_new_tokens={self.max_new_tokens} are together more than the "
                f"model's context of {limit} tokens"
            )
        return asked

    def _seed_rows(self, seed: Any, rows: np.ndarray) -> None:
        if seed is None and self._seeds is None and self.options.seed is not None:
            seed = self.options.seed  # the option seeds the first reset
        if seed is None and self._seeds is None:
            seed = [None] * self.num_envs
        if seed is None:
            return
        if isinstance(seed, int | np.integer):
            seed = [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise ValueError(f"seed has {len(seed)} entries, expected one number or num_envs={self.num_envs}")
        seeds = list(self._seeds or [None] * self.num_envs)
        for row in rows.tolist():
            if seed[row] is not None or seeds[row] is None:  # a row without a new seed goes on as it is
                self._rngs[row], seeds[row] = seeding.np_random(seed[row])
        self._seeds = tuple(seeds)

    @property
    def np_random_seed(self) -> Any:
        """The seed of each row's random numbers."""
        return self._seeds

    @property  # type: ignore[misc]
    def np_random(self) -> Any:
        """The random number generator of each row; it draws the prompts."""
        return tuple(self._rngs)

    def _fixed_prompts(self, prompt: Any, rows: np.ndarray) -> list[PromptRow] | None:
        if prompt is None:
            return None
        texts = [prompt] * self.num_envs if isinstance(prompt, str) else prompt
        if (
            not isinstance(texts, list | tuple)
            or len(texts) != self.num_envs
            or not all(isinstance(text, str) and text for text in texts)
        ):
            raise ValueError(f"options['prompt'] must be a non-empty text or {self.num_envs} of them, got {prompt!r}")
        return [PromptRow(texts[row], {}) for row in rows]

    def _checked_mask(self, mask: Any) -> np.ndarray:
        if not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise TypeError(f"options['reset_mask'] must be a bool array of shape ({self.num_envs},), got {mask!r}")
        if not mask.any():
            raise ValueError("options['reset_mask'] selects no row")
        return mask

    def _checked_actions(self, actions: Any) -> np.ndarray:
        array = np.asarray(actions)
        if array.shape != (self.num_envs,):
            raise ValueError(f"actions has shape {array.shape}, expected ({self.num_envs},)")
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"actions must be whole numbers (token ids), got {array.dtype}")
        wrong = np.flatnonzero((array < 0) | (array >= self.vocab_size))
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(f"actions[{row}]={array[row]} is no token id: expected 0 to {self.vocab_size - 1}")
        return array.astype(np.int64)

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise error.ClosedEnvironmentError(f"{what} after close(): make the environment anew")

    def _check_ready(self, what: str) -> None:
        self._check_open(what)
        if not self._started.all():
            raise error.ResetNeeded(f"{what} before reset(): call reset() first")
