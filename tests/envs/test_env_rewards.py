"""TextGen-v0 as a single environment: what it pays, and rewards that fail, wait, and read columns."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_envs import (
    LANGUAGE_MODEL,
    PROMPTS,
    REWARD_MODEL,
    REWARDS,
    ids,
    make,
    phi,
    play,
    reference_log_probs,
    text_score,
)
from tiny_models import BOS, EOS, PAD, UNK, VOCABULARY, tiny_causal_reward_model, tiny_tokenizer
from written_texts import completed

from textgym.generation import complete, complete_texts
from textgym.prompts.opening import as_prompt_source
from textgym.rewards import Reward, RewardError
from textgym.rewards.models.causal import CausalRewardModel

V = len(VOCABULARY)
WORDS = list(range(4, V))
GOOD, FILM = ids("good film")
NAN, INF = float("nan"), float("inf")


# --- rewards


tokens_strategy = st.lists(st.sampled_from([*WORDS, *WORDS, EOS, UNK, PAD]), min_size=8, max_size=8)


@settings(max_examples=40)
@given(
    tokens=tokens_strategy,
    prompt=st.sampled_from(PROMPTS),
    reward=st.sampled_from(list(REWARDS)),
    reward_every=st.sampled_from([1, 2, 3, 7, 100, "end"]),
    kl_coef=st.sampled_from([0.0, 0.05, 2.0]),
    penalty=st.sampled_from([0.0, 0.3]),
)
def test_rewards_telescope_to_the_final_score(tokens, prompt, reward, reward_every, kl_coef, penalty):
    env = make(reward=REWARDS[reward], reward_every=reward_every, kl_coef=kl_coef, missing_eos_penalty=penalty)
    env.reset(options={"prompt": prompt})
    steps = play(env, tokens)
    taken = tokens[: len(steps)]
    infos = [step[-1] for step in steps]
    final, start = phi(reward, ids(prompt), taken), phi(reward, ids(prompt), [])
    worth = final if reward_every == "end" else final - start
    kl = sum(info["kl"] for info in infos) if kl_coef else 0.0
    missing = penalty if infos[-1]["finish_reason"] == "length" else 0.0
    tolerance = 1e-9 if reward == "function" else 1e-5
    assert sum(step[1] for step in steps) == pytest.approx(worth - kl_coef * kl - missing, abs=tolerance)
    assert sum(info["reward_model"] for info in infos) == pytest.approx(worth, abs=tolerance)
    assert infos[-1]["score"] == pytest.approx(final, abs=tolerance)


@pytest.mark.parametrize("reward", list(REWARDS))
@pytest.mark.parametrize("reward_every", [1, 3, "end"])
def test_each_reward_is_the_difference_of_scores_since_the_last_one(reward, reward_every):
    env = make(reward=REWARDS[reward], reward_every=reward_every, kl_coef=0)
    tokens = ids("film was very very dull but fine and")
    env.reset(options={"prompt": "the film"})
    got = [step[1] for step in play(env, tokens)]
    last = 0.0 if reward_every == "end" else phi(reward, ids("the film"), [])
    expected = []
    for count in range(1, 9):
        due = count == 8 or (reward_every != "end" and count % reward_every == 0)
        score = phi(reward, ids("the film"), tokens[:count]) if due else last
        expected.append(score - last)
        last = score
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.count_nonzero(got) == {1: 8, 3: 3, "end": 1}[reward_every]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("reported", [False, True])
def test_rewards_and_infos_follow_the_formula(estimator, temperature, masking, reported):
    env = make(
        kl_coef=0.3,
        kl_estimator=estimator,
        temperature=temperature,
        missing_eos_penalty=0.2,
        action_masking=masking,
        min_new_tokens=2,
    )
    _, info = env.reset(options={"prompt": "we love"})
    prompt, tokens = ids("we love"), ids("the music and script but the actor was")
    log_probs = -np.linspace(0.1, 4, 8) if reported else None
    steps = play(env, tokens, log_probs)

    masks = None
    if masking:
        masks = np.ones((8, V))
        masks[:, [PAD, BOS, UNK]] = 0
        masks[:2, EOS] = 0
        shown = [info["action_mask"], *(step[-1]["action_mask"] for step in steps[:-1])]
        np.testing.assert_array_equal(shown, masks)
    reference = reference_log_probs(prompt, tokens, temperature, masks)
    d = (0.0 if log_probs is None else log_probs) - reference
    kl = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}[estimator]
    scores = np.array([phi("function", prompt, tokens[:n]) for n in range(9)])
    penalty = np.eye(8)[7] * 0.2
    infos = [step[-1] for step in steps]
    np.testing.assert_allclose([i["ref_log_prob"] for i in infos], reference, atol=2e-5)
    np.testing.assert_allclose([i["kl"] for i in infos], kl, atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose([i["reward_model"] for i in infos], np.diff(scores), atol=1e-9)
    np.testing.assert_allclose([s[1] for s in steps], np.diff(scores) - 0.3 * kl - penalty, atol=2e-4, rtol=1e-4)


def test_a_token_chosen_against_the_mask_is_paid_for_and_not_an_infinite_loss():
    env = make(action_masking=True, min_new_tokens=4)
    env.reset(options={"prompt": "we love"})
    for count, token in enumerate([EOS, PAD, UNK]):
        *_, info = env.step(token)
        masks = np.ones((count + 1, V))
        masks[:, [PAD, BOS, UNK, EOS]] = 0
        masks[-1, token] = 1
        taken = [EOS, PAD, UNK][: count + 1]
        masks[range(count + 1), taken] = 1
        expected = reference_log_probs(ids("we love"), taken, 1.0, masks)[-1]
        assert info["ref_log_prob"] == pytest.approx(expected, abs=1e-4)


def test_a_reported_log_prob_holds_for_one_step():
    env = make()
    env.reset(options={"prompt": "story"})
    env.unwrapped.report_log_prob(-1.5)
    steps = play(env, [GOOD, FILM])
    for step, log_prob in zip(steps, [-1.5, 0.0], strict=True):
        assert step[-1]["kl"] == pytest.approx(log_prob - step[-1]["ref_log_prob"])
    env.unwrapped.report_log_prob(-1.5)
    env.reset()
    *_, info = env.step(GOOD)
    assert info["kl"] == pytest.approx(-info["ref_log_prob"])


@pytest.mark.parametrize("wrong", [0.5, float("nan"), -float("inf")])
def test_what_is_no_log_prob_is_refused(wrong):
    env = make()
    env.reset()
    with pytest.raises(ValueError, match=r"is not a log-probability \(finite, at most 0\)"):
        env.unwrapped.report_log_prob(wrong)


def test_the_same_text_pays_the_same_whatever_was_written_before():
    env = make(reward=REWARDS["composed"])
    paid = []
    for prompt in ("the film", "a great movie is", "the film"):
        env.reset(options={"prompt": prompt})
        paid.append([step[1] for step in play(env, [*ids("was good and funny"), EOS])])
    np.testing.assert_allclose(paid[0], paid[2], atol=1e-5)
    assert np.abs(np.subtract(paid[0], paid[1])).max() > 0.01


# --- rewards that fail, wait, and read columns


def raising(prompts, completions, **_):
    raise ZeroDivisionError("no words")


WRONG_REWARDS = {
    "raises": (raising, "'raising', row 0 .*raised ZeroDivisionError: no words"),
    "too many": (lambda prompts, **_: [0.0] * (len(prompts) + 1), "returned 2 scores for 1 completions"),
    "nan": (lambda prompts, **_: [NAN] * len(prompts), "row 0 .*returned float nan; expected one finite number"),
    "infinite": (lambda prompts, **_: np.full(len(prompts), INF), "returned float inf"),
    "text": (lambda prompts, **_: ["good"] * len(prompts), "returned str 'good'"),
    "no list": (lambda prompts, **_: "good", "returned str 'good', not a list"),
    "nothing": (lambda prompts, **_: None, "returned NoneType None, not a list"),
    "unknown column": (lambda prompts, answer, **_: [0.0] * len(prompts), "needs 'answer'"),
}


@pytest.mark.parametrize(("reward", "message"), WRONG_REWARDS.values(), ids=WRONG_REWARDS)
@pytest.mark.parametrize("reward_every", [1, "end"])
def test_a_reward_that_goes_wrong_is_a_reward_error(reward, message, reward_every):
    env = make(reward=reward, reward_every=reward_every)
    if reward_every == "end":
        env.reset()
    with pytest.raises(RewardError, match=message):
        env.reset() if reward_every == 1 else env.step(EOS)


def test_none_counts_as_zero():
    env = make(reward=lambda completions, **_: [None if len(c) < 6 else 2.0 for c in completions], kl_coef=0)
    env.reset(options={"prompt": "the film"})
    assert [step[1] for step in play(env, [GOOD, FILM, EOS])] == [0.0, 2.0, 0.0]


def test_a_reward_that_recovers_after_an_error_can_be_used_again():
    broken = [False]

    def moody(completions, **_):
        if broken[0]:
            raise OSError("the judge is out")
        return [float(len(c)) for c in completions]

    env = make(reward=moody, kl_coef=0)
    env.reset(options={"prompt": "the film"})
    broken[0] = True
    with pytest.raises(RewardError, match="the judge is out"):
        env.step(EOS)
    broken[0] = False
    env.reset(options={"prompt": "the film"})
    assert [step[1] for step in play(env, [GOOD, FILM, EOS])] == [5.0, 5.0, 0.0]


def test_asynchronous_rewards_are_waited_for():
    async def slow(prompts, completions, **_):
        await asyncio.sleep(0.001)
        return text_score(prompts, completions)

    paid = []
    for reward in (slow, text_score):
        env = make(reward=reward)
        env.reset(options={"prompt": "the film"})
        paid.append([step[1] for step in play(env, [GOOD, FILM, EOS])])
    assert paid[0] == paid[1]


def test_a_reward_sees_prompts_completions_token_ids_and_columns():
    seen = []

    def reward(prompts, completions, completion_ids, answer, **rest):
        seen.append((prompts, completions, completion_ids, answer, sorted(rest)))
        return [0.0] * len(prompts)

    env = make(prompts=[{"prompt": "the film", "answer": ("was", 2), "source": "x"}], reward=reward)
    env.reset()
    play(env, [GOOD, FILM, EOS])
    assert seen == [
        (["the film"], [""], [[]], [("was", 2)], ["source"]),
        (["the film"], [" good"], [[GOOD]], [("was", 2)], ["source"]),
        (["the film"], [" good film"], [[GOOD, FILM]], [("was", 2)], ["source"]),
        (["the film"], [" good film"], [[GOOD, FILM, EOS]], [("was", 2)], ["source"]),
    ]


@pytest.fixture
def samples(monkeypatch):
    """The batches of texts that an environment calibrates on, as they come."""
    batches = []

    def complete_and_note(*args, **kwargs):
        texts = complete_texts(*args, **kwargs)
        batches.append(texts.batch(np.arange(len(texts.lengths))))
        return texts

    monkeypatch.setattr("textgym.envs.calibration.complete_texts", complete_and_note)
    return batches


def test_normalized_rewards_are_calibrated_on_texts_of_the_reference_model(samples):
    reward: Reward = REWARD_MODEL.normalized()
    env = make(reward=3 * reward, reward_every="end", kl_coef=0, temperature=1.5)
    assert reward.needs_calibration
    env.reset(seed=0, options={"prompt": "the film"})
    assert not reward.needs_calibration
    assert reward.std != pytest.approx(1, abs=0.05), "normalising does nothing here"
    scores = np.concatenate([reward.potentials(batch) for batch in samples])
    assert len(scores) >= 200
    assert (scores.mean(), scores.std()) == pytest.approx((0, 1), abs=1e-5)

    # On texts that it has not seen, too.
    rows = list(as_prompt_source(PROMPTS)) * 100
    fresh = reward.potentials(completed(LANGUAGE_MODEL, rows, max_new_tokens=8, temperature=1.5))
    assert abs(fresh.mean()) < 0.2
    assert fresh.std() == pytest.approx(1, abs=0.15)

    steps = play(env, [GOOD, FILM, EOS])
    expected = 3 * (phi("causal", ids("the film"), [GOOD, FILM, EOS]) - reward.mean) / reward.std
    assert sum(step[1] for step in steps) == pytest.approx(expected, abs=1e-4)


def test_calibration_texts_are_such_as_the_environment_allows(samples):
    make(reward=REWARD_MODEL.normalized(), temperature=4.0, action_masking=True, min_new_tokens=3).reset()
    completions = [completion for batch in samples for completion in batch.completion_ids]
    assert not {token for completion in completions for token in completion} & {PAD, BOS, UNK}
    assert {len(completion) for completion in completions} == {4, 5, 6, 7, 8}  # the last token may end it

    samples.clear()
    make(reward=REWARD_MODEL.normalized(), temperature=1e-4).reset()
    for batch in samples:
        starts = [row[:n].tolist() for row, n in zip(batch.input_ids, batch.prompt_lengths, strict=True)]
        assert batch.completion_ids == complete(LANGUAGE_MODEL, starts, 8, deterministic=True)


def test_calibrating_is_reproducible_and_touches_no_random_state():
    numbers = []
    for _ in range(2):
        reward = REWARD_MODEL.normalized()
        env = make(reward=reward)
        state = torch.get_rng_state()
        _, info = env.reset(seed=3)
        assert torch.equal(state, torch.get_rng_state())
        numbers.append((reward.mean, reward.std, info["prompt"]))
    assert numbers[0] == numbers[1]
    assert numbers[0][2] == make().reset(seed=3)[1]["prompt"]


def test_a_reward_model_with_another_tokenizer_reads_the_text():
    other = tiny_tokenizer()
    other.add_tokens(["<other>"])
    model = tiny_causal_reward_model()
    model.resize_token_embeddings(65)
    reading, stepping = CausalRewardModel(model, other), CausalRewardModel(model, tiny_tokenizer())
    paid = []
    for reward in (reading, stepping):
        env = make(reward=reward, kl_coef=0)
        env.reset(options={"prompt": "the film"})
        paid.append([step[1] for step in play(env, [*ids("was very good ."), EOS])])
    np.testing.assert_allclose(paid[0], paid[1], atol=1e-5)
