"""Sampling and its figures, against plain transformers forwards and hand computations."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import EOS, tiny_model, tiny_tokenizer
from written_texts import completed, written

from textgym.action_masks import masks_of
from textgym.envs import TextGenEnv
from textgym.evaluation import Evaluation, completion_log_probs, evaluate, score_tokens, token_log_probs
from textgym.language_model import LanguageModel, load_language_model
from textgym.metrics import bootstrap_interval, distinct_n, distinct_n_interval, repetition
from textgym.prompts.rows import PromptRow, PromptRows
from textgym.rewards import FunctionReward, PrefixBatch, as_reward
from textgym.sampling import SamplingSettings
from textgym.texts import token_texts

PROMPTS = ["the film is", "a story", "i love this great movie", "music"]


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel]:
    tokenizer = tiny_tokenizer()
    return LanguageModel(tiny_model("llama", seed=0), tokenizer), LanguageModel(tiny_model("llama", seed=1), tokenizer)


def words(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(completion.split())) for completion in completions]


@torch.no_grad()
def plain_log_prob(model: LanguageModel, ids: list[int], prompt_length: int, temperature: float) -> float:
    logits = model.model(input_ids=torch.tensor([ids])).logits[0] / temperature
    log_probs = logits.log_softmax(-1)
    return sum(float(log_probs[t - 1, ids[t]]) for t in range(prompt_length, len(ids)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_completion_log_probs_equal_a_plain_forward_of_each_text(
    models: tuple[LanguageModel, LanguageModel], temperature: float
) -> None:
    model, other = models
    batch = completed(model, PROMPTS, {"generator": torch.Generator().manual_seed(0)}, max_new_tokens=9)
    expected = [
        plain_log_prob(other, ids[:length].tolist(), int(start), temperature)
        for ids, length, start in zip(batch.input_ids, batch.lengths, batch.prompt_lengths, strict=True)
    ]
    np.testing.assert_allclose(completion_log_probs(other, batch, temperature), expected, atol=1e-4)


def test_a_model_has_no_kl_to_itself_and_some_to_another(models: tuple[LanguageModel, LanguageModel]) -> None:
    model, other = models
    same = evaluate(model, model, FunctionReward(words), PROMPTS * 8, max_new_tokens=8)
    np.testing.assert_allclose(same.kl, 0.0, atol=1e-4)
    different = evaluate(model, other, FunctionReward(words), PROMPTS * 8, max_new_tokens=8)
    assert different.kl.mean() > 0.5
    assert different.completions == same.completions  # the same seed samples the same texts


def test_figures_are_those_of_the_samples(models: tuple[LanguageModel, LanguageModel]) -> None:
    model, other = models
    result = evaluate(model, other, FunctionReward(words), PROMPTS * 4, max_new_tokens=6, batch_size=5, seed=3)
    assert len(result.completions) == 16
    assert result.scores.tolist() == [float(len(c.split())) for c in result.completions]
    figures = result.figures()
    assert figures["score"] == pytest.approx(np.mean(result.scores))
    assert figures["perplexity"] == pytest.approx(math.exp(-sum(result.ref_log_prob) / sum(result.lengths)))
    assert figures["eos_rate"] == np.mean(
        [length < 6 or ended for length, ended in zip(result.lengths, result.ended, strict=True)]
    )


@pytest.mark.parametrize("masking", [False, True])
def test_early_ends_are_what_they_are_in_the_environment(
    masking: bool, models: tuple[LanguageModel, LanguageModel]
) -> None:
    model, _ = models
    rows = [PromptRow(prompt, {}) for prompt in PROMPTS * 16]
    limits: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 4}
    masks = masks_of(SamplingSettings(**limits, action_masking=masking), model, None)
    batch = completed(model, rows, {"masks": masks, "generator": torch.Generator().manual_seed(0)}, **limits)
    early = [EOS in ids[:4] for ids in batch.completion_ids]
    assert any(early) != masking
    env = TextGenEnv(language_model=model, prompts=PROMPTS, reward=words, kl_coef=0.0, action_masking=masking, **limits)
    for row in (early.index(not masking), early.index(False), len(rows) - 1):
        env.reset(options={"prompt": rows[row].prompt})
        ends = [env.step(token)[2:4] for token in batch.completion_ids[row]]
        assert not any(map(any, ends[:-1]))
        assert ends[-1] == (bool(batch.finished[row]), not batch.finished[row])


def test_rows_hand_their_columns_to_the_reward_and_files_are_prompts(
    models: tuple[LanguageModel, LanguageModel], tmp_path: Path
) -> None:
    def wanted_words(prompts: list[str], completions: list[str], wanted: list[str]) -> list[float]:
        return [float(completion.split().count(word)) for completion, word in zip(completions, wanted, strict=True)]

    rows = [
        PromptRow(prompt, {"wanted": word}) for prompt, word in zip(PROMPTS, "good bad it the".split(), strict=True)
    ]
    results = [
        evaluate(*models, FunctionReward(wanted_words), prompts, max_new_tokens=16, seed=1)
        for prompts in (rows, PromptRows([{"prompt": row.prompt, **row.columns} for row in rows]))
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": row.prompt, **row.columns}) + "\n" for row in rows))
    results.append(evaluate(*models, FunctionReward(wanted_words), path, max_new_tokens=16, seed=1))
    for result in results:
        assert result.completions == results[0].completions
        assert result.scores.tolist() == [
            completion.split().count(row.columns["wanted"])
            for completion, row in zip(result.completions, rows, strict=True)
        ]


def test_several_completions_of_a_prompt_stand_together_and_differ(models: tuple[LanguageModel, LanguageModel]) -> None:
    done = []
    result = evaluate(
        *models, FunctionReward(words), PROMPTS, completions_per_prompt=6, max_new_tokens=8, batch_size=10,
        progress=lambda now, total: done.append((now, total)),
    )  # fmt: skip
    assert result.prompts == [prompt for prompt in PROMPTS for _ in range(6)]
    assert len(set(result.completions[:6])) > 1
    assert done == [(10, 24), (20, 24), (24, 24)]


def test_the_summary_has_the_figures_within_intervals_over_prompts(models: tuple[LanguageModel, LanguageModel]) -> None:
    result = evaluate(*models, FunctionReward(words), PROMPTS, completions_per_prompt=8, max_new_tokens=8)
    summary = result.summary(seed=4)
    figures = result.figures()
    assert summary.keys() == figures.keys() - {"score_std"}
    for name, estimate in summary.items():
        assert estimate.value == figures[name]
        assert estimate.low <= estimate.value <= estimate.high
    assert summary == result.summary(seed=4)
    groups = result.prompts
    assert summary["score"][1:] == bootstrap_interval(result.scores, rng=4, groups=groups)
    assert summary["distinct_2"][1:] == distinct_n_interval(result.completions, 2, groups=groups)
    # Perplexity: the same resamples of prompts, each evaluated as the figure is.
    rng = np.random.default_rng(4)
    ref, lengths = result.ref_log_prob.reshape(4, 8), result.lengths.reshape(4, 8)
    drawn = [rng.integers(4, size=4) for _ in range(2000)]
    perplexities = [math.exp(-ref[rows].sum() / lengths[rows].sum()) for rows in drawn]
    assert summary["perplexity"][1:] == pytest.approx(np.quantile(perplexities, [0.025, 0.975]), rel=1e-2)
    assert figures["distinct_1"] == distinct_n(result.completions, 1)
    assert figures["repetition"] == repetition(result.completions, 2)


def test_completions_of_a_single_prompt_still_have_an_interval(models: tuple[LanguageModel, LanguageModel]) -> None:
    result = evaluate(*models, FunctionReward(words), PROMPTS[:1], completions_per_prompt=20, max_new_tokens=8)
    score = result.summary()["score"]
    assert score.low < score.value < score.high


def test_an_evaluation_survives_json_to_the_last_bit(models: tuple[LanguageModel, LanguageModel]) -> None:
    result = evaluate(*models, FunctionReward(words), [*PROMPTS, 'über "das" 猫'], max_new_tokens=6, stop="film")
    again = Evaluation.from_json(result.to_json())
    for name in vars(result):
        ours, theirs = getattr(result, name), getattr(again, name)
        assert type(ours) is type(theirs)
        assert np.array_equal(ours, theirs)
    assert again.summary() == result.summary()
    assert again.settings["stop"] == ["film"]
    assert again.to_json() == result.to_json()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "expected an object with 'settings' and a list of 'texts'"),
        ('{"settings": {}, "texts": [{"prompt": 3}]}', r"texts\[0\] has 3 as 'prompt'"),
        ('{"settings": {}, "texts": [3]}', r"texts\[0\] has None as 'prompt'"),
        ('{"settings": {}, "texts": []}', "an evaluation needs at least one text"),
        ("{", "broken JSON"),
    ],
)
def test_other_json_is_no_evaluation(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Evaluation.from_json(text)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(
    models: tuple[LanguageModel, LanguageModel],
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "seed": 2, "batch_size": 16, "stop": ["good", "it was"]}
    stopped = evaluate(*models, FunctionReward(words), PROMPTS * 8, **settings)
    for completion, reason, length in zip(stopped.completions, stopped.finish_reasons, stopped.lengths, strict=True):
        first = re.match(r".*?(good|it was)", completion)
        assert (reason == "stop") == (first is not None)
        assert first is None or first.group() == completion
        assert reason != "length" or length == 12
    assert {"stop", "length"} <= set(stopped.finish_reasons)
    assert stopped.ended.tolist() == [reason != "length" for reason in stopped.finish_reasons]
    assert stopped.figures()["eos_rate"] == stopped.finish_reasons.count("eos") / 32
    # The figures are those of the cut texts.
    again = FunctionReward(words)(prompts=stopped.prompts, completions=stopped.completions)
    assert stopped.scores.tolist() == again


def test_a_stop_string_before_the_minimum_length_ends_nothing(models: tuple[LanguageModel, LanguageModel]) -> None:
    model, _ = models
    ids = model.tokenizer("the film good it was good")["input_ids"]
    for minimum, expected in ((0, " good"), (1, " good"), (2, " good it was good")):
        texts = written(model.vocabulary, ids[:2], ids[2:], stop="good", min_new_tokens=minimum)
        assert texts.batch(np.array([0])).completions == [expected]
        assert texts.finish_reasons == ["stop"]


def test_token_rewards_telescope_to_the_score_and_kl_is_that_of_each_token(
    models: tuple[LanguageModel, LanguageModel],
) -> None:
    model, other = models
    scored = score_tokens(model, other, FunctionReward(words), PROMPTS * 3, max_new_tokens=7, batch_size=5, seed=3)
    whole = evaluate(model, other, FunctionReward(words), PROMPTS * 3, max_new_tokens=7, batch_size=5, seed=3)
    assert [one.completion for one in scored] == whole.completions
    assert [one.finish_reason for one in scored] == whole.finish_reasons
    for one, score, kl in zip(scored, whole.scores, whole.kl, strict=True):
        assert one.prompt_score == 0.0
        assert one.score == score == one.rewards.sum()
        # Each token is a word here, and end-of-sequence none.
        assert one.rewards.tolist() == [float(token != "") for token in one.tokens]
        assert one.kl is not None
        assert one.kl.sum() == pytest.approx(kl, abs=1e-4)
        prompt_ids = model.encode(one.prompt)
        for t in range(len(one.token_ids)):
            ids = prompt_ids + one.token_ids[: t + 1]
            plain = [plain_log_prob(m, ids, len(ids) - 1, 1.0) for m in (model, other)]
            assert one.kl[t] == pytest.approx(plain[0] - plain[1], abs=1e-4)
        assert json.loads(json.dumps(one.to_dict()))["token_rewards"] == one.rewards.tolist()


def test_without_a_reference_there_is_no_kl_and_greedy_text_needs_no_seed(
    models: tuple[LanguageModel, LanguageModel],
) -> None:
    first, second = (
        score_tokens(models[0], None, FunctionReward(words), PROMPTS, max_new_tokens=5, deterministic=True, seed=seed)
        for seed in (0, 1)
    )
    assert [one.completion for one in first] == [one.completion for one in second]
    assert first[0].kl is None
    assert first[0].to_dict()["kl"] is None


def test_token_log_probs_sum_to_those_of_completions(models: tuple[LanguageModel, LanguageModel]) -> None:
    model, other = models
    batch = completed(model, PROMPTS, max_new_tokens=9)
    parts = token_log_probs(other, batch)
    assert [len(part) for part in parts] == batch.completion_lengths.tolist()
    np.testing.assert_allclose([part.sum() for part in parts], completion_log_probs(other, batch), atol=1e-9)


def test_token_texts_join_to_the_completion_even_where_a_character_is_made_of_several_tokens() -> None:
    model = load_language_model()
    prompt, text = model.encode("the film"), model.encode("the film is 猫 — très 🎬 good")
    batch = PrefixBatch(
        np.array([text]), np.array([len(text)]), np.array([len(prompt)]), np.array([False]), np.arange(1),
        ["the film"], {}, model.tokenizer,
    )  # fmt: skip
    tokens = token_texts(batch, 0)
    assert len(tokens) == len(text) - len(prompt)
    assert "".join(tokens) == batch.completions[0] == " is 猫 — très 🎬 good"
    assert tokens[0] == " is"
    assert "" in tokens  # bytes before a character is complete
    assert not any("\ufffd" in token for token in tokens)


def test_evaluating_twice_gives_the_same_bits_with_a_reward_model() -> None:
    model, reward = load_language_model(), as_reward(None)
    first, second = (
        evaluate(model, model, reward, ["the film is", "a story that"], max_new_tokens=6, seed=5) for _ in range(2)
    )
    assert first.to_json() == second.to_json()


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": "the film"}, TypeError, "'the film' is a single text"),
        ({"prompts": lambda rng: "a"}, TypeError, "prompts is a PromptFunction, which has no end"),
        ({"prompts": ["the film", ""]}, ValueError, r"prompts\[1\] is an empty text"),
        ({"prompts": ["the film", "   "]}, ValueError, "the tokenizer makes no token of the prompt '   '"),
        ({"prompts": ["the " * 100]}, ValueError, "a prompt of 100 tokens and max_new_tokens=32 .* context of 128"),
        ({"completions_per_prompt": 0}, ValueError, "completions_per_prompt=0 must be a whole number, at least 1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be a whole number, at least 1"),
        ({"min_new_tokens": 99}, ValueError, "min_new_tokens=99 is more than max_new_tokens=32"),
        ({"batch_size": 1.5}, TypeError, "batch_size=1.5 must be a whole number"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 must be a finite number at least 1e-06"),
        ({"max_prompt_tokens": 0}, ValueError, "max_prompt_tokens=0 must be a whole number, at least 1"),
        ({"stop": [""]}, ValueError, r"stop=\[''\] must be a non-empty string"),
    ],
)
def test_impossible_evaluations_are_refused_before_anything_is_sampled(
    models: tuple[LanguageModel, LanguageModel], options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        evaluate(*models, FunctionReward(words), **{"prompts": PROMPTS, **options})


def test_a_reference_with_other_tokens_is_refused(models: tuple[LanguageModel, LanguageModel]) -> None:
    with pytest.raises(ValueError, match="the reference embedded has another vocabulary than the model LlamaForCausal"):
        evaluate(models[0], load_language_model(), FunctionReward(words), PROMPTS)


def test_long_prompts_are_cut_on_the_left_as_in_the_environment(models: tuple[LanguageModel, LanguageModel]) -> None:
    model, reference = models
    prompts = ["the film is good " * 40, "the film"]
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer than max_prompt_tokens=5 and were cut on the left"):
        cut = evaluate(model, reference, FunctionReward(words), prompts, max_prompt_tokens=5, seed=3)
    end = model.tokenizer.decode(model.encode(prompts[0])[-5:])
    short = evaluate(model, reference, FunctionReward(words), [end, "the film"], seed=3)
    assert cut.completions == short.completions
    np.testing.assert_allclose(cut.ref_log_prob, short.ref_log_prob, atol=1e-6)
