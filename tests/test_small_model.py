"""A small model's tokens are the pieces it was made of."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch

from textgym.continuation import continuation_ids
from textgym.language_model import LanguageModel
from textgym.small_model import small_model

PIECES = [*"0123456789", "guess:", " ", ".", " higher.", " lower."]


def test_texts_are_divided_into_the_fewest_pieces_and_come_back() -> None:
    model = small_model(PIECES)
    text = "guess: 12. lower. 3. higher."
    assert model.tokenizer.tokenize(text) == ["guess:", " ", "1", "2", ".", " lower.", " ", "3", ".", " higher."]
    assert model.tokenizer.decode(model.encode(text)) == text
    assert model.tokenizer.tokenize("guess?")[0] not in PIECES
    both = continuation_ids(model.vocabulary, model.encode("guess:"), " 7. lower.")
    assert model.tokenizer.decode([*model.encode("guess:"), *both]) == "guess: 7. lower."


def test_models_of_one_seed_are_equal_and_others_differ() -> None:
    def weights(model: LanguageModel) -> torch.Tensor:
        return torch.cat([p.flatten() for p in model.model.parameters()])

    before = torch.get_rng_state()
    first = weights(small_model(PIECES, seed=3))
    assert torch.equal(first, weights(small_model(PIECES, seed=3)))
    assert not torch.equal(first, weights(small_model(PIECES, seed=4)))
    assert torch.equal(before, torch.get_rng_state())


def test_an_environment_runs_on_it() -> None:
    env = gym.make("TextGen-v0", language_model=small_model(PIECES), prompts=["guess:"], reward=len_of, stop=".")
    env.reset(seed=0)
    tokens = env.unwrapped.vocabulary.tokenizer.convert_tokens_to_ids([" ", "7", "."])
    for token in tokens:
        _, _, terminated, _, info = env.step(token)
    assert terminated
    assert info["finish_reason"] == "stop"
    assert info["completion"] == " 7."


def len_of(completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        (["a", "a"], {}, "pieces must be different texts.*'a' is there twice"),
        (["a", ""], {}, "none of them empty.*'' is one of these"),
        (["a", "<eos>"], {}, "or one of <pad>, <bos>, <eos>, <unk>"),
        ("abc", {}, "pieces='abc' must be"),
        (["a", "b"], {"hidden_size": 12, "heads": 4}, "hidden_size=12 must be a multiple of twice"),
        (["a", "b"], {"context": 1}, "context=1 must be a whole number, at least 2"),
    ],
)
def test_what_no_model_can_be_made_of_is_refused(pieces: list[str], options: dict[str, int], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        small_model(pieces, **options)
