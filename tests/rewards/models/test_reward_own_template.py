"""Models as rewards read conversations in the chat template of their own tokenizer, not in the policy's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from tiny_models import CHAT_EOS, CHAT_PAD, chat_tokenizer, save_chat_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from textgym.rewards import CausalRewardModel, ClassifierReward, LogProbReward, Reward, RewardError, XmlTags

OTHER = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '[/]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "a film"}]
OWN_PROMPT = "[system]s[/][user]a film[/][assistant]"
COMPLETION = "good"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy")
    save_chat_model(path)
    return path


def classifier() -> LlamaForSequenceClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(
            **shape, vocab_size=300, num_labels=1, pad_token_id=CHAT_PAD, eos_token_id=CHAT_EOS, initializer_range=0.2
        )
        return LlamaForSequenceClassification(config).eval()


def expected_score(text: str, append_eos: bool) -> float:
    ids = chat_tokenizer()(text)["input_ids"] + [CHAT_EOS] * append_eos
    with torch.inference_mode():
        return classifier()(torch.tensor([ids])).logits.item()


READERS: dict[str, Callable[[], Reward]] = {
    "causal": lambda: CausalRewardModel(classifier(), chat_tokenizer(template=OTHER)),
    "classifier": lambda: ClassifierReward(classifier(), chat_tokenizer(template=OTHER), label=0),
}


def final_score(policy: Path, reward: Reward, every: int | str) -> float:
    env = gym.make(
        "TextGen-v0", language_model=policy, prompts=[MESSAGES], reward=reward, reward_every=every, kl_coef=0.0
    )
    env.reset()
    ids = [*chat_tokenizer()(COMPLETION)["input_ids"], CHAT_EOS]
    return sum(float(env.step(token)[1]) for token in ids)


@pytest.mark.parametrize("kind", READERS)
def test_a_reward_model_reads_the_same_text_in_the_environment_and_in_a_call(policy, kind):
    expected = expected_score(OWN_PROMPT + COMPLETION, append_eos=kind == "causal")
    reward = READERS[kind]()
    policys_text = chat_tokenizer().apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    [score] = reward(prompts=[policys_text], completions=[COMPLETION], messages=[MESSAGES])
    assert score == pytest.approx(expected, abs=1e-5)
    assert final_score(policy, reward, "end") == pytest.approx(expected, abs=1e-5)
    begun = expected_score(OWN_PROMPT, append_eos=False)
    assert final_score(policy, reward, 1) == pytest.approx(expected - begun, abs=1e-5)


@pytest.mark.parametrize("kind", READERS)
def test_texts_and_models_without_a_template_keep_the_prompt_as_it_is(kind):
    reward = READERS[kind]()
    plain = reward(prompts=["a film "], completions=[COMPLETION])
    assert plain == pytest.approx([expected_score("a film " + COMPLETION, append_eos=kind == "causal")], abs=1e-5)
    bare = CausalRewardModel(classifier(), chat_tokenizer(template=None))
    read = bare(prompts=["a film "], completions=[COMPLETION], messages=[MESSAGES])
    assert read == pytest.approx([expected_score("a film " + COMPLETION, append_eos=True)], abs=1e-5)


def test_log_probabilities_are_those_in_the_models_own_template(policy, tmp_path):
    save_chat_model(tmp_path / "judge", chat_tokenizer(template=OTHER))
    reward = LogProbReward(str(tmp_path / "judge"), normalize="sum")
    expected = reward(prompts=[OWN_PROMPT], completions=[COMPLETION])
    assert final_score(policy, reward, 1) == pytest.approx(expected[0], abs=1e-4)


def test_a_template_that_refuses_a_conversation_is_named():
    template = "{{ raise_exception('users only') }}"
    reward = CausalRewardModel(classifier(), chat_tokenizer(template=template))
    with pytest.raises(RewardError, match="refuses it: users only"):
        reward(prompts=["a film"], completions=[COMPLETION], messages=[MESSAGES])


@pytest.mark.parametrize("kind", READERS)
def test_messages_in_place_of_texts_are_read_as_trl_gives_them(kind):
    answer = [{"role": "assistant", "content": COMPLETION}]
    [score] = READERS[kind]()(prompts=[MESSAGES], completions=[answer])
    assert score == pytest.approx(expected_score(OWN_PROMPT + COMPLETION, append_eos=kind == "causal"), abs=1e-5)


def test_rules_read_the_contents_of_messages_and_refuse_what_is_neither():
    answer = [{"role": "assistant", "content": "<b>good</b>"}]
    reward = XmlTags(("b",))
    assert reward(prompts=[MESSAGES], completions=[answer]) == [1.0]
    with pytest.raises(TypeError, match=r"completions\[0\]=3 must be a text, got int"):
        reward(prompts=["x"], completions=[3])
