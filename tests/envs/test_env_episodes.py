"""TextGen-v0 as a single environment: how episodes end, what they begin with, and seeds."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from text_envs import LANGUAGE_MODEL, TOKENIZER, ids, make, play
from tiny_models import BOS, CONTEXT, EOS, VOCABULARY, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgym.language_model import LanguageModel

V = len(VOCABULARY)
GOOD, FILM = ids("good film")


# --- how episodes end


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        ({}, [GOOD, EOS], "eos"),
        ({}, [EOS], "eos"),
        ({}, [GOOD] * 8, "length"),
        ({}, [GOOD] * 7 + [EOS], "eos"),
        ({"stop": "good film"}, [FILM, GOOD, FILM], "stop"),
        ({"stop": ["!", "bad ."]}, ids("the film was bad ."), "stop"),
        ({"stop": "d f"}, [GOOD, FILM], "stop"),  # inside two tokens
        ({"stop": "good"}, [FILM] * 7 + [GOOD], "stop"),  # with the last token of the budget
        ({"min_new_tokens": 3}, [EOS, GOOD, EOS, EOS], "eos"),
        ({"min_new_tokens": 8}, [EOS] * 8, "length"),
        ({"min_new_tokens": 3, "stop": "good"}, [GOOD, FILM, GOOD], "stop"),
        ({"min_new_tokens": 4, "stop": "good film"}, [FILM, GOOD, FILM, FILM, GOOD, FILM], "stop"),
        # A stop string that began before the minimum and is complete with it.
        ({"min_new_tokens": 3, "stop": "good film bad"}, ids("good film bad"), "stop"),
        ({"min_new_tokens": 4, "stop": "good film bad"}, ids("good film bad") + [FILM] * 5, "length"),
    ],
)
def test_why_an_episode_ends(options, tokens, reason):
    env = make(**options)
    env.reset(options={"prompt": "good film !"})  # the prompt's own stop strings don't count
    steps = play(env, [*tokens, *[FILM] * 9])
    assert len(steps) == len(tokens)
    _, _, terminated, truncated, info = steps[-1]
    assert (terminated, truncated) == (reason != "length", reason == "length")
    assert info["finish_reason"] == reason
    assert info["prompt"] == "good film !"
    kept = TOKENIZER.decode([*ids("good film !"), *tokens], skip_special_tokens=True)
    assert info["prompt"] + info["completion"] == kept
    for *_, terminated, truncated, info in steps[:-1]:
        assert not terminated
        assert not truncated
        assert "finish_reason" not in info


def test_stop_strings_are_looked_for_from_the_beginning_of_every_episode():
    env = make(stop="good")
    for _ in range(2):
        env.reset(options={"prompt": "the film"})
        assert len(play(env, [FILM] * 9)) == 8
        env.reset(options={"prompt": "the film"})
        assert len(play(env, [GOOD] * 8)) == 1


def test_a_stop_string_may_not_reach_into_the_prompt():
    env = make(stop="film good")
    env.reset(options={"prompt": "the film"})
    assert len(play(env, [GOOD, *[FILM] * 9])) == 8


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, as byte fallback does with characters a tokenizer lacks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("stop", ["。", "好。", "é", "🙂"])
def test_stop_strings_whose_characters_take_several_tokens(stop):
    tokenizer = byte_tokenizer()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=257, bos_token_id=None, eos_token_id=0, max_position_embeddings=64, **shape)
    )
    env = make(language_model=LanguageModel(model, tokenizer), stop=stop, max_new_tokens=20, prompts=["一"])
    env.reset()
    tokens = tokenizer("好好" + stop)["input_ids"]
    steps = play(env, [*tokens, *tokens])
    assert len(steps) == len(tokens)
    assert steps[-1][-1]["finish_reason"] == "stop"
    assert steps[-1][-1]["completion"] == "好好" + stop


def test_the_missing_eos_penalty_is_paid_where_the_budget_ran_out_and_only_there():
    for tokens, penalty in [([GOOD] * 8, 0.7), ([GOOD, FILM, EOS], 0.0)]:
        paid = {}
        for value in (0.0, 0.7):
            env = make(missing_eos_penalty=value)
            env.reset(options={"prompt": "story"})
            paid[value] = [step[1] for step in play(env, tokens)]
            infos = [step[-1].get("missing_eos_penalty") for step in play_infos(env, tokens)]
            assert infos == ([None] * len(tokens) if not value else [0.0] * (len(tokens) - 1) + [penalty])
        expected = [0.0] * (len(tokens) - 1) + [penalty]
        np.testing.assert_allclose(np.subtract(paid[0.0], paid[0.7]), expected, atol=1e-12)


def play_infos(env, tokens):
    env.reset(options={"prompt": "story"})
    return play(env, tokens)


def test_padding_with_end_of_sequence_changes_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"
    shared = make(language_model=LanguageModel(LANGUAGE_MODEL.model, tokenizer), min_new_tokens=3)
    apart = make(min_new_tokens=3)
    assert shared.unwrapped.tokenizer.pad_token_id == EOS
    tokens = [GOOD, EOS, EOS, FILM, EOS]
    observations = [env.reset(options={"prompt": "story"})[0] for env in (shared, apart)]
    assert (observations[0]["input_ids"] == EOS).sum() > 0
    for mine, other in zip(play(shared, tokens), play(apart, tokens), strict=True):
        real = mine[0]["attention_mask"] == 1
        assert (mine[0]["attention_mask"] == other[0]["attention_mask"]).all()
        assert (mine[0]["input_ids"][real] == other[0]["input_ids"][real]).all()
        assert mine[1:] == other[1:]


# --- prompts


LONG = "this was a very very slow and dull film but the end is great"  # 14 tokens


def test_long_prompts_are_cut_on_the_left_with_one_warning_when_they_are_loaded():
    with pytest.warns(UserWarning, match="14 tokens is longer than max_prompt_tokens=5, as are 1 others of 3") as told:
        env = make(prompts=[LONG, "story", f"so {LONG}"], max_prompt_tokens=5)
    assert len(told) == 1
    for _ in range(4):  # another warning would fail the test
        observation, info = env.reset()
        if info["prompt"] != "story":
            assert observation["prompt_length"] == [5]
            assert observation["input_ids"][:5].tolist() == ids("but the end is great")
            assert info["prompt"] == "but the end is great"


def test_a_long_prompt_that_comes_later_is_cut_with_one_warning():
    env = make(prompts=["story"], max_prompt_tokens=5)
    with pytest.warns(UserWarning, match="14 tokens is longer than max_prompt_tokens=5"):
        env.reset(options={"prompt": LONG})
    assert env.reset(options={"prompt": LONG})[1]["prompt"] == "but the end is great"


def test_long_prompts_are_an_error_on_request():
    with pytest.raises(ValueError, match="14 tokens is longer than max_prompt_tokens=5.*raise max_prompt_tokens"):
        make(prompts=["story", LONG], max_prompt_tokens=5, prompt_overflow="error")
    env = make(prompts=["story"], max_prompt_tokens=5, prompt_overflow="error")
    for _ in range(2):
        with pytest.raises(ValueError, match="14 tokens is longer than max_prompt_tokens=5"):
            env.reset(options={"prompt": LONG})


def test_the_first_token_survives_the_cut_where_it_is_beginning_of_sequence():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    with pytest.warns(UserWarning, match="15 tokens"):
        env = make(language_model=LanguageModel(LANGUAGE_MODEL.model, tokenizer), prompts=[LONG], max_prompt_tokens=4)
    observation, _ = env.reset()
    assert observation["input_ids"][:4].tolist() == [BOS, *ids("end is great")]


def test_the_budget_of_the_prompt_is_what_the_context_leaves():
    with pytest.raises(ValueError, match=f"together more than the model's context of {CONTEXT}"):
        make(max_prompt_tokens=100, max_new_tokens=29)
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        make(max_prompt_tokens=None, max_new_tokens=CONTEXT)
    widths = {
        new: make(max_prompt_tokens=None, max_new_tokens=new).observation_space["input_ids"].shape[0]
        for new in (8, 100)
    }
    assert widths == {8: 64 + 8, 100: CONTEXT}


def test_reset_options_choose_the_prompt():
    env = make()
    observation, info = env.reset(options={"prompt": "fresh music"})
    assert info == {"prompt": "fresh music"}
    assert observation["input_ids"][: observation["prompt_length"][0]].tolist() == ids("fresh music")


@pytest.mark.parametrize("prompt", ["", 3, ["a", "b"], [""]])
def test_reset_refuses_what_is_no_prompt(prompt):
    with pytest.raises((ValueError, TypeError), match="options\\['prompt'\\]|must be"):
        make().unwrapped.reset(options={"prompt": prompt})


def test_unknown_reset_options_are_errors():
    with pytest.raises(ValueError, match=r"unknown reset options \['promt'\]; known are 'prompt'"):
        make().unwrapped.reset(options={"promt": "the film"})


@pytest.mark.parametrize("prompts", [[], ["fine", ""], "the film", [3], [{"text": "film"}], 7])
def test_wrong_prompts_are_errors_when_the_environment_is_made(prompts):
    with pytest.raises((ValueError, TypeError), match="prompt"):
        make(prompts=prompts)


def test_a_prompt_without_tokens_is_an_error():
    with pytest.raises(ValueError, match="the tokenizer makes no token of the prompt '   '"):
        make(prompts=["   "]).reset()


# --- seeds


def prompts_of(env: gym.Env, seeds: list[int | None]) -> list[str]:
    return [env.reset(seed=seed)[1]["prompt"] for seed in seeds]


def test_a_seed_repeats_the_prompts_and_without_one_they_go_on():
    many = [f"{word} film" for word in VOCABULARY[4:]]
    runs = [prompts_of(make(prompts=many), [seed, *[None] * 9]) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 5
    env = make(prompts=many)
    assert prompts_of(env, [3, None, None]) == prompts_of(env, [3, None, None]) == runs[0][:3]


def test_the_seed_option_is_that_of_the_first_reset():
    many = [f"{word} film" for word in VOCABULARY[4:]]
    expected = prompts_of(make(prompts=many), [5, None, None])
    assert prompts_of(make(prompts=many, seed=5), [None, None, None]) == expected
    assert prompts_of(make(prompts=many, seed=6), [5, None, None]) == expected


def test_without_any_seed_runs_differ():
    many = [f"{a} {b}" for a in VOCABULARY[4:] for b in VOCABULARY[4:]]
    assert prompts_of(make(prompts=many), [None] * 4) != prompts_of(make(prompts=many), [None] * 4)


def test_the_random_numbers_are_where_gymnasium_looks_for_them():
    env = make(prompts=lambda rng: f"film {VOCABULARY[rng.integers(4, V)]}")
    env.reset(seed=11)
    assert env.unwrapped.np_random_seed == 11
    twin = np.random.Generator(np.random.PCG64(11))
    twin.integers(4, V)
    assert env.unwrapped.np_random.random() == twin.random()
