"""How texts are sampled from a policy: one set of settings for whatever does so.

The environment's options give them (``envs.sampling``), a saved agent and a run carry them, and training, evaluation,
``policy.generate``, ``textgym generate`` and ``textgym evaluate`` use them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textgym.checks import check_bool, check_choice, check_int, check_number, check_temperature

DEFAULT_MAX_TURNS = 4
DEFAULT_MAX_REPLY_TOKENS = 32
_OF_TURNS = ("max_turns", "max_reply_tokens", "max_total_tokens")


def check_turn_limits(reply: Any, *limits: int | None) -> None:
    """Check options of episodes in which somebody replies.

    :param reply: who does; None for nobody
    :param limits: ``max_turns``, ``max_reply_tokens`` and ``max_total_tokens``, each None where it is not given
    :raises TypeError: if one is not a whole number
    :raises ValueError: if one is less than 1, or given where nobody replies
    """
    for name, value in zip(_OF_TURNS, limits, strict=True):
        if value is not None:
            check_int(name, value, low=1)
            if reply is None:
                raise ValueError(f"{name}={value} is of episodes in which somebody replies: give a reply, too")


@dataclass(frozen=True)
class TurnLimits:
    """Limits of texts in which somebody replies.

    :param max_turns: turns of the policy
    :param max_reply_tokens: tokens of what is said in a reply; longer ones are cut at their end
    :param max_total_tokens: tokens after the prompt, of policy and replies together
    :param reply_overflow: ``"truncate"`` or ``"error"``, where a reply is longer
    """

    max_turns: int
    max_reply_tokens: int
    max_total_tokens: int
    reply_overflow: str = "truncate"


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of sampling; names and meaning are those of the environment's options.

    :param max_new_tokens: budget of a completion, tokens; where somebody replies, of a turn
    :param min_new_tokens: no completion ends before that many tokens
    :param max_prompt_tokens: longer prompts are cut on the left; None for prompts that all have to fit the model
    :param temperature: divides the logits; log-probabilities are taken at it, too
    :param stop: strings that end a completion, with the token that completes one
    :param action_masking: no special tokens, and no end before ``min_new_tokens``
    :param top_k: with masking: only the reference model's k most likely tokens; 0 for all
    :param top_p: with masking: only the reference model's likeliest tokens up to this probability
    :param chat: prompts that are plain texts are what a user says, in the model's chat template; so it is where an
        environment's prompts are conversations
    :param max_turns: where somebody replies, turns of a text; None is 4 there
    :param max_reply_tokens: where somebody replies, of what a reply says; None is 32 there
    :param max_total_tokens: where somebody replies, budget of all that follows the prompt; None is ``max_turns`` times
        the two budgets above, or what fits the model
    :param reply_overflow: ``"truncate"`` or ``"error"``, where a reply is longer
    :raises ValueError: naming a setting with an impossible value, and what would be right
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 0
    max_prompt_tokens: int | None = None
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    action_masking: bool = False
    top_k: int = 0
    top_p: float = 1.0
    chat: bool = False
    max_turns: int | None = None
    max_reply_tokens: int | None = None
    max_total_tokens: int | None = None
    reply_overflow: str = "truncate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        check_int("max_new_tokens", self.max_new_tokens, low=1)
        check_int("min_new_tokens", self.min_new_tokens, low=0)
        check_int("top_k", self.top_k, low=0)
        if self.max_prompt_tokens is not None:
            check_int("max_prompt_tokens", self.max_prompt_tokens, low=1)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}")
        check_temperature("temperature", self.temperature)
        check_number("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        check_bool("action_masking", self.action_masking)
        check_bool("chat", self.chat)
        for name in _OF_TURNS:
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), low=1)
        if self.max_total_tokens is not None and self.max_total_tokens < self.max_new_tokens:
            raise ValueError(
                f"max_total_tokens={self.max_total_tokens} is less than max_new_tokens={self.max_new_tokens}, the "
                "budget of one turn"
            )
        check_choice("reply_overflow", self.reply_overflow, ("truncate", "error"))
        if self.restricted and not self.action_masking:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p} restrict the actions by a mask: they need action_masking=True"
            )

    @property
    def restricted(self) -> bool:
        """Whether a reference model says what may be sampled."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def in_turns(self) -> bool:
        """Whether there are limits of texts in which somebody replies."""
        return any(getattr(self, name) is not None for name in _OF_TURNS)

    def one_turn(self) -> SamplingSettings:
        """The same for texts in which nobody replies."""
        open_limits: dict[str, Any] = dict.fromkeys(_OF_TURNS)
        return dataclasses.replace(self, **open_limits, reply_overflow="truncate")

    def changed(self, **settings: Any) -> SamplingSettings:
        """The same with other values of some settings.

        The budget of a whole text follows from the others, unless it is given: a larger one of a turn is not cut short
        by it.
        """
        if settings.keys() & {"max_new_tokens", "max_turns", "max_reply_tokens"}:
            settings = {"max_total_tokens": None, **settings}
        return dataclasses.replace(self, **settings)

    def turn_limits(self, context_limit: int | None, prompt_tokens: int) -> TurnLimits:
        """The limits of turns, with defaults where they are left open.

        :param context_limit: most tokens that the model takes, None for any number
        :param prompt_tokens: most tokens of a prompt
        :raises ValueError: if the model's context has no room for a reply
        """
        max_turns = DEFAULT_MAX_TURNS if self.max_turns is None else self.max_turns
        max_reply_tokens = DEFAULT_MAX_REPLY_TOKENS if self.max_reply_tokens is None else self.max_reply_tokens
        total = self.max_total_tokens
        if total is None:
            total = max_turns * (self.max_new_tokens + max_reply_tokens)
            if context_limit is not None:
                total = min(total, context_limit - prompt_tokens)
                if total <= self.max_new_tokens < max_turns * self.max_new_tokens:
                    raise ValueError(
                        f"a context of {context_limit} tokens has room for {max(total, 0)} after a prompt, which is "
                        f"no more than one turn of max_new_tokens={self.max_new_tokens}, and leaves none for a reply: "
                        "take a smaller max_new_tokens or max_prompt_tokens, or max_turns=1"
                    )
                total = max(total, self.max_new_tokens)
        return TurnLimits(max_turns, max_reply_tokens, total, self.reply_overflow)

    def with_turns(self, limits: TurnLimits) -> SamplingSettings:
        """The same with these limits of turns."""
        return dataclasses.replace(self, **dataclasses.asdict(limits))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SamplingSettings:
        """What :meth:`as_dict` gave, or a part of it.

        :raises ValueError: naming what is not a setting
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in data if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a setting of sampling; they are {', '.join(known)}")
        return cls(**data)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**dataclasses.asdict(self), "stop": list(self.stop)}

    def said(self) -> str:
        """The settings in a line, for people: ``at most 32 tokens, temperature 1, top-k 5 of the reference``."""
        parts = [f"at most {self.max_new_tokens} tokens"]
        if self.min_new_tokens:
            parts[0] = f"{self.min_new_tokens} to {self.max_new_tokens} tokens"
        if self.max_turns is not None:
            parts[0] += f" in each of at most {self.max_turns} turns"
        parts.append(f"temperature {self.temperature:g}")
        if self.stop:
            parts.append(f"stop at {' or '.join(map(repr, self.stop))}")
        if self.chat:
            parts.append("in the chat template")
        if self.action_masking:
            parts.append("special tokens masked")
        if self.top_k:
            parts.append(f"top-k {self.top_k} of the reference")
        if self.top_p < 1.0:
            parts.append(f"top-p {self.top_p:g} of the reference")
        return ", ".join(parts)


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    for text in strings:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop={stop!r} must be a non-empty string or a list of them, found {text!r}")
    return strings
