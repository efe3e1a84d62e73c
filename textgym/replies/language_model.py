"""A language model that replies: another one, an older copy of the policy, or the policy itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textgym.action_masks import masks_of
from textgym.chat.chat_prompts import MESSAGES
from textgym.checks import check_seed, check_text
from textgym.episode_rules import EpisodeRules
from textgym.generation import complete_texts
from textgym.language_model import LanguageModel, load_language_model
from textgym.prompts.fitting import FittedPrompt
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply, Transcript
from textgym.replies.errors import ReplyError
from textgym.sampling import SamplingSettings

_OTHER = {"assistant": "user", "user": "assistant"}


class LanguageModelReply(Reply):
    """A language model says what follows each turn. Its weights are not trained by what it says.

    A model with a chat template takes part in a conversation: it is the assistant in its own view, and what the policy
    says is what its user says. One without goes on with the text: prompt, turns and replies, one after the other.

    Give the policy's own ``LanguageModel`` for self-play, or a copy of it for an older self.

    :param model: whatever :func:`~textgym.language_model.load_language_model` opens
    :param system: what the system says to it, in a chat template
    :param seed: of its sampling
    :param settings: of :class:`~textgym.sampling.SamplingSettings`, such as ``max_new_tokens``, ``temperature`` or
        ``stop``
    :raises ValueError: if a setting is impossible
    """

    def __init__(
        self, model: str | Path | LanguageModel, system: str | None = None, seed: int = 0, **settings: Any
    ) -> None:
        self.model = load_language_model(model)
        self.system = None if system is None else check_text("system", system, empty=False)
        self.sampling = SamplingSettings(**settings)
        self._generator = torch.Generator(device=self.model.device).manual_seed(check_seed("seed", seed) or 0)
        self._masks = masks_of(self.sampling, self.model, self.model)

    @property
    def name(self) -> str:
        return f"LanguageModelReply({self.model.name})"

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> list[str]:
        rules = EpisodeRules(self.model.vocabulary, self.sampling)
        given = columns.get(MESSAGES) or [None] * len(prompts)
        fitted = []
        for row, prompt, transcript, messages in zip(rows.tolist(), prompts, transcripts, given, strict=True):
            try:
                fitted.append(self._seen(rules, prompt, transcript, messages))
            except ValueError as error:
                raise ReplyError(self.name, str(error), row=row) from error
        texts = complete_texts(self.model, fitted, self.sampling, masks=self._masks, generator=self._generator)
        return texts.batch(np.arange(len(fitted))).completions

    def _seen(
        self, rules: EpisodeRules, prompt: str, transcript: Transcript, messages: list[dict[str, Any]] | None
    ) -> FittedPrompt:
        """What the model goes on from."""
        if not getattr(self.model.tokenizer, "chat_template", None):
            return self._fit(rules, prompt + "".join(str(message["content"]) for message in transcript))
        said = [*(messages or [{"role": "user", "content": prompt}]), *transcript]
        own = [{"role": "system", "content": self.system}] if self.system else []
        own += [{**m, "role": _OTHER[m["role"]]} for m in said if m["role"] in _OTHER]
        text = self.model.vocabulary.turns.rendered(own)
        if text is None:
            # Some templates want the user to begin: then the other's prompt is what was said before.
            text = self.model.vocabulary.turns.rendered([m for m in own if m["role"] == "system"] + own[-1:])
        if text is None:
            raise ValueError("its chat template refuses the conversation; give another model, or a system=None")
        return self._fit(rules, text)

    def _fit(self, rules: EpisodeRules, text: str) -> FittedPrompt:
        ids = self.model.encode(text)
        limit = self.model.vocabulary.context_limit
        most = rules.sampling.max_prompt_tokens
        if limit is not None:
            most = min(limit - self.sampling.max_new_tokens, most or limit)
        return FittedPrompt(PromptRow(text), ids if most is None else ids[-most:])

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state().cpu().numpy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(torch.as_tensor(state["generator"], dtype=torch.uint8))
