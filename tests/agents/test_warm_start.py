"""Supervised warm starts: the loss of completion tokens, in place or into a directory, and the best pass stays."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from chat_templates import TEMPLATES
from rich.console import Console
from tiny_agents import logs_of_learning, tiny_language_model, tiny_ppo, tiny_vector_env, values_of
from tiny_models import EOS, PAD, VOCABULARY, chat_tokenizer, save_chat_model, tiny_model, tiny_tokenizer
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from textgym.agents import imitation
from textgym.agents.cli.sft import add_warm_start
from textgym.agents.imitation import warm_start
from textgym.language_model import LanguageModel, load_language_model

ROWS = [
    {"prompt": f"{start} {thing}", "completion": f" is {word}{more}"}
    for start in ("the", "this", "a")
    for thing in ("film", "movie", "story", "plot")
    for word, more in (("good", ""), ("great", " and fresh ."))
]
NO_SPLIT: dict[str, Any] = {"validation_share": 0, "batch_size": 5}


def by_hand(model: Any, rows: list[dict[str, str]]) -> torch.Tensor:
    """Nats per completion token: each row alone through the plain model, logits at the places before its tokens."""
    tokenizer, losses = tiny_tokenizer(), []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        completion = [*tokenizer(row["completion"])["input_ids"], EOS]
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        losses.append(-logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loss_and_update_are_those_of_completion_tokens_alone(architecture):
    """One step on all rows, beside torch's AdamW on a loss written out; GPT-2 would have dropout."""
    lm, twin = tiny_language_model(architecture), tiny_model(architecture)
    step = {"epochs": 1, "batch_size": len(ROWS), "warmup": 0.0, "learning_rate": 1e-3, "validation_share": 0}
    report = warm_start(lm, ROWS, **step)
    loss = by_hand(twin, ROWS)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    optimizer.step()
    assert report.loss_before == pytest.approx(loss.item(), rel=1e-5)
    assert report.perplexity_before == pytest.approx(np.exp(loss.item()), rel=1e-4)
    assert report.loss_after == pytest.approx(by_hand(twin, ROWS).item(), rel=1e-4)
    assert report.loss_after < report.loss_before
    for mine, theirs in zip(lm.model.parameters(), twin.parameters(), strict=True):
        difference = (mine - theirs).abs()
        assert difference.max() < 2e-3  # where a gradient is all but 0, Adam's first step has either sign
        assert difference.mean() < 1e-5


def test_rows_of_one_prompt_are_on_one_side_and_figures_are_of_the_validation_rows():
    lm = tiny_language_model()
    report = warm_start(lm, ROWS, validation_share=0.25, epochs=2, learning_rate=1e-3)
    assert (report.training_rows, report.validation_rows) == (18, 6)
    assert report.tokens < sum(len(tiny_tokenizer()(row["completion"])["input_ids"]) + 1 for row in ROWS)
    given = warm_start(tiny_language_model(), ROWS[:18], validation=ROWS[18:], epochs=1)
    assert given.loss_before == pytest.approx(by_hand(tiny_model("llama"), ROWS[18:]).item(), rel=1e-5)
    assert (given.training_rows, given.validation_rows) == (18, 6)


def test_completions_may_be_a_list_or_another_column():
    prompts, texts = [row["prompt"] for row in ROWS], [row["completion"] for row in ROWS]
    renamed = [{"prompt": row["prompt"], "target": row["completion"]} for row in ROWS]
    losses = [
        warm_start(tiny_language_model(), *given, **NO_SPLIT, epochs=1).loss_after
        for given in ((ROWS,), (prompts, texts), (renamed, "target"))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_the_weights_of_the_best_pass_stay():
    lm = tiny_language_model()
    before = [parameter.clone() for parameter in lm.model.parameters()]
    report = warm_start(lm, ROWS, learning_rate=3.0, epochs=6, patience=2)
    assert (report.best_epoch, report.epochs) == (0, 2)  # nothing so wild helps
    assert report.loss_after == report.loss_before
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters(), strict=True))

    report = warm_start(lm, ROWS, learning_rate=2e-2, epochs=12, patience=None)
    losses = [entry["loss"] for entry in report.history]
    assert len(losses) == 13
    assert report.best_epoch == int(np.argmin(losses))
    assert report.loss_after == min(losses)
    assert report.loss_after < 0.5 * report.loss_before


@pytest.mark.parametrize("of", ["agent", "policy"])
def test_an_agent_learns_in_place_and_goes_on_from_there(of):
    env = tiny_vector_env()
    agent = tiny_ppo(env, learning_rate=1e-3)
    agent.learn(48)
    reference = env.reference_language_model().model
    kept = [parameter.clone() for parameter in reference.parameters()]
    report = warm_start(agent if of == "agent" else agent.policy, ROWS, epochs=20, learning_rate=1e-2, **NO_SPLIT)
    assert report.language_model is agent.policy.language_model
    assert report.loss_after < 1.0
    texts = agent.policy.generate(["the film", "this plot"] * 20, max_new_tokens=6, seed=0)
    assert sum(text.split()[:1] == ["is"] for text in texts) > 36
    assert all(torch.equal(a, b) for a, b in zip(kept, reference.parameters(), strict=True))
    assert not agent.policy.training
    logs = logs_of_learning(agent, 96)
    assert max(values_of(logs, "train/ratio_first")) < 1e-4
    assert values_of(logs, "rollout/kl_ref")[0] > 1.0


def test_of_an_adapter_the_base_weights_stay():
    agent = tiny_ppo(policy_kwargs={"lora": {"r": 2}})
    before = {name: p.detach().clone() for name, p in agent.policy.transformer.named_parameters()}
    report = warm_start(agent, ROWS, epochs=3, learning_rate=1e-2)
    assert report.loss_after < report.loss_before
    moved = {name for name, p in agent.policy.transformer.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora" in name for name in moved)


def test_the_directory_is_what_language_model_opens(tmp_path: Path):
    tiny_language_model().save_pretrained(tmp_path / "start")
    report = warm_start(str(tmp_path / "start"), ROWS, output=tmp_path / "warm", device="cpu", learning_rate=1e-3)
    opened = load_language_model(str(tmp_path / "warm"), device="cpu")
    started = load_language_model(str(tmp_path / "start"), device="cpu")
    for name, weight in report.language_model.model.state_dict().items():
        assert torch.equal(weight, opened.model.state_dict()[name])
    assert torch.equal(started.model.lm_head.weight, tiny_model("llama").lm_head.weight)
    logs = logs_of_learning(tiny_ppo(tiny_vector_env(language_model=opened)), 48)
    assert abs(values_of(logs, "rollout/kl_ref")[0]) < 1e-4
    with pytest.raises(ValueError, match="is there already"):
        warm_start(tiny_language_model(), ROWS, output=tmp_path / "warm")


def test_the_same_seed_gives_the_same_weights():
    losses = [warm_start(tiny_language_model(), ROWS, seed=seed, batch_size=4, epochs=1) for seed in (1, 1, 2)]
    assert losses[0].loss_after == losses[1].loss_after != losses[2].loss_after


def test_long_rows_are_cut_with_a_warning():
    with pytest.warns(UserWarning, match="24 of 24 rows are longer than 3 tokens and were cut"):
        report = warm_start(tiny_language_model(), ROWS, max_length=3, epochs=1, validation_share=0)
    assert report.tokens == 2 * 24


def test_an_encoder_decoder_reads_prompts_with_its_encoder():
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}
    lm = LanguageModel(
        T5ForConditionalGeneration(T5Config(vocab_size=len(VOCABULARY), **shape, **ids)), tiny_tokenizer()
    )
    prompts = [lm.encode(row["prompt"]) for row in ROWS]
    completions = [[*tiny_tokenizer()(row["completion"])["input_ids"], EOS] for row in ROWS]
    lengths = np.array([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    whole = np.zeros((len(ROWS), lengths.max()), dtype=np.int64)
    for row, prompt, completion in zip(whole, prompts, completions, strict=True):
        row[: len(prompt) + len(completion)] = prompt + completion
    prompt_lengths = np.array([len(prompt) for prompt in prompts])
    rows = np.repeat(np.arange(len(ROWS)), lengths - prompt_lengths)
    at = np.concatenate([np.arange(p, n) for p, n in zip(prompt_lengths, lengths, strict=True)])
    with torch.no_grad():
        hidden = lm.cached(32).hidden_at(whole, lengths, rows, at - 1, prompt_lengths)
        log_probs, _ = lm.token_log_probs(hidden, torch.as_tensor(whole[rows, at]))
    report = warm_start(lm, ROWS, **NO_SPLIT, learning_rate=1e-2)
    assert report.loss_before == pytest.approx(-log_probs.mean().item(), rel=1e-4)
    assert report.loss_after < 0.7 * report.loss_before


# Conversations: every answer is learned.

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": role, "content": content}
    for role, content in (
        ("system", "be brief"),
        ("user", "yes?"),
        ("assistant", "yes"),  # which is a part of the question, too
        ("user", "name a film"),
        ("assistant", "no <film>\nof note "),
        ("user", "why"),
        ("assistant", "天气"),
    )
]


def chat_model(path: Path, template: str, special: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> LanguageModel:
    save_chat_model(path, chat_tokenizer(special, template))
    return load_language_model(path, device="cpu")


def learned(lm: LanguageModel, rows: list[dict[str, Any]], **options: Any) -> tuple[list[int], list[bool]]:
    """What one row is made of, and which of its tokens have a label."""
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        collate = imitation._collate
        patch.setattr(imitation, "_collate", lambda *given: batches.append(collate(*given)) or batches[-1])
        warm_start(lm, rows, epochs=1, validation_share=0, **options)
    ids, labels = batches[0]["input_ids"][0], batches[0]["labels"][0]
    own = labels != imitation.IGNORED
    assert torch.equal(labels[own], ids[own])
    return ids.tolist(), own.tolist()


def test_the_answers_that_are_learned_are_those_that_the_template_marks(tmp_path):
    lm = chat_model(tmp_path / "chat", MARKED)
    marked = lm.tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids, own = learned(lm, [{"messages": TALK}])
    assert ids == marked["input_ids"][:-1]  # the template's line break behind the end
    assert own == [bool(mark) for mark in marked["assistant_masks"][:-1]]
    ids, last = learned(lm, [{"messages": TALK}], answers="last")
    assert last == [mark and i >= len(ids) - len("天气".encode()) - 1 for i, mark in enumerate(own)]
    in_memory = learned(lm, [TALK[:-1]], completions=["天气"])
    assert in_memory == (ids, own)


@pytest.mark.parametrize("name", ["llama 3", "gemma", "mistral", "plain"])
def test_the_answers_of_every_template_are_learned_with_their_ends(name, tmp_path):
    template, special, end = TEMPLATES[name]
    lm = chat_model(tmp_path / "chat", template, special)
    ids, own = learned(lm, [{"messages": TALK[1:]}])
    texts = "".join(lm.tokenizer.decode([i]) if mark else "|" for i, mark in zip(ids, own, strict=True))
    parts = [part for part in re.split(r"\|+", texts) if part]
    content = [m["content"].strip() if "trim" in template else m["content"] for m in TALK if m["role"] == "assistant"]
    expected = [text + end * (name != "plain") for text in content]
    if name == "plain":
        expected[-1] += end  # where its template ends no turn, the text ends
    assert "".join(lm.tokenizer.decode([i for i, mark in zip(ids, own, strict=True) if mark])) == "".join(expected)
    assert len(parts) >= 3


def test_answers_that_were_cut_are_not_learned(tmp_path):
    lm = chat_model(tmp_path / "chat", MARKED)
    ids, _ = learned(lm, [{"messages": TALK}])
    with pytest.warns(UserWarning, match="1 of 1 rows are longer"):
        shorter, own = learned(lm, [{"messages": TALK}], max_length=len(ids) - len("be briefyes?") + 6)
    text = lm.tokenizer.decode([i for i, mark in zip(shorter, own, strict=True) if mark])
    assert text == "no <film>\nof note <|im_end|>天气<|im_end|>"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"answers": "first"}, ValueError, "answers='first'"),
        ({"prompts": ["the film"], "completions": []}, ValueError, "0 completions of 1 prompts"),
        ({"prompts": ["the film"]}, ValueError, r"prompts\[0\] has no text in the column 'completion'"),
        ({"prompts": [{"prompt": "the", "completion": 3}]}, ValueError, r"prompts\[0\].*it is 3"),
        ({"prompts": [{"prompt": "the", "completion": " zebra"}]}, ValueError, r"prompts\[0\]: the tokenizer can't"),
        ({"prompts": lambda rng: "the film"}, TypeError, "no fixed rows"),
        ({"epochs": 0}, ValueError, "epochs=0"),
        ({"patience": 0}, ValueError, "patience=0"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate=0.0"),
        ({"max_length": 1000}, ValueError, "max_length=1000 is more than the model can read, 128"),
    ],
)
def test_what_does_not_fit_is_said_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        warm_start(tiny_language_model(), **{"prompts": ROWS, "validation_share": 0, **arguments})


def test_a_frozen_model_is_refused():
    lm = tiny_language_model()
    lm.model.requires_grad_(False)
    with pytest.raises(ValueError, match="are frozen.*trainable_copy"):
        warm_start(lm, ROWS)


def test_the_command_writes_a_model_and_says_how_it_went(tmp_path: Path):
    tiny_language_model().save_pretrained(tmp_path / "start")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    app = typer.Typer()
    add_warm_start(app, Console(), nullcontext)
    where = [str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "start"), "--output", str(tmp_path / "warm")]
    result = CliRunner().invoke(app, [*where, "--learning-rate", "1e-3", "--device", "cpu", "--no-progress"])
    assert result.exit_code == 0, result.output
    assert "Perplexity per completion token" in result.output
    assert load_language_model(str(tmp_path / "warm"), device="cpu").vocab_size == len(VOCABULARY)
