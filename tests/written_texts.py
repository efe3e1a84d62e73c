"""Texts that a model completes, or that are written token by token, for tests of what ends them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from textgym.episode_rules import EpisodeRules
from textgym.generation import complete_texts
from textgym.language_model import LanguageModel
from textgym.prompts.fitting import FittedPrompt
from textgym.prompts.rows import PromptRow
from textgym.rewards import PrefixBatch
from textgym.sampling import SamplingSettings
from textgym.texts import Texts
from textgym.vocabulary import Vocabulary


def completed(model: LanguageModel, rows: Iterable[PromptRow | str], how: Any = None, **settings: Any) -> PrefixBatch:
    """Prompts, completed by a model, as rewards read them.

    :param how: further arguments of ``complete_texts``
    :param settings: of ``SamplingSettings``
    """
    prompts = [PromptRow(row) if isinstance(row, str) else row for row in rows]
    fitted = [FittedPrompt(row, model.encode(row.prompt)) for row in prompts]
    return complete_texts(model, fitted, SamplingSettings(**settings), **(how or {})).batch(np.arange(len(fitted)))


def written(vocabulary: Vocabulary, prompt: Sequence[int], tokens: Sequence[int], **settings: Any) -> Texts:
    """One text, written token by token until it ends."""
    rules = EpisodeRules(vocabulary, SamplingSettings(**settings))
    texts = Texts(1, len(prompt) + rules.max_total_tokens, rules)
    texts.begin(0, PromptRow("p"), list(prompt))
    for token in tokens:
        if not texts.done[0]:
            texts.append(np.array([0]), np.array([token]))
    return texts
