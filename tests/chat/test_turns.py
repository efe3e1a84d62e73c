"""What opens and ends a turn: the tokens of chat models, whatever their tokenizer calls the end of a sequence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import END, OPEN, START, TEMPLATES, make, one, write
from tiny_models import (
    CHAT_BOS,
    CHAT_EOS,
    CHAT_PAD,
    CHATML,
    chat_tokenizer,
    save_chat_model,
    tiny_causal_reward_model,
    tiny_tokenizer,
)
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from written_texts import written

import textgym  # noqa: F401  registers the environment ids
from textgym.chat.turns import TurnTokens
from textgym.evaluation import evaluate
from textgym.generation import complete
from textgym.language_model import LanguageModel, load_language_model, load_vocabulary
from textgym.reward_training.encoding import encode as encode_training
from textgym.rewards import ClassifierReward, FunctionReward, PrefixBatch, RegexMatch, XmlTags

THINK = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<answer>", "</answer>", "<|tool|>")


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "chat"
    save_chat_model(path, ends=[END, CHAT_EOS])
    return path


@pytest.fixture(scope="module")
def thinking(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "thinking"
    save_chat_model(path, chat_tokenizer(THINK))
    return path


# Ends.


@pytest.mark.parametrize("end", [END, CHAT_EOS])
def test_every_end_that_a_model_lists_ends_an_episode_and_is_allowed(chat, end):
    env = make(chat, action_masking=True, missing_eos_penalty=1.0)
    _, info = env.reset()
    assert info["action_mask"][end] == 1
    assert info["action_mask"][[START, CHAT_PAD]].tolist() == [0, 0]
    terminated, info = write(env, [end])
    assert terminated
    assert info["finish_reason"] == "eos"
    assert info["missing_eos_penalty"] == 0.0
    assert info["completion"] == ""


@pytest.mark.parametrize(
    ("template", "listed", "config", "ends"),
    [
        (None, [10, CHAT_EOS], CHAT_EOS, {10, CHAT_EOS}),  # whatever was listed was meant
        (None, None, [START, CHAT_EOS], {START, CHAT_EOS}),
        (None, None, 10, {CHAT_EOS}),  # an ordinary token in the configuration of the architecture
        (None, [4000], CHAT_EOS, {CHAT_EOS}),  # no token of the model
        (CHATML, None, CHAT_EOS, {END, CHAT_EOS}),
        (CHATML, CHAT_EOS, CHAT_EOS, {END, CHAT_EOS}),
    ],
)
def test_ends_are_what_generation_configuration_or_configuration_and_template_say(
    tmp_path, template, listed, config, ends
):
    save_chat_model(tmp_path, chat_tokenizer(template=template), listed, eos_token_id=config)
    assert set(load_vocabulary(tmp_path).end_ids) == ends
    assert set(load_language_model(tmp_path).end_ids) == ends


def test_no_end_is_allowed_before_the_least_number_of_tokens(chat):
    env = make(chat, action_masking=True, min_new_tokens=2)
    _, info = env.reset()
    assert not info["action_mask"][[END, CHAT_EOS]].any()
    terminated, info = write(env, [20, 20])
    assert not terminated
    assert info["action_mask"][[END, CHAT_EOS]].all()


def test_sampling_stops_at_every_end_and_not_before_the_least_number_of_tokens(chat):
    lm = load_language_model(chat)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        lm.model.lm_head.weight[[END, CHAT_EOS]] = lm.model.lm_head.weight[[END, CHAT_EOS]] * 5
    rows = complete(lm, [[20, 21]] * 64, 24, generator=generator)
    assert {row[-1] for row in rows if len(row) < 24} == {END, CHAT_EOS}
    assert all(not {END, CHAT_EOS} & set(row[:-1]) for row in rows)
    late = complete(lm, [[20, 21]] * 64, 24, min_new_tokens=5, generator=generator)
    assert all(len(row) > 5 and not {END, CHAT_EOS} & set(row[5:-1]) for row in late)
    assert any({END, CHAT_EOS} & set(row[:5]) for row in late)  # which ended nothing


def test_evaluation_counts_every_end(chat):
    lm = load_language_model(chat)
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()
        lm.model.lm_head.weight[END] = 1e3 * lm.model.model.norm.weight.sign()
    # All logits are 0 but that of the end, whose sign depends on the state: where it ends, it ends so.
    evaluation = evaluate(lm, lm, FunctionReward(one), ["hi", "a film", "good"], max_new_tokens=16)
    ended = np.array(evaluation.finish_reasons) == "eos"
    assert evaluation.figures()["eos_rate"] == ended.mean() > 0


def test_a_reward_model_reads_its_own_end_whatever_ended_the_completion():
    from textgym.rewards import CausalRewardModel

    tokenizer = tiny_tokenizer()
    reward = CausalRewardModel(tiny_causal_reward_model(), tokenizer)
    eos, other = int(tokenizer.eos_token_id), int(tokenizer.unk_token_id)

    def batch(end: int) -> PrefixBatch:
        return PrefixBatch(
            input_ids=np.array([[10, 11, 12, end]]),
            lengths=np.array([4]),
            prompt_lengths=np.array([2]),
            finished=np.array([True]),
            rows=np.array([0]),
            prompts=["p"],
            columns={},
            tokenizer=tokenizer,
        )

    reward.forget(np.array([0]))
    expected = reward.potentials(batch(eos))
    reward.forget(np.array([0]))
    assert reward.potentials(batch(other)) == pytest.approx(expected, abs=1e-6)
    whole = reward.prefix_potentials(batch(other), [np.array([2])])[0]
    assert whole == pytest.approx(expected, abs=1e-6)


# Chat templates.


@pytest.fixture(params=list(TEMPLATES))
def family(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """A tokenizer and what its template ends a turn with."""
    template, special, end = TEMPLATES[request.param]
    return chat_tokenizer((*special, "<think>", "</think>"), template, bos="bos_token" in template), end


def test_the_end_of_turn_is_what_the_template_writes_behind_an_answer(family):
    tokenizer, end = family
    turns = TurnTokens(tokenizer)
    assert turns.end_of_turn_id == tokenizer.convert_tokens_to_ids(end)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    assert turns.end_after(chat) == turns.end_of_turn_id
    assert turns.end_after(turns.encode("the film is")) == CHAT_EOS


def test_a_template_that_leaves_an_answer_open_ends_it_with_the_next_turn_where_that_is_an_end():
    tokenizer = chat_tokenizer(("<|user|>", "<|assistant|>"), OPEN)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert TurnTokens(tokenizer, [user, CHAT_EOS]).end_of_turn_id == user
    assert TurnTokens(tokenizer).end_of_turn_id == CHAT_EOS


def test_texts_show_what_is_said_and_no_header(family):
    tokenizer, _ = family
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>hm</think>4"}]
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    text = TurnTokens(tokenizer).decode(ids)
    assert "<think>hm</think>4" in text
    assert not any(token in text for token in tokenizer.all_special_tokens if "think" not in token)


def test_special_tokens_that_are_content_reach_the_reward_and_the_masks(thinking):
    env = make(thinking, reward=XmlTags(), max_new_tokens=40, action_masking=True)
    _, info = env.reset()
    tokenizer = env.unwrapped.tokenizer
    text = "<think>hm</think><answer>4</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert info["action_mask"][ids].all()
    terminated, info = write(env, [*ids, END])
    assert terminated
    assert info["completion"] == text
    assert info["score"] == 1.0
    env.reset()
    tool = tokenizer.convert_tokens_to_ids("<|tool|>")
    assert write(env, [tool, CHAT_PAD, START, END])[1]["completion"] == "<|tool|>"


# What stands before and behind a text.


@pytest.mark.parametrize("bos", [False, True])
def test_a_text_begins_with_one_bos_and_keeps_the_end_it_has(tmp_path, bos):
    save_chat_model(tmp_path, chat_tokenizer(bos=bos, template=None))
    vocabulary = load_vocabulary(tmp_path)
    plain = vocabulary.tokenizer("hi", add_special_tokens=False)["input_ids"]
    before = [CHAT_BOS] if bos else []
    assert vocabulary.encode("hi") == [*before, *plain]
    assert vocabulary.encode("<s>hi") == [CHAT_BOS, *plain]
    assert vocabulary.encode("hi<|endoftext|>") == [*before, *plain, CHAT_EOS]


def test_only_an_end_that_the_tokenizer_adds_is_left_out_of_a_prompt(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer(template=None)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", CHAT_EOS)]
    )
    turns = TurnTokens(tokenizer)
    plain = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert turns.encode("hi") == plain
    assert turns.encode("hi<|endoftext|>") == [*plain, CHAT_EOS]
    assert turns.encode("hi", whole=True) == turns.encode("hi<|endoftext|>", whole=True) == [*plain, CHAT_EOS]


def test_a_prompt_that_ends_in_an_end_on_purpose_is_read_with_it(chat):
    env = make(chat)
    observation, info = env.reset(options={"prompt": "hi?<|endoftext|>"})
    length = int(observation["prompt_length"][0])
    assert observation["input_ids"][length - 1] == CHAT_EOS
    assert info["prompt"] == "hi?<|endoftext|>"
    assert not write(env, [20])[0]


# Tokenizers of BERT's kind.


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"天气真好，不错今我爱你。", "good", "film", "##s"]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


def test_a_tokenizer_without_end_takes_the_separator_and_says_so():
    tokenizer = bert_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.warns(UserWarning, match=r"no end-of-sequence token: '\[SEP\]' is taken for it"):
        lm = LanguageModel(LlamaForCausalLM(config), tokenizer)
    assert lm.end_ids == (tokenizer.sep_token_id,)
    assert lm.encode("天气") == [tokenizer.cls_token_id, *tokenizer.convert_tokens_to_ids(["天", "气"])]


@pytest.mark.parametrize("text", ["天气真好", "天气真好，不错。", "good film天气", "good films"])
def test_decoding_has_no_spaces_that_the_tokenizer_put_there(text):
    tokenizer = bert_tokenizer()
    turns = TurnTokens(tokenizer)
    assert turns.decode(turns.encode(text, whole=True)) == text


def test_prefixes_of_chinese_of_a_bert_tokenizer_are_prefixes():
    turns = TurnTokens(bert_tokenizer())
    ids = turns.encode("天气good真好，good film")
    texts = turns.decode_all(ids[:n] for n in range(len(ids) + 1))
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))


# Stop strings.


def test_a_stop_string_that_is_a_special_token_stops_on_its_id(chat):
    env = make(chat, stop=["<|im_start|>", "o<|pad|>"])
    env.reset()
    terminated, info = write(env, [20, START])
    assert terminated
    assert info["finish_reason"] == "stop"
    assert "<|im_start|>" not in info["completion"]
    env.reset()
    o = env.unwrapped.tokenizer("o")["input_ids"]
    assert write(env, [20, CHAT_PAD, *o, CHAT_PAD])[1]["finish_reason"] == "stop"


def test_sampled_texts_stop_at_special_tokens_as_the_environment_does(chat):
    stop = ("<|im_start|>", "<|im_end|>")
    opened, ended = (written(load_vocabulary(chat), [20], tokens, stop=stop) for tokens in ([21, START, 22], [21, END]))
    assert (opened.finish_reasons, ended.finish_reasons) == (["stop"], ["eos"])
    assert (opened.lengths.tolist(), ended.lengths.tolist()) == ([3], [3])
    assert "<|im_start|>" not in opened.batch(np.array([0])).completions[0]


def test_a_stop_string_typed_in_a_shell_may_have_escapes():
    from textgym.agents.cli.texts import unescaped

    assert unescaped(r"\n\nUser:") == "\n\nUser:"
    assert unescaped(r"a\tb") == "a\tb"
    assert unescaped(r"\\n") == r"\n"
    assert unescaped(r"\d") == r"\d"


# Rewards.


def test_format_rewards_see_the_tag_that_the_prompts_template_opens():
    prompts, completions = ["p<|assistant|><think>\n"] * 2, ["hm</think><answer>4</answer>", "<think>hm</think>"]
    assert XmlTags()(prompts=prompts, completions=completions) == [1.0, 0.0]
    assert XmlTags()(prompts=["p"] * 2, completions=completions) == [0.5, 0.5]
    whole = RegexMatch(r"<think>\n[^<]*</think><answer>.*</answer>", where="whole")
    assert whole(prompts=prompts, completions=completions) == [1.0, 0.0]
    assert RegexMatch(r"<think>", form="penalty")(prompts=["p", "<b>"], completions=["a", "a"]) == [0.0, 0.0]


def classifier(tokenizer: Any, reads: Any, **options: Any) -> ClassifierReward:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=CHAT_PAD, **shape)
    return ClassifierReward(LlamaForSequenceClassification(config), tokenizer, reads=reads, **options)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_begins_with_bos_is_read_with_one(side):
    tokenizer = chat_tokenizer(bos=True)
    reader = classifier(tokenizer, "text", truncation_side=side, max_length=8).reader
    fitting, bare, long = (row["input_ids"] for row in reader.encode(["<s>a film", "a film", "<s>a good film" * 3]))
    assert fitting == bare == [CHAT_BOS, *tokenizer("a film", add_special_tokens=False)["input_ids"]]
    assert len(long) == 8
    assert long[0] == CHAT_BOS
    training, _ = encode_training(tokenizer, ["<s>a", "a"], [" film", " film"], 30, True)
    assert training[0] == training[1]


def test_a_chat_reward_model_reads_the_conversation_in_its_own_template(tmp_path):
    policy, judge = tmp_path / "policy", chat_tokenizer(("<|user|>", "<|assistant|>"), OPEN)
    save_chat_model(policy)
    reward = classifier(judge, "chat")

    def own_score(text: str) -> Any:
        (_, _, outputs), *_ = reward.reader.run(reward.reader.encode([text], add_special_tokens=False))
        return pytest.approx(outputs.logits.item(), abs=1e-6)

    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("hi", "yo", "4?"), strict=True)]
    score = own_score("<|user|>\nhi<|assistant|>\nyo<|user|>\n4?<|assistant|>\nfour")
    assert reward(prompts=["any"], completions=["four"], messages=[messages]) == [score]
    begun = [*messages, {"role": "assistant", "content": "fo"}]
    assert reward(prompts=["any"], completions=["ur"], messages=[begun]) == [score]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": messages}))
    env = make(policy, prompts=str(tmp_path / "prompts.jsonl"), reward=reward, reward_every="end")
    env.reset()
    ids = env.unwrapped.tokenizer("four")["input_ids"]
    assert write(env, [*ids, END])[1]["score"] == score
    assert reward(prompts=["any"], completions=["four"]) == [own_score("<|user|>\nany<|assistant|>\nfour")]


# Code of a checkpoint.


@pytest.fixture
def with_code(tmp_path, monkeypatch) -> Path:
    """A chat model whose configuration is a class of its own, in a file beside it."""
    save_chat_model(tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config.update(model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"})
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Own(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = Own\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path / "own"


def test_code_of_a_checkpoint_is_run_only_where_that_is_said(with_code, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked on the terminal"))
    for options in ({"kl_coef": 0.0}, {"kl_coef": 0.1}):
        with pytest.raises(ValueError, match="Python code of its own, which is run only where trust_remote_code=True"):
            make(with_code, **options)
        env = make(with_code, trust_remote_code=True, **options)
        env.reset()
        assert write(env, [END])[0]
