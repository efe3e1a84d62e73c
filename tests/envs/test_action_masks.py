"""TextGen-v0 with many rows: which actions the masks allow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from text_envs import LANGUAGE_MODEL, MASKING, TOKENIZER, ids, make_vec, random_actions
from tiny_models import BOS, EOS, PAD, UNK, VOCABULARY, tiny_model

from textgym.language_model import LanguageModel

V = len(VOCABULARY)
GOOD, FILM = ids("good film")


def expected_mask(
    row: list[int], taken: int, options: dict[str, Any], temperature: float = 1.0
) -> tuple[set[int], list[tuple[int, float]]]:
    """Which tokens the options allow after a row of tokens, and the candidates with their probabilities, from the
    definition."""
    ordinary = [t for t in range(V) if t not in (PAD, BOS, UNK)]
    if taken < options.get("min_new_tokens", 0):
        ordinary.remove(EOS)
    with torch.no_grad():
        logits = LANGUAGE_MODEL.model(input_ids=torch.tensor([row])).logits[0, -1].double() / temperature
    weights = {t: float(logits[t].exp()) for t in ordinary}
    total = sum(weights.values())
    ranked = sorted(((w / total, t) for t, w in weights.items()), reverse=True)
    most = options.get("top_k", 0) or V
    allowed, mass = set(), 0.0
    for rank, (p, t) in enumerate(ranked):
        if rank < most and mass < options.get("top_p", 1.0):
            allowed.add(t)
        mass += p
    return allowed, [(t, p) for p, t in ranked]


@pytest.mark.parametrize("temperature", [1.0, 0.4, 3.0])
@pytest.mark.parametrize(
    "restriction",
    [
        {},
        {"min_new_tokens": 3},
        {"top_k": 5},
        {"top_k": 62},
        {"top_p": 0.7},
        {"top_p": 0.01},
        {"top_k": 6, "top_p": 0.8, "min_new_tokens": 2},
    ],
    ids=str,
)
def test_masks_allow_what_the_definition_says(restriction, temperature):
    envs = make_vec(3, action_masking=True, temperature=temperature, **restriction)
    rng = np.random.default_rng(0)
    observation, infos = envs.reset(seed=0)
    for _ in range(5):
        masks = envs.action_masks()
        assert masks.shape == (3, V)
        assert masks.dtype == bool
        assert masks.any(1).all()
        assert infos["action_mask"].dtype == np.int8
        np.testing.assert_array_equal(infos["action_mask"], masks)
        assert infos["_action_mask"].all()
        for i in range(3):
            row = observation["input_ids"][i][observation["attention_mask"][i] == 1].tolist()
            taken = len(row) - int(observation["prompt_length"][i, 0])
            allowed, _ = expected_mask(row, taken, restriction, temperature)
            assert set(np.flatnonzero(masks[i])) == allowed
        observation, *_, infos = envs.step(*random_actions(rng, envs))
    if restriction == {"top_p": 0.01}:
        assert (masks.sum(1) == 1).all()


def test_a_peaked_distribution_does_not_shrink_top_k():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(100)  # all the probability that float32 can tell from 1 is on one token
    envs = make_vec(2, language_model=LanguageModel(model, TOKENIZER), action_masking=True, top_k=10)
    envs.reset(seed=0)
    assert envs.action_masks().sum(1).tolist() == [10, 10]


def test_without_masking_there_are_no_masks():
    envs = make_vec(2)
    _, infos = envs.reset()
    assert "action_mask" not in infos
    assert "action_mask" not in envs.step(np.array([GOOD, FILM]))[4]
    with pytest.raises(ValueError, match="action_masking=True"):
        envs.action_masks()


def test_masks_belong_to_whoever_asked_for_them():
    envs = make_vec(2, **MASKING)
    _, infos = envs.reset(seed=0)
    first = envs.action_masks()
    infos["action_mask"][:] = 1
    first[:] = True
    assert not envs.action_masks().all()
    *_, later = envs.step(np.array([GOOD, FILM]))
    assert later["action_mask"] is not infos["action_mask"]


def test_restricting_by_the_model_works_without_a_penalty():
    envs = make_vec(2, kl_coef=0, action_masking=True, top_k=4)
    observation, infos = envs.reset(seed=0)
    row = observation["input_ids"][0][observation["attention_mask"][0] == 1].tolist()
    assert set(np.flatnonzero(infos["action_mask"][0])) == expected_mask(row, 0, {"top_k": 4})[0]
    assert "kl" not in envs.step(infos["action_mask"].argmax(1))[4]
