"""Sampling and its figures, against plain transformers forwards and hand computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import EOS, tiny_model, tiny_tokenizer

from textgym.evaluation import completion_log_probs, evaluate
from textgym.generation import complete_rows
from textgym.language_model import LanguageModel
from textgym.prompts import PromptRow
from textgym.rewards import FunctionReward

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
    rows = [PromptRow(prompt, {}) for prompt in PROMPTS]
    batch = complete_rows(
        model, rows, [model.encode(p) for p in PROMPTS], max_new_tokens=9, generator=torch.Generator().manual_seed(0)
    )
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


def test_min_new_tokens_forbids_an_early_end(models: tuple[LanguageModel, LanguageModel]) -> None:
    model, _ = models
    rows = [PromptRow(prompt, {}) for prompt in PROMPTS * 16]
    starts = [model.encode(row.prompt) for row in rows]

    def early(min_new_tokens: int) -> int:
        batch = complete_rows(
            model, rows, starts, max_new_tokens=8, min_new_tokens=min_new_tokens,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return sum(EOS in ids[:4] for ids in batch.completion_ids)

    assert early(0) > 0
    assert early(4) == 0
