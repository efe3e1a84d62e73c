"""The options of ``TextGen-v0``: one table of names, defaults and what is valid."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gymnasium.vector import AutoresetMode

from textgym.checks import check_bool, check_choice, check_int, check_number, check_temperature
from textgym.envs.sharing import unshare
from textgym.episode_rules import DEFAULT_MAX_PROMPT_TOKENS, EpisodeRules, prompt_room
from textgym.kl import KL_ESTIMATORS
from textgym.prompts.fitting import all_chat
from textgym.prompts.rows import PromptRows
from textgym.sampling import SamplingSettings, check_turn_limits
from textgym.vocabulary import Vocabulary

RENDER_MODES = ("ansi", "human", "rgb_array")


@dataclass(frozen=True)
class TextGenOptions:
    """Validated options of the environment; :class:`~textgym.envs.env.TextGenEnv` says what each one means."""

    language_model: Any = "embedded"
    tokenizer: Any = None
    prompts: Any = None
    reward: Any = None
    reward_every: int | str = 1
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    max_new_tokens: int = 32
    min_new_tokens: int = 0
    max_prompt_tokens: int | None = None
    prompt_overflow: str = "truncate"
    reply: Any = None
    max_turns: int | None = None
    max_reply_tokens: int | None = None
    max_total_tokens: int | None = None
    reply_overflow: str = "truncate"
    stop: str | list[str] | tuple[str, ...] | None = None
    missing_eos_penalty: float = 0.0
    temperature: float = 1.0
    action_masking: bool = False
    top_k: int = 0
    top_p: float = 1.0
    device: Any = "auto"
    dtype: Any = "float32"
    trust_remote_code: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = None
    seed: int | None = None
    autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP
    render_mode: str | None = None

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> TextGenOptions:
        """Options from keyword arguments.

        :raises TypeError: naming an unknown option and the closest known ones
        :raises ValueError: naming an option with an impossible value, and what would be right
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in keywords:
            if name not in known:
                close = difflib.get_close_matches(name, known)
                hint = f"did you mean {' or '.join(close)}?" if close else f"the options are {', '.join(known)}"
                # Some clients look for Python's own words and go on without what they tried.
                raise TypeError(f"TextGen-v0 got an unexpected keyword argument {name!r}; {hint}")
        return cls(**{name: unshare(value) for name, value in keywords.items()})

    def __post_init__(self) -> None:
        if self.reward_every not in ("turn", "end"):
            check_int("reward_every", self.reward_every, low=1, also="or 'turn' or 'end'")
        check_number("kl_coef", self.kl_coef, low=0.0)
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_int("max_new_tokens", self.max_new_tokens, low=1)
        check_int("min_new_tokens", self.min_new_tokens, low=0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}")
        if self.max_prompt_tokens is not None:
            check_int("max_prompt_tokens", self.max_prompt_tokens, low=1)
        check_choice("prompt_overflow", self.prompt_overflow, ("truncate", "error"))
        check_choice("reply_overflow", self.reply_overflow, ("truncate", "error"))
        check_turn_limits(self.reply, self.max_turns, self.max_reply_tokens, self.max_total_tokens)
        if not isinstance(self.stop, str | list | tuple | None):
            raise TypeError(f"stop={self.stop!r} must be a string or a list of strings")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={self.stop!r} must be a non-empty string or a list of them, found {text!r}")
        check_number("missing_eos_penalty", self.missing_eos_penalty, low=0.0)
        check_temperature("temperature", self.temperature)
        for name in ("action_masking", "trust_remote_code"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.chat_template_kwargs, Mapping | None):
            raise TypeError(f"chat_template_kwargs={self.chat_template_kwargs!r} must be a dict of names and values")
        check_int("top_k", self.top_k, low=0)
        check_number("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        if not self.action_masking and (self.top_k > 0 or self.top_p < 1.0):
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p} restrict the actions by a mask: they need action_masking=True"
            )
        if self.seed is not None:
            check_int("seed", self.seed, low=0)
        try:
            object.__setattr__(self, "autoreset_mode", AutoresetMode(self.autoreset_mode))
        except ValueError as e:
            modes = [mode.value for mode in AutoresetMode]
            raise ValueError(
                f"autoreset_mode={self.autoreset_mode!r} must be an AutoresetMode or one of {modes}"
            ) from e
        if self.render_mode is not None:
            check_choice("render_mode", self.render_mode, RENDER_MODES)

    def episode_rules(
        self, vocabulary: Vocabulary, rows: PromptRows | None, max_actions: int | None = None
    ) -> EpisodeRules:
        """How long prompts and texts of a model may be, when they end, and how their tokens are sampled.

        :param vocabulary: of the language model
        :param rows: the prompts; None where they are not all known
        :param max_actions: Gymnasium's limit of the policy's tokens in an episode
        :raises ValueError: if there is not so much room in the model's context
        """
        sampling = SamplingSettings(
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=float(self.temperature),
            stop=self.stop_strings,
            action_masking=self.action_masking,
            top_k=self.top_k,
            top_p=float(self.top_p),
            chat=rows is not None and all_chat(rows, vocabulary),
            max_turns=self.max_turns,
            max_reply_tokens=self.max_reply_tokens,
            max_total_tokens=self.max_total_tokens,
            reply_overflow=self.reply_overflow,
        )
        turns, total, name = None, self.max_new_tokens, "max_new_tokens"
        if self.reply is not None:
            prompt_tokens = self.max_prompt_tokens or DEFAULT_MAX_PROMPT_TOKENS
            turns = sampling.turn_limits(vocabulary.context_limit, prompt_tokens)
            sampling = sampling.with_turns(turns)
            total, name = turns.max_total_tokens, "max_total_tokens"
        room = prompt_room(self.max_prompt_tokens, total, vocabulary.context_limit, name)
        longest = vocabulary.completion_limit
        if longest is not None and total > longest:
            raise ValueError(
                f"{name}={total} is more than the {longest} tokens that the model's decoder has positions for"
            )
        most = min(self.max_new_tokens, max_actions or self.max_new_tokens)
        sampling = dataclasses.replace(sampling, max_prompt_tokens=room, max_new_tokens=most)
        return EpisodeRules(vocabulary, sampling, turns, max_actions)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
