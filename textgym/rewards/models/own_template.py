"""Prompts of conversations in the chat template of the model that reads them, which need not be the policy's."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from textgym.chat.chat_prompts import MESSAGES, chat_prompt, has_template
from textgym.chat.messages import is_one_conversation
from textgym.prompts.layouts import stored_tools
from textgym.rewards.errors import RewardError
from textgym.rewards.prefixes import PrefixBatch

_REMEMBERED = 4096  # prompts


class OwnTemplate:
    """Writes prompts as the model of a reward was trained on them.

    :param tokenizer: the model's; without a chat template prompts stay as they are
    :param name: of the reward, for errors
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._known: dict[str, str] = {}

    def prompts(self, prompts: list[str], columns: Mapping[str, Sequence[Any]]) -> list[str]:
        """B prompts: the conversation of a row in the model's template where it is one, else the text.

        :param prompts: B texts, in the template of the policy
        :param columns: of the prompt rows; ``messages`` has the conversations
        :raises RewardError: if the template refuses a conversation
        """
        conversations = columns.get(MESSAGES)
        if not conversations or not has_template(self.tokenizer):
            return prompts
        tools = columns.get("tools") or [None] * len(prompts)
        return [
            self._written(conversation, tools[row], row) if is_one_conversation(conversation) else prompts[row]
            for row, conversation in enumerate(conversations)
        ]

    def is_of(self, batch: PrefixBatch) -> bool:
        """Whether the prompts of a batch are what the model would be given, so that it can read their tokens."""
        return self.prompts(batch.prompts, batch.columns) == batch.prompts

    def _written(self, conversation: Sequence[Any], tools: Any, row: int) -> str:
        key = json.dumps([conversation, tools], default=repr)
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of tokens around the text, which the policy's opening tells of
                    self._known[key] = chat_prompt(conversation, self.tokenizer, tools=stored_tools(tools))
            except (TypeError, ValueError) as error:
                raise RewardError(self.name, str(error), row=row) from error
        return self._known[key]
