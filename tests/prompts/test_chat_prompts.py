"""Conversations as prompts: what is cut where they are long, arguments of templates, what policies make of texts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from chat_templates import END, OPEN, TEMPLATES, make, one, write
from tiny_models import (
    CHAT_EOS,
    CHAT_PAD,
    CHATML,
    chat_tokenizer,
    save_chat_model,
)
from transformers import LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

import textgym  # noqa: F401  registers the environment ids
from textgym.agents import PPO
from textgym.agents.cli.main import app
from textgym.agents.runs import Run, RunConfig
from textgym.chat.chat_prompts import chat_prompt
from textgym.evaluation import evaluate
from textgym.generation import complete
from textgym.language_model import load_language_model, load_vocabulary
from textgym.prompts.files import load_prompt_file
from textgym.prompts.fitting import fit_prompt
from textgym.prompts.rows import PromptRow
from textgym.rewards import FunctionReward


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "chat"
    save_chat_model(path, ends=[END, CHAT_EOS])
    return path


@pytest.fixture(params=list(TEMPLATES))
def family(request: pytest.FixtureRequest) -> tuple[Any, str]:
    """A tokenizer and what its template ends a turn with."""
    template, special, end = TEMPLATES[request.param]
    return chat_tokenizer((*special, "<think>", "</think>"), template, bos="bos_token" in template), end


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
@pytest.mark.parametrize(("asked", "system"), [("why?", "be brief and kind " * 5), ("why so? " * 12, "be brief")])
def test_without_older_turns_the_longer_of_system_and_question_is_cut(chat, tmp_path, asked, system):
    file = conversation(tmp_path, "a film", "a good film", asked, system=system)
    env = make(chat, prompts=file, max_prompt_tokens=80)
    _, info = env.reset()
    assert info["prompt"].count("<|im_start|>") == 5
    assert "film" not in info["prompt"]
    shorter, longer = sorted((asked, system), key=len)
    assert f"\n{shorter}<|im_end|>" in info["prompt"]
    assert f"{longer[-8:]}<|im_end|>" in info["prompt"]
    assert longer not in info["prompt"]
    with pytest.raises(ValueError, match="headers alone are .* tokens, more than max_prompt_tokens=10"):
        make(chat, prompts=file, max_prompt_tokens=10).reset()


def test_of_system_and_question_of_one_length_both_keep_their_ends(chat, tmp_path):
    file = conversation(tmp_path, "abcdefgh" * 10, system="12345678" * 10)
    with pytest.warns(UserWarning, match="is longer than max_prompt_tokens=80"):
        _, info = make(chat, prompts=file, max_prompt_tokens=80).reset()
    assert "45678<|im_end|>" in info["prompt"]
    assert "defgh<|im_end|>" in info["prompt"]


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
        # A prompt that was in the template before anybody saw its messages is cut alike.
        assert fit_prompt(PromptRow(row.prompt), vocabulary, limit) == (PromptRow(cut.prompt), ids)


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
    (example,) = _encode(lm, rows, "completion", None, "prompts", every=True)
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
def chat_run(runs_without_pictures, tmp_path_factory) -> Path:
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


def test_a_model_saved_by_supervised_training_has_the_template_that_it_learned_with(tmp_path):
    save_chat_model(tmp_path / "model", chat_tokenizer(template=THINKING))
    rows = [{"prompt": [{"role": "user", "content": f"film {i}?"}], "completion": "yes"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["sft", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    options = ["--chat-template-kwargs", "effort=low", "--epochs", "1", "--device", "cpu", "--validation-share", "0"]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    saved = load_vocabulary(tmp_path / "out")
    assert chat_prompt(rows[0]["prompt"], saved.tokenizer).endswith("<|im_start|>assistant\nlow")
    assert END in saved.end_ids
