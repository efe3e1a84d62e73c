"""What opens and ends a turn: the tokens of chat models, whatever their tokenizer calls the end of a sequence."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tiny_models import (
    CHAT_BOS,
    CHAT_EOS,
    CHAT_PAD,
    CHAT_SPECIAL,
    CHATML,
    chat_tokenizer,
    save_chat_model,
    tiny_causal_reward_model,
    tiny_tokenizer,
)
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

import textgym  # noqa: F401  registers the environment ids
from textgym.agents import PPO
from textgym.agents.cli import app
from textgym.agents.runs import Run, RunConfig
from textgym.evaluation import evaluate
from textgym.generation import complete, cut_at_stop_strings
from textgym.language_model import LanguageModel, load_language_model, load_vocabulary
from textgym.prompt_files import load_prompt_file
from textgym.prompt_fitting import fit_prompt
from textgym.reward_training.encoding import encode as encode_training
from textgym.rewards import ClassifierReward, FunctionReward, PrefixBatch, RegexMatch, XmlTags
from textgym.turns import TurnTokens

START, END = CHAT_SPECIAL, CHAT_SPECIAL + 1  # <|im_start|> and <|im_end|>
THINK = ("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<answer>", "</answer>", "<|tool|>")


def one(completions: list[str], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


def make(path: Path | str, **options: Any) -> gym.Env[Any, Any]:
    chosen: dict[str, Any] = {"prompts": ["hi"], "reward": one, "kl_coef": 0.0, "max_new_tokens": 8, **options}
    return gym.make("TextGen-v0", language_model=str(path), **chosen)


def write(env: gym.Env[Any, Any], ids: list[int]) -> tuple[bool, dict[str, Any]]:
    """Step tokens until the episode ends; whether it terminated, and the last info."""
    for token in ids:
        _, _, terminated, truncated, info = env.step(token)
        if terminated or truncated:
            break
    return terminated, info


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
    assert all(not {END, CHAT_EOS} & set(row[:5]) for row in late)


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

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' +"
    " message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant'"
    " else message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
OPEN = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama 3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), "<|endoftext|>"),
    "plain": (OPEN, (), "<|endoftext|>"),
}


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
    tokenizer = load_vocabulary(chat).tokenizer
    batch = PrefixBatch(
        input_ids=np.array([[20, 21, START, 22], [20, 21, 22, END]]),
        lengths=np.array([4, 4]),
        prompt_lengths=np.array([1, 1]),
        finished=np.array([False, True]),
        rows=np.arange(2),
        prompts=["p", "p"],
        columns={},
        tokenizer=tokenizer,
    )
    cut, stopped = cut_at_stop_strings(batch, ["<|im_start|>", "<|im_end|>"])
    assert stopped.tolist() == [True, True]
    assert cut.lengths.tolist() == [3, 4]
    assert cut.finished.tolist() == [False, True]
    assert "<|im_start|>" not in cut.completions[0]


def test_a_stop_string_typed_in_a_shell_may_have_escapes():
    from textgym.agents.cli_texts import unescaped

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


# Long prompts.


def conversation(path: Path, *contents: str, system: str = "be brief", name: str = "prompts.jsonl") -> str:
    """A file with one conversation, of a system and then of user and assistant by turns."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": "system", "content": system}]
    messages += [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    (path / name).write_text(json.dumps({"prompt": messages, "answer": "4"}))
    return str(path / name)


def test_a_long_conversation_loses_content_of_its_oldest_turns_and_no_header(chat, tmp_path):
    seen = {}

    def noting(prompts: list[str], completions: list[str], messages: Any, answer: Any) -> list[float]:
        seen.update(prompt=prompts[0], messages=messages[0], answer=answer[0])
        return [0.0]

    file = conversation(tmp_path, "a film " * 30, "a good film", "is it good?")
    with pytest.warns(UserWarning, match="tokens is longer than max_prompt_tokens=72"):
        env = make(chat, prompts=file, reward=noting, max_prompt_tokens=72)
    observation, info = env.reset()
    length = int(observation["prompt_length"][0])
    contents = [message["content"] for message in seen["messages"]]
    assert contents[0] == "be brief"
    assert contents[2:] == ["a good film", "is it good?"]
    assert ("a film " * 30).endswith(contents[1])
    assert 0 < len(contents[1]) < 210
    tokenizer = env.unwrapped.tokenizer
    expected = tokenizer.apply_chat_template(seen["messages"], add_generation_prompt=True)["input_ids"]
    assert 70 <= length <= 72
    assert observation["input_ids"][:length].tolist() == expected
    text = tokenizer.apply_chat_template(seen["messages"], add_generation_prompt=True, tokenize=False)
    assert info["prompt"] == seen["prompt"] == text
    assert seen["answer"] == "4"


@pytest.mark.filterwarnings("ignore:a prompt of .* tokens is longer")
def test_a_conversation_loses_the_systems_content_last_and_headers_never(chat, tmp_path):
    file = conversation(tmp_path, "a film", "a good film", "why?", system="be brief and kind " * 5)
    env = make(chat, prompts=file, max_prompt_tokens=80)
    _, info = env.reset()
    assert info["prompt"].count("<|im_start|>") == 5
    assert "kind <|im_end|>" in info["prompt"]
    assert "be brief and kind be brief and kind " not in info["prompt"]
    assert not any(text in info["prompt"] for text in ("film", "why"))
    with pytest.raises(ValueError, match="headers alone are .* tokens, more than max_prompt_tokens=10"):
        make(chat, prompts=file, max_prompt_tokens=10).reset()


def test_a_template_of_any_family_gives_its_tokens_when_cut(family, tmp_path):
    tokenizer, _ = family
    save_chat_model(tmp_path / "model", tokenizer)
    messages = [{"role": "user", "content": "天气真好 " * 9}, {"role": "assistant", "content": "a film"}]
    messages += [{"role": "user", "content": "is it good?"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": messages}))
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    vocabulary = load_vocabulary(tmp_path / "model")
    (row,) = load_prompt_file(tmp_path / "prompts.jsonl", tokenizer=vocabulary.tokenizer)
    assert fit_prompt(row, vocabulary).ids == whole
    for limit in range(len(whole) - 20, len(whole) + 1):
        cut, ids = fit_prompt(row, vocabulary, limit)
        assert len(ids) <= limit
        assert ids == tokenizer.apply_chat_template(cut.columns["messages"], add_generation_prompt=True)["input_ids"]


def test_lengths_are_judged_when_prompts_are_loaded(chat):
    rows = [*["天气"] * 1500, "a good film " * 40]
    with pytest.raises(ValueError, match="a prompt of .* tokens is longer than max_prompt_tokens=64: 'a good film"):
        make(chat, prompts=rows, prompt_overflow="error")
    with pytest.warns(UserWarning, match="as are 1 others of 3"):
        make(chat, prompts=["hi", "天" * 30, "天" * 40])


def test_a_reward_model_with_another_tokenizer_reads_the_prompts_text(chat):
    from textgym.rewards import CausalRewardModel

    judge = chat_tokenizer(("<|user|>",), OPEN)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(judge), num_labels=1, pad_token_id=CHAT_PAD, **shape)
    reward = CausalRewardModel(LlamaForSequenceClassification(config), judge)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    env = make(chat, reward=reward, reward_every="end", prompts=[prompt])
    env.reset()
    ids = env.unwrapped.tokenizer("a film")["input_ids"]
    _, info = write(env, [*ids, END])
    assert [info["score"]] == pytest.approx(reward(prompts=[prompt], completions=["a film"]), abs=1e-6)


# Arguments of chat templates.

THINKING = "{% macro note() %}{{ 'thinks' if enable_thinking else effort }}{% endmacro %}" + CHATML.replace(
    "assistant\n' }}", "assistant\n' }}{{ note() }}"
)


def test_template_arguments_are_those_of_a_direct_call(tmp_path):
    save_chat_model(tmp_path, chat_tokenizer(template="\n" + THINKING))
    plain = load_vocabulary(tmp_path).tokenizer
    arguments = {"enable_thinking": False, "effort": 'it\'s 天🙂\n"low"'}
    messages = [{"role": "user", "content": "hi"}]
    expected = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments)
    for loaded in (load_vocabulary, load_language_model):
        fixed = loaded(tmp_path, chat_template_kwargs=arguments).tokenizer
        assert fixed.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": messages}))
    env = make(tmp_path, prompts=str(file), chat_template_kwargs=arguments)
    assert env.reset()[1]["prompt"] == expected
    assert gym.make(env.spec).reset()[1]["prompt"] == expected


@pytest.mark.parametrize(
    ("arguments", "error", "complaint"),
    [
        ({"thinking_budget": 3}, ValueError, "'thinking_budget', which the chat template does not read"),
        ({"messages": []}, ValueError, "has 'messages'; give names of the template's own"),
        ({"effort": object()}, TypeError, r"chat_template_kwargs\['effort'\] has .* give plain data"),
        ({"effort": float("nan")}, ValueError, "must be finite"),
        ("effort=low", TypeError, "must be a dict"),
    ],
)
def test_template_arguments_that_do_nothing_are_refused(tmp_path_factory, arguments, error, complaint):
    path = tmp_path_factory.mktemp("model")
    save_chat_model(path, chat_tokenizer(template=THINKING))
    with pytest.raises(error, match=complaint):
        make(path, chat_template_kwargs=arguments)


def test_template_arguments_of_a_run_are_texts_or_a_mapping():
    given = RunConfig(chat_template_kwargs=["enable_thinking=false", "effort=very low", "depth=2"])
    assert given.template_arguments() == {"enable_thinking": False, "effort": "very low", "depth": 2}
    mapping = RunConfig.from_mapping({"chat_template_kwargs": {"enable_thinking": False, "effort": "2"}})
    assert mapping.template_arguments() == {"enable_thinking": False, "effort": "2"}
    assert RunConfig().template_arguments() == {}
    for wrong in (["enable_thinking"], ["a=1", "a=2"], ["a=["]):
        with pytest.raises(ValueError, match="chat_template_kwargs="):
            RunConfig(chat_template_kwargs=wrong)


# What samples from a policy says it in the template that the policy was trained in.


def test_a_policy_trained_on_conversations_takes_texts_as_what_a_user_says(chat, tmp_path):
    file = conversation(tmp_path, "a good film")
    envs = gym.make_vec("TextGen-v0", 2, language_model=str(chat), prompts=file, reward=one, max_new_tokens=6)
    assert envs.unwrapped.sampling.chat
    agent = PPO("LanguageModelPolicy", envs, n_steps=4, batch_size=8, n_epochs=1, seed=0)
    messages = [{"role": "user", "content": "is it good?"}]
    templated = "<|im_start|>user\nis it good?<|im_end|>\n<|im_start|>assistant\n"
    texts = [agent.policy.generate([prompt], seed=0) for prompt in ("is it good?", messages, templated)]
    assert texts[0] == texts[1] == texts[2]
    assert agent.policy.generate([templated], seed=0, chat=False) == texts[0]
    lm = agent.policy.language_model
    raw = complete(lm, [lm.encode("is it good?")], 6, generator=torch.Generator().manual_seed(0))
    assert agent.policy.generate(["is it good?"], seed=0, chat=False) == [lm.vocabulary.decode(raw[0])]
    agent.save_pretrained(tmp_path / "saved")
    assert PPO.from_pretrained(tmp_path / "saved").policy.generate(["is it good?"], seed=0) == texts[0]
    measured = evaluate(lm, lm, FunctionReward(one), ["is it good?"], envs.unwrapped.sampling)
    assert measured.prompts == [templated]
    envs.close()


def test_a_policy_trained_on_texts_takes_texts_as_they_are(chat):
    envs = gym.make_vec("TextGen-v0", 2, language_model=str(chat), prompts=["hi", "a film"], reward=one)
    assert not envs.unwrapped.sampling.chat
    envs.close()


def test_evaluation_shortens_conversations_as_the_environment_does(chat, tmp_path):
    lm = load_language_model(chat)
    rows = load_prompt_file(
        conversation(tmp_path, "a film " * 30, "a good film", "is it good?"), tokenizer=lm.tokenizer
    )
    with pytest.warns(UserWarning, match="1 of 1 prompts are longer than max_prompt_tokens=80"):
        measured = evaluate(lm, lm, FunctionReward(one), rows, max_prompt_tokens=80, max_new_tokens=4)
    assert measured.prompts == [fit_prompt(rows[0], lm.vocabulary, 80).row.prompt]


@pytest.mark.parametrize("as_conversation", [True, False])
def test_supervised_training_teaches_the_end_of_turn_behind_a_conversation(chat, as_conversation, tmp_path):
    from textgym.agents.imitation import _encode

    prompt = [{"role": "user", "content": "4?"}] if as_conversation else "4? is"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "completion": " four"}))
    lm = load_language_model(chat)
    rows = load_prompt_file(tmp_path / "rows.jsonl", tokenizer=lm.tokenizer)
    (example,) = _encode(lm, rows, "completion", None, "prompts")
    if as_conversation:
        messages = [*prompt, {"role": "assistant", "content": " four"}]
        whole = lm.tokenizer.apply_chat_template(messages)["input_ids"]
        assert [*example.prompt, *example.completion] == whole[: len(example.prompt) + len(example.completion)]
    assert example.completion[-1] == (END if as_conversation else CHAT_EOS)


def test_an_action_that_ends_a_turn_ends_it_as_the_template_does(chat):
    env = gym.make("TextWrite-v0", language_model=str(chat), prompts=["hi"], reward=one, kl_coef=0.0)
    env.reset(options={"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"})
    assert env.unwrapped.encode("") == [END]
    env.reset(options={"prompt": "the film"})
    assert env.unwrapped.encode("") == [CHAT_EOS]


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> Path:
    """A run on conversations, of a model whose template has a variable."""
    path = tmp_path_factory.mktemp("run")
    save_chat_model(path / "model", chat_tokenizer(template=THINKING))
    rows = [{"prompt": [{"role": "user", "content": f"film {i}?"}]} for i in range(6)]
    (path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {
        "rows": 2, "max_new_tokens": 3, "timesteps": 6, "eval_prompts": 1, "samples": 1, "device": "cpu", "threads": 1,
        "tensorboard": False, "n_epochs": 1,
    }  # fmt: skip
    (path / "one.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    config = RunConfig(
        model=str(path / "model"), prompts=str(path / "prompts.jsonl"), reward=f"{path / 'one.py'}:one",
        chat_template_kwargs=["effort=low"], **options,
    )  # fmt: skip
    assert Run("ppo", config, path / "run").train()
    return path / "run"


@pytest.mark.parametrize(
    ("arguments", "prompt"),
    [
        ([], "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\nlow"),
        (["--raw"], "so?"),
        (
            ["--system", "be brief"],
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\nlow",
        ),
        (
            ["--chat-template-kwargs", "effort=high"],
            "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\nhigh",
        ),
    ],
)
def test_generate_says_a_prompt_in_the_template_of_the_run(chat_run, arguments, prompt):
    for model in (chat_run, chat_run / "model"):
        result = CliRunner().invoke(app, ["generate", str(model), "-p", "so?", "--json", *arguments])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["prompt"] == prompt


def test_generate_takes_a_plain_models_prompts_as_they_are_unless_asked(chat):
    told = {}
    for flags in ((), ("--template",), ("--system", "be brief")):
        command = ["generate", str(chat), "-p", "so?", "--json", "--max-new-tokens", "2", *flags]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        told[flags] = json.loads(result.stdout)["prompt"]
    user = "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n"
    assert list(told.values()) == ["so?", user, f"<|im_start|>system\nbe brief<|im_end|>\n{user}"]


@pytest.mark.parametrize("arguments", [["--raw", "-p", "so?"], []])
def test_a_system_that_nobody_would_hear_is_refused(chat_run, arguments):
    result = CliRunner().invoke(app, ["generate", str(chat_run), "--system", "be brief", *arguments])
    assert result.exit_code == 2
    assert "--system 'be brief' is said before each --prompt" in " ".join(result.output.split())


def test_held_out_conversations_get_the_template_arguments_that_are_given(chat_run):
    flags = ["--json", "-n", "1", "--chat-template-kwargs", "effort=high"]
    result = CliRunner().invoke(app, ["generate", str(chat_run), *flags])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompt"].endswith("<|im_start|>assistant\nhigh")
