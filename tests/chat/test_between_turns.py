"""Conversations that go on: in the chat template's own tokens, and without any token written anew."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from chat_templates import TEMPLATES, one
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import chat_tokenizer, save_chat_model

from textgym.chat.between_turns import BetweenTurns
from textgym.chat.turns import TurnTokens
from textgym.language_model import load_vocabulary
from textgym.replies import ReplyResult

ANSWERS = ("yes it is", "well", "no")
SAID = ("why so", "and then")


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory):
    """A chat model of each family of templates."""
    folder = tmp_path_factory.mktemp("chat")
    for name, (template, special, _) in TEMPLATES.items():
        save_chat_model(folder / name, chat_tokenizer(special, template, bos="bos_token" in template))
    return folder


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "plain"])
def test_a_conversation_has_the_tokens_that_its_template_gives_the_whole(chat_models, name):
    def say(transcripts):
        return [SAID[sum(message["role"] == "assistant" for message in transcripts[0]) - 1]]

    question = [{"role": "user", "content": "is it good"}]
    env = gym.make(
        "TextGen-v0", language_model=str(chat_models / name), prompts=[question], reward=one, kl_coef=0.0, reply=say,
        max_turns=3, max_new_tokens=24, max_reply_tokens=24,
    )  # fmt: skip
    vocabulary = env.unwrapped.vocabulary
    observation, _ = env.reset(seed=0)
    messages = list(question)
    for turn, answer in enumerate(ANSWERS):
        for token in [
            *vocabulary.tokenizer(answer, add_special_tokens=False)["input_ids"],
            vocabulary.turns.end_of_turn_id,
        ]:
            observation, *_, info = env.step(token)
        messages += [{"role": "assistant", "content": answer}]
        if turn < len(SAID):
            messages += [{"role": "user", "content": SAID[turn]}]
            assert info["reply"] == SAID[turn]
            whole = vocabulary.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            expected = vocabulary.tokenizer(whole, add_special_tokens=False)["input_ids"]
            assert observation["input_ids"][: observation["attention_mask"].sum()].tolist() == expected
        if turn == 1:
            break


def test_a_turn_that_was_cut_gets_the_end_that_it_lacks(chat_models):
    question = [{"role": "user", "content": "is it good"}]
    env = gym.make(
        "TextGen-v0", language_model=str(chat_models / "chatml"), prompts=[question], reward=one, kl_coef=0.0,
        reply=lambda transcripts: ["why so"], max_turns=2, max_new_tokens=1, max_reply_tokens=24,
    )  # fmt: skip
    tokenizer = env.unwrapped.tokenizer
    env.reset(seed=0)
    word = tokenizer("well", add_special_tokens=False)["input_ids"][0]
    observation, *_ = env.step(word)
    text = tokenizer.decode(observation["input_ids"][: observation["attention_mask"].sum()])
    assert text.endswith(
        f"{tokenizer.decode([word])}<|im_end|>\n<|im_start|>user\nwhy so<|im_end|>\n<|im_start|>assistant\n"
    )
    assert observation["completion_mask"].sum() == 1


def test_the_last_reply_opens_no_further_turn(chat_models):
    question = [{"role": "user", "content": "is it good"}]
    env = gym.make(
        "TextGen-v0", language_model=str(chat_models / "chatml"), prompts=[question], reward=one, kl_coef=0.0,
        reply=lambda transcripts: [ReplyResult("why so", done=True)], max_new_tokens=1, max_reply_tokens=24,
    )  # fmt: skip
    env.reset(seed=0)
    observation, _, terminated, *_ = env.step(30)
    assert terminated
    text = env.unwrapped.tokenizer.decode(observation["input_ids"][: observation["attention_mask"].sum()])
    assert text.endswith("<|im_start|>user\nwhy so<|im_end|>\n")


REWRITING = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = (
    "{% for message in messages %}{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_is_refused_when_the_environment_is_made(tmp_path):
    save_chat_model(tmp_path, chat_tokenizer(template=REWRITING))
    with pytest.raises(ValueError, match="can't be continued token by token"):
        gym.make(
            "TextGen-v0", language_model=str(tmp_path), prompts=[[{"role": "user", "content": "hi"}]], reward=one,
            kl_coef=0.0, reply=lambda transcripts: ["a"],
        )  # fmt: skip


def test_a_role_that_the_template_refuses_is_named(tmp_path):
    save_chat_model(tmp_path, chat_tokenizer(template=ALTERNATING))
    turns = load_vocabulary(str(tmp_path)).turns
    BetweenTurns(turns).check("user")
    with pytest.raises(ValueError, match="refuses a conversation of the roles user, assistant, tool"):
        BetweenTurns(turns).check("tool")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_what_was_sampled_is_what_is_kept_whatever_is_said(data, chat_models):
    """Random tokens, which need not be those that the tokenizer makes of their text, stay as they are."""
    name = data.draw(st.sampled_from(sorted(TEMPLATES)))
    chat = name != "plain" and data.draw(st.booleans())
    prompt = [{"role": "user", "content": "hi"}] if chat else "hi there"
    said = data.draw(st.text("abc é猫", min_size=1, max_size=8))
    env = gym.make(
        "TextGen-v0", language_model=str(chat_models / name), prompts=[prompt], reward=one, kl_coef=0.0,
        reply=lambda transcripts: [said], max_turns=3, max_new_tokens=3, max_reply_tokens=32, max_prompt_tokens=48,
    )  # fmt: skip
    observation, _ = env.reset(seed=0)
    chosen = data.draw(st.lists(st.integers(0, env.action_space.n - 1), min_size=3, max_size=9))
    taken = []
    for token in chosen:
        observation, _, terminated, truncated, _ = env.step(token)
        taken.append(token)
        assert observation["input_ids"][observation["completion_mask"] == 1].tolist() == taken
        if terminated or truncated:
            break
    assert np.all(observation["completion_mask"] <= observation["attention_mask"])


def test_pieces_of_a_text_end_where_its_tokens_do(chat_models):
    turns: TurnTokens = load_vocabulary(str(chat_models / "chatml")).turns
    for text in ("yes it is good", "猫 is très good", ""):
        assert "".join(turns.pieces(text)) == text
        assert len(turns.pieces(text)) == len(turns.tokenizer(text, add_special_tokens=False)["input_ids"])
