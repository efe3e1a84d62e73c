"""The language model of an environment: its vocabulary from the start, its weights when something needs them."""

from __future__ import annotations

from typing import Any

from textgym.envs.options import TextGenOptions
from textgym.language_model import LanguageModel, load_language_model, load_vocabulary
from textgym.model_sources import resolve_device, resolve_dtype
from textgym.vocabulary import Vocabulary


class EnvironmentModel:
    """Opens an environment's language model.

    ``held`` is the model, or None while no weights were needed.

    :param options: which model, and how it is opened
    :raises ValueError: if device or type are impossible
    """

    def __init__(self, options: TextGenOptions) -> None:
        resolve_device(options.device)  # wrong values are errors now, though the model may be loaded later
        resolve_dtype(options.dtype)
        self.options = options
        self.held: LanguageModel | None = None
        # Without a penalty or a restriction nobody needs the model's weights, only its vocabulary.
        if options.kl_coef > 0 or options.top_k > 0 or options.top_p < 1.0:
            self.held = self.open()

    def vocabulary(self) -> Vocabulary:
        """The model's tokens and limits."""
        if self.held is not None:
            return self.held.vocabulary
        return load_vocabulary(
            self.options.language_model,
            tokenizer=self.options.tokenizer,
            trust_remote_code=self.options.trust_remote_code,
            chat_template_kwargs=self.options.chat_template_kwargs,
        )

    def open(self) -> LanguageModel:
        """The model that is held, or one that is opened now and belongs to whoever asks."""
        if self.held is not None:
            return self.held
        return load_language_model(
            self.options.language_model,
            tokenizer=self.options.tokenizer,
            device=self.options.device,
            dtype=self.options.dtype,
            trust_remote_code=self.options.trust_remote_code,
            chat_template_kwargs=self.options.chat_template_kwargs,
        )

    def hold(self) -> LanguageModel:
        """The model, which is held from now on."""
        self.held = self.open()
        return self.held

    def trainable_copy(self, device: Any = None) -> LanguageModel:
        """A copy with weights of its own.

        :param device: where it is put; by default where the model is
        """
        copy = self.open().trainable_copy()
        if device is not None:
            copy.model.to(device)
        return copy
