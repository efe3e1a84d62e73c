"""What is learned of a conversation is what the policy wrote in it: in files as in episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import END, make
from tiny_models import save_chat_model

from textgym.chat.chat_prompts import MESSAGES, chat_prompt
from textgym.prompts.assistant_turns import assistant_mask
from textgym.prompts.fitting import fit_prompt
from textgym.prompts.rows import PromptRow
from textgym.replies import ScriptedReply


@pytest.mark.parametrize("role", ["user", "tool"])
def test_the_turns_that_are_learned_of_a_transcript_are_the_actions_of_its_episode(role: str, tmp_path: Path) -> None:
    save_chat_model(tmp_path)
    options: dict[str, Any] = {"max_turns": 3, "max_new_tokens": 12, "max_reply_tokens": 20}
    question = [{"role": "user", "content": "hi"}]
    reply = ScriptedReply(["and then?", "why?"], role=role)
    env = make(tmp_path, prompts=[{"prompt": question}], reply=reply, **options)
    env.reset(seed=0)
    written = 0
    for text in ("a good film", "it ended"):
        for token in [*env.unwrapped.tokenizer(text)["input_ids"], END]:
            observation, _, terminated, truncated, _ = env.step(token)
            written += 1
    assert not terminated
    assert not truncated
    length = observation["attention_mask"].sum()

    answers = [{"role": "assistant", "content": text} for text in ("a good film", "it ended")]
    said = [{"role": role, "content": text} for text in ("and then?", "why?")]
    messages = [*question, answers[0], said[0], answers[1], said[1]]
    vocabulary = env.unwrapped.vocabulary
    fitted = fit_prompt(PromptRow(chat_prompt(messages, vocabulary.tokenizer), {MESSAGES: messages}), vocabulary)
    assert fitted.ids == observation["input_ids"][:length].tolist()
    mask = assistant_mask(fitted, vocabulary)
    assert mask == [bool(spoken) for spoken in observation["completion_mask"][:length]]
    assert sum(mask) == written
