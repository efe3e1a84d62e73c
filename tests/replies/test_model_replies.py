"""Language models that reply: what they see, what they say, and what it costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import TEMPLATES
from tiny_agents import tiny_language_model, tiny_ppo, tiny_vector_env
from tiny_encoder_decoders import tiny_encoder_decoder
from tiny_models import VOCABULARY, chat_tokenizer, save_chat_model, tiny_tokenizer

from textgym.language_model import LanguageModel, load_language_model
from textgym.replies import LanguageModelReply
from textgym.replies.base import ask

GREEDY = 1e-4  # a temperature
WORDS = [word for word in VOCABULARY if word.isalpha()]


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def answer(reply: Any, turn: str) -> Any:
    return ask(reply, np.arange(1), ["p"], [[said(turn)]], {})[0].text


def generated(model: LanguageModel, ids: list[int], tokens: int) -> str:
    """What transformers itself says after a text."""
    start = torch.tensor([ids])
    how = {"max_new_tokens": tokens, "do_sample": False, "use_cache": False}
    found = model.model.generate(start, attention_mask=torch.ones_like(start), **how)
    new = found[0].tolist()[1 if model.model.config.is_encoder_decoder else len(ids) :]
    return model.vocabulary.decode([*ids, *new]).removeprefix(model.vocabulary.decode(ids))


def conversations(reply: LanguageModelReply, rows: int, turns: int) -> list[list[dict[str, Any]]]:
    """Transcripts that grow turn by turn, not all rows in each; what the policy says is drawn."""
    rng = np.random.default_rng(0)
    talks: list[list[dict[str, Any]]] = [[] for _ in range(rows)]
    for turn in range(turns):
        asked = np.flatnonzero((np.arange(rows) + turn) % 3 > 0) if turn else np.arange(rows)
        for row in asked:
            talks[row].append(said(" " + " ".join(rng.choice(WORDS, 1 + row))))
        results = ask(reply, asked, ["the film"] * len(asked), [talks[row] for row in asked], {})
        for row, result in zip(asked, results, strict=True):
            talks[row].append({"role": "user", "content": result.text})
    return talks


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_what_is_said_in_each_turn_is_what_a_plain_forward_over_the_text_says(kind):
    model = (
        tiny_language_model(kind, seed=3) if kind != "t5" else LanguageModel(tiny_encoder_decoder(), tiny_tokenizer())
    )
    reply = LanguageModelReply(model, max_new_tokens=3, temperature=GREEDY)
    for talk in conversations(reply, rows=3, turns=5):
        for i, message in enumerate(talk):
            if message["role"] == "user":
                ids = reply.view("the film", talk[:i]).ids
                assert ids == model.encode("the film" + "".join(m["content"] for m in talk[:i]))
                assert message["content"] == generated(model, ids, 3)


def test_a_turn_costs_the_tokens_that_are_new_in_it():
    model = tiny_language_model(seed=3)
    reply = LanguageModelReply(model, min_new_tokens=4, max_new_tokens=4, action_masking=True)
    forwarded = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: forwarded.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompt, talk = "we like the story and", []
    for turn in range(8):
        talk.append(said(" " + " ".join(WORDS[turn : turn + 5])))
        talk.append({"role": "user", "content": ask(reply, np.array([1]), [prompt], [talk], {})[0].text})
    hook.remove()
    tokens = len(reply.view(prompt, talk).ids)
    assert tokens == 5 + 8 * (5 + 4)
    # What is said last in a turn is never read; so each turn reads one word more, and the last one nothing of its own.
    assert sum(forwarded) <= tokens
    assert max(forwarded) <= 5 + 5 + 1


def test_a_chat_model_hears_the_policy_as_its_user(tmp_path):
    save_chat_model(tmp_path, chat_tokenizer())
    reply = LanguageModelReply(tmp_path, system="be kind", max_new_tokens=3)
    messages = [{"role": "system", "content": "ask"}, {"role": "user", "content": "hi"}]
    view = reply.view("p", [said("how are you")], messages)
    assert view.row.prompt == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n<|im_start|>user\nhow are you"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert view.ids == load_language_model(tmp_path).encode(view.row.prompt)


ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("system", [None, "be kind"])
@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_a_template_that_wants_the_user_to_begin_keeps_all_that_was_said(family, system, tmp_path):
    template, special, _ = TEMPLATES[family]
    save_chat_model(tmp_path, chat_tokenizer(special, ALTERNATING + template))
    reply = LanguageModelReply(tmp_path, system=system)
    talk = [said("well"), {"role": "user", "content": "why"}, said("so")]
    expected = {
        "gemma": "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\nhi<end_of_turn>\n<start_of_turn>user\n"
        "well<end_of_turn>\n<start_of_turn>model\nwhy<end_of_turn>\n<start_of_turn>user\nso<end_of_turn>\n"
        "<start_of_turn>model\n",
        "mistral": "[INST] {} [/INST]hi<|endoftext|>[INST] well [/INST]why<|endoftext|>[INST] so [/INST]",
    }[family]
    asked = [{"role": "user", "content": "hi"}]
    assert reply.view("hi", talk, asked).row.prompt == expected.format(system or "")


def test_a_prompt_that_is_a_plain_text_begins_the_first_turn(tmp_path):
    save_chat_model(tmp_path, chat_tokenizer())
    talk = [said(" is good"), {"role": "user", "content": "why"}, said(" so")]
    user = {"role": "user", "content": "the film is good"}
    messages = [user, {"role": "assistant", "content": "why"}, {"role": "user", "content": " so"}]
    tokenizer = load_language_model(tmp_path).tokenizer
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert LanguageModelReply(tmp_path).view("the film", talk).row.prompt == expected


def test_a_template_that_refuses_every_view_is_named(tmp_path):
    save_chat_model(tmp_path, chat_tokenizer(template="{{ raise_exception('never') }}"))
    with pytest.raises(ValueError, match=r"refuses a conversation of user \(.*never"):
        LanguageModelReply(tmp_path).view("hi", [said("well")])


def test_a_long_conversation_keeps_its_headers_and_its_last_turn(tmp_path):
    save_chat_model(tmp_path, chat_tokenizer(), max_position_embeddings=100)
    reply = LanguageModelReply(tmp_path, max_new_tokens=8)
    talk = [said("well"), {"role": "user", "content": "why " * 80}, said("so be it")]
    view = reply.view("hi", talk)
    assert len(view.ids) <= 92
    assert view.row.prompt.endswith("<|im_start|>user\nso be it<|im_end|>\n<|im_start|>assistant\n")
    assert isinstance(ask(reply, np.arange(1), ["hi"], [talk], {})[0].text, str)


def test_what_a_model_says_goes_on_exactly_from_its_state():
    model = tiny_language_model()
    one, other = (LanguageModelReply(model, max_new_tokens=6, seed=4) for _ in range(2))
    first = answer(one, " good")
    state = one.state_dict()
    rest = [answer(one, " good") for _ in range(3)]
    other.load_state_dict(state)
    assert [answer(other, " good") for _ in range(3)] == rest
    assert first != rest[0] or rest[0] != rest[1]


def test_self_play_speaks_with_the_weights_that_are_learned_and_an_older_self_with_its_own():
    reply = LanguageModelReply(tiny_language_model(), max_new_tokens=6, temperature=GREEDY)
    env = tiny_vector_env(2, language_model=tiny_language_model(), reply=reply, max_turns=2, max_new_tokens=3)
    agent = tiny_ppo(env, learning_rate=0.05)
    reply.model = agent.policy.language_model
    agent.learn(24)
    older = LanguageModelReply(agent.policy.language_model.trainable_copy(), max_new_tokens=6, temperature=GREEDY)
    before = answer(older, " good")
    assert answer(reply, " good") == before
    agent.learn(48, reset_num_timesteps=False)
    model = agent.policy.language_model
    after = generated(model, model.encode("p good"), 6)
    assert answer(reply, " good") == after != before
    assert answer(older, " good") == before
