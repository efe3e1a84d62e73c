"""A language model that replies: another one, an older copy of the policy, or the policy itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textgym.action_masks import masks_of
from textgym.chat.chat_prompts import MESSAGES, has_template
from textgym.checks import check_seed, check_text
from textgym.generation import complete_texts
from textgym.language_model import LanguageModel, load_language_model
from textgym.prompts.fitting import FittedPrompt, fit_prompt, rendered
from textgym.prompts.rows import PromptRow
from textgym.replies.base import Reply, Transcript
from textgym.replies.errors import ReplyError
from textgym.sampling import SamplingSettings

_OTHER = {"assistant": "user", "user": "assistant"}


class LanguageModelReply(Reply):
    """A language model says what follows each turn. Its weights are not trained by what it says.

    A model with a chat template takes part in a conversation: it is the assistant in its own view, and what the policy
    says is what its user says. A prompt that is a plain text begins the policy's first turn. Where its template wants a
    user to begin, one does, with ``system`` or without a word. Systems of the prompts are the policy's, and not seen. A
    model without a template goes on with the text: prompt, turns and replies, one after the other.

    Each row has a place in a cache of the model's own, so that a turn costs the tokens that are new in it. What the
    model said is read again where the text that it said has other tokens than those that were sampled, or was cut.

    An agent learns in a copy of its environment's model. For self-play give the reply the agent's own, and for an older
    self a copy of that; changed weights are noticed. ::

        reply = LanguageModelReply("embedded")
        agent = PPO("LanguageModelPolicy", gym.make_vec("TextGen-v0", num_envs=8, reply=reply))
        reply.model = agent.policy.language_model                    # speaks with the weights as they are learned
        reply.model = agent.policy.language_model.trainable_copy()   # or with those of now

    Checkpoints have the state of its sampling. Which model speaks is to be said again when a run is resumed.

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
        self.system = None if system is None else check_text("system", system, empty=False)
        self.sampling = SamplingSettings(**settings)
        self._seed = check_seed("seed", seed) or 0
        self._generator = torch.Generator()
        self.model = load_language_model(model)
        self._generator.manual_seed(self._seed)

    @property
    def model(self) -> LanguageModel:
        """Who speaks."""
        return self._model

    @model.setter
    def model(self, model: str | Path | LanguageModel) -> None:
        self._model = load_language_model(model)
        # Its owner steps through other texts with it: these need a cache of their own.
        self._speaker = self._model.with_model(self._model.model)
        self._masks = masks_of(self.sampling, self._model, self._model)
        if self._generator.device.type != self._model.device.type:
            self._generator = torch.Generator(device=self._model.device).manual_seed(self._seed)

    @property
    def name(self) -> str:
        return f"LanguageModelReply({self.model.name})"

    def reply(
        self, rows: np.ndarray, prompts: list[str], transcripts: list[Transcript], columns: Mapping[str, list[Any]]
    ) -> list[str]:
        given = columns.get(MESSAGES) or [None] * len(prompts)
        fitted = []
        for row, prompt, transcript, messages in zip(rows.tolist(), prompts, transcripts, given, strict=True):
            try:
                fitted.append(self.view(prompt, transcript, messages))
            except ValueError as error:
                raise ReplyError(self.name, str(error), row=row) from error
        self._speaker.cached(self._room(max(len(prompt.ids) for prompt in fitted) + self.sampling.max_new_tokens))
        texts = complete_texts(
            self._speaker, fitted, self.sampling, masks=self._masks, generator=self._generator, slots=rows
        )
        return texts.batch(np.arange(len(fitted))).completions

    def view(self, prompt: str, transcript: Transcript, messages: list[dict[str, Any]] | None = None) -> FittedPrompt:
        """What the model goes on from.

        :param prompt: of the policy
        :param transcript: what was said after it
        :param messages: that the prompt was made of, where it is a conversation
        :raises ValueError: if its chat template refuses the conversation, or its headers alone are too long
        """
        if has_template(self.model.tokenizer):
            first, *rest = transcript
            begun = [*messages, first] if messages else [{**first, "content": prompt + first["content"]}]
            row = self._conversation([*begun, *rest])
        else:
            row = PromptRow(prompt + "".join(str(message["content"]) for message in transcript))
        limit, most = self.model.vocabulary.context_limit, self.sampling.max_prompt_tokens
        if limit is not None:
            most = min(limit - self.sampling.max_new_tokens, most or limit)
        return fit_prompt(row, self.model.vocabulary, most)

    def _conversation(self, messages: list[dict[str, Any]]) -> PromptRow:
        """Messages as the model sees them, in its chat template."""
        own = [{"role": _OTHER[m["role"]], "content": m["content"]} for m in messages if m["role"] in _OTHER]
        system = [{"role": "system", "content": self.system}] if self.system else []
        # Some templates want the user to begin, and some know no system.
        silent = {"role": "user", "content": ""}
        for opening in (system, [*system, silent], [{**silent, "content": self.system or ""}]):
            try:
                text = rendered([*opening, *own], PromptRow(""), self.model.vocabulary)
            except (TypeError, ValueError) as error:
                problem = error
            else:
                return PromptRow(text, {MESSAGES: [*opening, *own]})
        roles = ", ".join(message["role"] for message in own)
        raise ValueError(f"its chat template refuses a conversation of {roles} ({problem}); give another model")

    def _room(self, tokens: int) -> int:
        """Tokens of a row in the cache. Were it widened for each turn, it would be copied for each."""
        room = 1 << (tokens - 1).bit_length()
        limit = self.model.vocabulary.context_limit
        return room if limit is None else max(min(room, limit), tokens)

    def forget_cached(self) -> None:
        self._speaker.forget_cached()
        if self._masks is not None and self._masks.model is not None:
            self._masks.model.forget_cached()

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)
        self.forget_cached()

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state().cpu().numpy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(torch.as_tensor(state["generator"], dtype=torch.uint8))
        self.forget_cached()
