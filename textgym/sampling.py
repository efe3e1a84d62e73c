"""How texts are sampled from a policy: one set of settings for whatever does so.

The environment's options give them (``envs.sampling``), a saved agent and a run carry them, and training, evaluation,
``policy.generate``, ``textgym generate`` and ``textgym evaluate`` use them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textgym.checks import check_bool, check_int, check_number, check_temperature


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of sampling; names and meaning are those of the environment's options.

    :param max_new_tokens: budget of a completion, tokens
    :param min_new_tokens: no completion ends before that many tokens
    :param max_prompt_tokens: longer prompts are cut on the left; None for prompts that all have to fit the model
    :param temperature: divides the logits; log-probabilities are taken at it, too
    :param stop: strings that end a completion, with the token that completes one
    :param action_masking: no special tokens, and no end before ``min_new_tokens``
    :param top_k: with masking: only the reference model's k most likely tokens; 0 for all
    :param top_p: with masking: only the reference model's likeliest tokens up to this probability
    :param chat: prompts that are plain texts are what a user says, in the model's chat template; so it is where an
        environment's prompts are conversations
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
        if self.restricted and not self.action_masking:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p} restrict the actions by a mask: they need action_masking=True"
            )

    @property
    def restricted(self) -> bool:
        """Whether a reference model says what may be sampled."""
        return self.top_k > 0 or self.top_p < 1.0

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
