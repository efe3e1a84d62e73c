"""Ensembles, dropout, length, discount, running normalisation and routing: what each makes of other rewards' scores."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, text_batch
from tiny_agents import tiny_vector_env
from tiny_models import tiny_causal_reward_model, tiny_tokenizer
from torch import nn
from transformers import GPT2Config, GPT2ForSequenceClassification

from textgym.rewards import (
    CausalRewardModel,
    DiscountedPotential,
    Ensemble,
    FunctionReward,
    LengthDebiased,
    MonteCarloDropout,
    RewardError,
    Router,
    RunningNormalized,
    learn_from,
)

TOKENIZER = tiny_tokenizer()
PROMPTS = ["the film", "a plot", "i"]
COMPLETIONS = ["is good and funny .", "too slow", "love it !"]


def characters(completions, **columns):
    return [float(len(text)) for text in completions]


def words(completions, **columns):
    return [float(len(text.split())) for text in completions]


def never(completions, **columns):
    return [None] * len(completions)


def constant(value):
    return FunctionReward(lambda completions: [value] * len(completions), name=f"constant {value}")


def score(reward, completions=COMPLETIONS, **columns):
    return reward(prompts=["p"] * len(completions), completions=completions, **columns)


@pytest.fixture
def batch():
    return text_batch(TOKENIZER, PROMPTS, COMPLETIONS)


# --- ensembles


def test_aggregates_are_numpys_over_the_members(batch):
    members = [FunctionReward(characters), FunctionReward(words), constant(3.0)]
    values = np.stack([member.potentials(batch) for member in members])
    expected = {
        "mean": values.mean(0),
        "min": values.min(0),
        "mean-std": values.mean(0) - 0.7 * values.std(0),
        "mean-variance": values.mean(0) - 0.7 * values.var(0),
    }
    for aggregate, scores in expected.items():
        ensemble = Ensemble(members, aggregate, k=0.7)
        np.testing.assert_allclose(ensemble.potentials(batch), scores, rtol=1e-12)
        for row, (value, at) in enumerate(
            zip(ensemble.prefix_potentials(batch, all_lengths(batch)), all_lengths(batch), strict=True)
        ):
            assert len(value) == len(at)
            assert value[-1] == pytest.approx(scores[row])
    spread = Ensemble(members).spread(prompts=PROMPTS, completions=batch.completions)
    np.testing.assert_allclose(spread, values.std(0), rtol=1e-12)


def test_members_that_do_not_apply_are_left_out_of_an_ensemble():
    for aggregate in ("mean", "min", "mean-std", "mean-variance"):
        assert score(Ensemble([never, characters, never], aggregate), ["abc"]) == [3.0]
        assert score(Ensemble([never, never], aggregate), ["abc"]) == [None]
    assert Ensemble([never, never]).spread(prompts=[""], completions=["a"]) == [None]


def test_a_penalised_ensemble_never_scores_above_its_mean(batch):
    members = [FunctionReward(characters), FunctionReward(words)]
    mean = Ensemble(members, "mean").potentials(batch)
    for aggregate in ("min", "mean-std", "mean-variance"):
        assert (Ensemble(members, aggregate, k=2.0).potentials(batch) <= mean).all()


@pytest.mark.parametrize(
    ("made", "complaint"),
    [
        (
            lambda: Ensemble([words, "runs/model"]),
            r"members\[1\]='runs/model' must be a reward.*; as_reward\('runs/model'\)",
        ),
        (lambda: Ensemble("grammar"), "members='grammar' must be a list"),
        (lambda: Router("user", {"ann": "grammar"}), r"routes\['ann'\]='grammar' must be a reward.*; as_reward\("),
        (lambda: Router("user", {"ann": words}, default=3), "default=3 must be a reward, or a function .* of one$"),
        (lambda: RunningNormalized(None), r"reward=None must be a reward.*; as_reward\(None\) opens one"),
        (lambda: LengthDebiased(int), "reward is the class int; pass an instance"),
    ],
)
def test_what_is_made_of_rewards_takes_no_names_of_them(made, complaint):
    with pytest.raises(TypeError, match=complaint):
        made()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (([characters],), "at least two members, got 1"),
        (([characters, words], "max"), "aggregate='max' must be one of 'mean', 'min'"),
        (([characters, words], "mean-std", -1.0), "k=-1.0 must be a finite number at least 0"),
        (([characters, words], "mean-std", math.nan), "k=nan must be a finite number"),
    ],
)
def test_impossible_ensembles_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Ensemble(*arguments)


# --- dropout


def dropping_gpt2() -> CausalRewardModel:
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=2, n_positions=64, num_labels=1, pad_token_id=0,
        eos_token_id=2, bos_token_id=1, initializer_range=0.2, embd_pdrop=0.3, resid_pdrop=0.3, attn_pdrop=0.0,
    )  # fmt: skip
    return CausalRewardModel(GPT2ForSequenceClassification(config).eval(), TOKENIZER, append_eos=False)


def test_dropout_before_the_head_is_the_head_on_masked_features(batch):
    """With the masks recomputed and the head applied by hand."""
    reward = CausalRewardModel(tiny_causal_reward_model(), TOKENIZER, append_eos=False)
    unsure = MonteCarloDropout(reward, passes=5, head_dropout=0.4, aggregate="mean", seed=11)
    seen = []
    handle = reward.model.score.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    plain = reward.potentials(batch)
    handle.remove()
    hidden = torch.cat(seen)[-3:].numpy()  # (3, H)
    weights = reward.model.score.weight.detach().numpy()[0]
    expected = []
    for number in range(5):
        kept = np.random.default_rng([11, number, zlib.crc32(b"head")]).random(32) >= 0.4
        expected.append((hidden * kept / 0.6) @ weights)
    np.testing.assert_allclose(unsure.potentials(batch), np.mean(expected, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(reward.potentials(batch), plain, rtol=1e-6)  # and the model is as it was


@pytest.mark.parametrize("make", [dropping_gpt2, lambda: CausalRewardModel(tiny_causal_reward_model(), TOKENIZER)])
def test_dropout_scores_depend_on_the_text_alone(make):
    reward = make()
    unsure = MonteCarloDropout(reward, passes=4, head_dropout=0.2)
    batch = text_batch(TOKENIZER, PROMPTS, COMPLETIONS)
    at = all_lengths(batch)
    at_once = unsure.prefix_potentials(batch, at)
    for i, lengths in enumerate(at):
        for j, length in enumerate(lengths):
            alone = unsure.potentials(batch.at([i], [length]))[0]
            assert at_once[i][j] == pytest.approx(alone, abs=1e-4)
    np.testing.assert_allclose(unsure.potentials(batch), [row[-1] for row in at_once], atol=1e-4)


def test_layers_with_dropout_make_scores_spread_and_none_is_left_behind():
    reward = dropping_gpt2()
    plain = score(reward)
    unsure = MonteCarloDropout(reward, passes=6)
    spread = unsure.spread(prompts=["p"] * 3, completions=COMPLETIONS)
    assert min(spread) > 1e-3
    assert score(reward) == plain
    assert not any(module._forward_hooks for module in reward.model.modules())
    mean = MonteCarloDropout(reward, passes=6, aggregate="mean")
    np.testing.assert_allclose(np.array(score(mean)) - np.array(score(unsure)), spread, rtol=1e-9)


def test_dropout_needs_a_model_with_something_to_drop():
    llama = CausalRewardModel(tiny_causal_reward_model(), TOKENIZER)
    with pytest.raises(ValueError, match=r"has no dropout layers; give head_dropout=0.1"):
        MonteCarloDropout(llama)
    with pytest.raises(TypeError, match="'characters' has no model"):
        MonteCarloDropout(FunctionReward(characters))
    with pytest.raises(ValueError, match="passes=1 must be a whole number, at least 2"):
        MonteCarloDropout(llama, passes=1, head_dropout=0.1)
    with pytest.raises(ValueError, match=r"head_dropout=1.0 must be a finite number at least 0 and less"):
        MonteCarloDropout(llama, head_dropout=1.0)
    llama.model.head = llama.model.score
    llama.model.score = nn.Identity()
    del llama.model.score
    with pytest.raises(ValueError, match="no head called score or classifier"):
        MonteCarloDropout(llama, head_dropout=0.1)


# --- length


def test_the_measured_slope_is_numpys_and_leaves_no_correlation(batch):
    rng = np.random.default_rng(0)
    noise = {text: float(rng.normal()) for text in batch.completions}
    reward = FunctionReward(lambda completions: [0.3 * len(t.split()) + noise.get(t, 0.0) for t in completions])
    debiased = LengthDebiased(reward)
    assert debiased.uncalibrated() == [debiased]
    assert (2 * debiased).needs_calibration
    debiased.calibrate_on(batch)
    lengths = np.array([len(text.split()) for text in batch.completions])
    assert debiased.slope == pytest.approx(np.polyfit(lengths, reward.potentials(batch), 1)[0])
    assert np.cov(debiased.potentials(batch), lengths)[0, 1] == pytest.approx(0, abs=1e-12)
    assert not debiased.needs_calibration


@pytest.mark.parametrize("unit", ["words", "characters", "tokens"])
def test_each_unit_of_length_is_charged_the_slope(unit, batch):
    debiased = LengthDebiased(constant(1.0), slope=0.25, unit=unit)
    lengths = {
        "words": [len(text.split()) for text in batch.completions],
        "characters": [len(text) for text in batch.completions],
        "tokens": [len(ids) for ids in batch.completion_ids],
    }[unit]
    np.testing.assert_allclose(debiased.potentials(batch), 1 - 0.25 * np.array(lengths))
    called = debiased(prompts=batch.prompts, completions=batch.completions, completion_ids=batch.completion_ids)
    np.testing.assert_allclose(called, 1 - 0.25 * np.array(lengths))
    for row, values in enumerate(debiased.prefix_potentials(batch, all_lengths(batch))):
        assert values[0] == 1.0
        assert values[-1] == pytest.approx(1 - 0.25 * lengths[row])


def test_the_environment_measures_the_slope_on_the_reference_models_texts():
    debiased = LengthDebiased(words)
    env = tiny_vector_env(2, reward=debiased)
    env.reset(seed=0)
    assert debiased.slope == pytest.approx(1.0)
    assert debiased.state_dict()["slope"] == debiased.slope
    other = LengthDebiased(words)
    other.load_state_dict(debiased.state_dict())
    assert other.slope == debiased.slope
    env.close()


def test_length_debiasing_says_what_it_lacks(batch):
    with pytest.raises(RewardError, match="has no slope yet: give slope="):
        score(LengthDebiased(words))
    with pytest.raises(RewardError, match="needs completion_ids="):
        score(LengthDebiased(words, slope=1.0, unit="tokens"))
    with pytest.raises(RewardError, match="the 1 texts to measure the slope on have one length in words"):
        LengthDebiased(words).calibrate_on(batch.at([0], [2]))
    with pytest.raises(ValueError, match="unit='lines' must be one of 'words'"):
        LengthDebiased(words, unit="lines")
    with pytest.raises(ValueError, match="slope=inf must be a finite number"):
        LengthDebiased(words, slope=math.inf)
    assert score(LengthDebiased(never, slope=1.0), ["a"]) == [None]


# --- discount


def test_differences_are_ngs_shaping_terms(batch):
    gamma, inner = 0.8, FunctionReward(characters)
    phi = inner.prefix_potentials(batch, all_lengths(batch))
    discounted = DiscountedPotential(inner, gamma)
    for potentials, sums in zip(phi, discounted.prefix_potentials(batch, all_lengths(batch)), strict=True):
        shaping = gamma * potentials[1:] - potentials[:-1]
        np.testing.assert_allclose(np.diff(sums), shaping)
        # Discounted they telescope: this is why the optimal policies stay the same.
        discount = gamma ** np.arange(len(shaping))
        assert (discount * shaping).sum() == pytest.approx(gamma ** len(shaping) * potentials[-1] - potentials[0])
    np.testing.assert_allclose(
        discounted.potentials(batch), [s[-1] for s in discounted.prefix_potentials(batch, all_lengths(batch))]
    )
    # Only some prefixes, in any order.
    some = discounted.prefix_potentials(batch, [np.array([3, 1]), np.array([], dtype=int), np.array([0])])
    whole = discounted.prefix_potentials(batch, all_lengths(batch))
    assert some[0].tolist() == [whole[0][3], whole[0][1]]
    assert [some[1].tolist(), some[2].tolist()] == [[], [0.0]]


def test_without_a_discount_it_is_the_difference_from_the_prompt(batch):
    inner = FunctionReward(characters)
    np.testing.assert_allclose(DiscountedPotential(inner, 1.0).potentials(batch), inner.potentials(batch))


def test_discounted_potentials_need_tokens_and_a_discount():
    with pytest.raises(RewardError, match="needs the tokens of a text"):
        score(DiscountedPotential(words, 0.9))
    for gamma in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="gamma=.* must be a finite number greater than 0"):
            DiscountedPotential(words, gamma)


# --- running normalisation


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(-1000, 1000), max_size=8), max_size=6))
def test_running_statistics_are_those_of_everything_observed(batches):
    table = FunctionReward(lambda completions: [float(text) for text in completions], name="number")
    reward = RunningNormalized(table, warm_up=False)
    for values in batches:
        reward.observe(prompts=[""] * len(values), completions=[str(value) for value in values])
    seen = np.array([value for values in batches for value in values], dtype=float)
    if len(seen) > 1 and seen.std() > 0:
        np.testing.assert_allclose(score(reward, ["7"]), [(7 - seen.mean()) / seen.std()], rtol=1e-9, atol=1e-9)
    else:
        assert score(reward, ["7"]) == [7 - (seen.mean() if len(seen) else 0.0)]


def test_scoring_leaves_running_statistics_alone(batch):
    reward = RunningNormalized(characters, warm_up=False)
    before = reward.state_dict()
    reward.potentials(batch)
    reward.prefix_potentials(batch, all_lengths(batch))
    score(reward)
    assert reward.state_dict() == before


def test_running_statistics_begin_with_the_calibration_and_go_on_from_their_state():
    reward = RunningNormalized(characters)
    assert reward.uncalibrated() == [reward]
    reward.calibrate(np.array([1.0, 3.0, np.nan]))
    reward.observe(prompts=[""], completions=["ab" * 4])
    other = RunningNormalized(characters)
    other.load_state_dict(reward.state_dict())
    for some in (reward, other):
        some.observe(prompts=[""], completions=["ab"])
        values = np.array([1, 3, 8, 2])
        assert score(some, ["a"]) == pytest.approx([(1 - values.mean()) / values.std()])
    with pytest.raises(ValueError, match="another reward's"):
        other.load_state_dict(FunctionReward(characters).normalized(0, 1).state_dict())


# --- routing

ROWS = {"task": ["short", "long", "short"]}


def routed(**options):
    return Router("task", {"short": -FunctionReward(characters), "long": characters}, **options)


def test_each_row_gets_its_routes_reward(batch):
    reward = routed(normalise=False)
    batch.columns.update(ROWS)
    lengths = np.array([len(text) for text in batch.completions])
    expected = lengths * [-1, 1, -1]
    assert reward.potentials(batch).tolist() == expected.tolist()
    assert reward(prompts=PROMPTS, completions=batch.completions, **ROWS) == expected.tolist()
    for i, values in enumerate(reward.prefix_potentials(batch, all_lengths(batch))):
        plain = FunctionReward(characters).prefix_potentials(batch, all_lengths(batch))[i]
        assert values.tolist() == (plain * [-1, 1, -1][i]).tolist()


def test_a_route_is_called_with_its_own_rows_only(batch):
    seen = []

    def spy(prompts, completions, task, **columns):
        seen.append((prompts, task))
        return [0.0] * len(completions)

    reward = Router("task", {"long": spy}, default=words, normalise=False)
    batch.columns.update(ROWS)
    reward.potentials(batch)
    reward(prompts=PROMPTS, completions=COMPLETIONS, **ROWS)
    assert seen == [(["a plot"], ["long"])] * 2


def test_each_route_has_its_own_running_statistics():
    reward = routed()
    for part in reward.uncalibrated():
        part.calibrate(np.zeros(0))
    texts = ["a", "abcde", "abc"]
    learners = learn_from(reward, prompts=[""] * 3, completions=texts, columns=ROWS)
    assert [learner.count for learner in learners] == [2, 1]
    assert (learners[0].mean, learners[0].std) == (-2.0, 1.0)  # of -1 and -3
    assert reward(prompts=[""], completions=["abcd"], task=["short"]) == [-2.0]
    other = routed()
    other.load_state_dict(reward.state_dict())
    assert other.state_dict() == reward.state_dict()
    with pytest.raises(ValueError, match="has the routes"):
        Router("task", {"short": words, "other": words}).load_state_dict(reward.state_dict())


def test_routes_are_calibrated_on_their_own_texts(batch):
    batch.columns.update(ROWS)
    reward = routed()
    for part in reward.uncalibrated():
        part.calibrate_on(batch)
    # The longest text has the lowest of two scores; the only text of its route is its mean.
    np.testing.assert_allclose(reward.potentials(batch), [-1.0, 0.0, 1.0])


def test_a_missing_column_or_route_is_named(batch):
    with pytest.raises(RewardError, match=r"needs 'task', .* available: prompts, completions, user"):
        routed()(prompts=[""], completions=[""], user=["ann"])
    with pytest.raises(RewardError, match="needs 'task'"):
        routed().potentials(batch)
    with pytest.raises(RewardError, match=r"row 1 .*column 'task' is 'rhyme', which has no route; there are 'short'"):
        routed()(prompts=["", ""], completions=["", "x"], task=["long", "rhyme"])
    batch.columns["task"] = ["long", ["a"], "long"]
    batch.rows = np.array([5, 6, 7])
    with pytest.raises(RewardError, match=r"row 6 .*column 'task' is \['a'\]"):
        routed().potentials(batch)
    with pytest.raises(ValueError, match="routes is empty"):
        Router("task", {})


def test_an_error_inside_a_route_names_the_row_of_the_call(batch):
    bad = FunctionReward(lambda completions: [math.nan] * len(completions), name="bad")
    reward = Router("task", {"long": bad, "short": words}, normalise=False)
    with pytest.raises(RewardError, match=r"reward 'bad', row 1 "):
        reward(prompts=PROMPTS, completions=COMPLETIONS, **ROWS)
    batch.columns.update(ROWS)
    batch.rows = np.array([5, 6, 7])
    with pytest.raises(RewardError, match=r"reward 'bad', row 6 "):
        reward.potentials(batch)


def test_a_causal_model_in_a_route_keeps_its_cache(batch):
    model = CausalRewardModel(tiny_causal_reward_model(), TOKENIZER)
    batch.columns.update(ROWS)
    reward = Router("task", {"short": model}, default=words, normalise=False)
    plain = model.potentials(batch)
    np.testing.assert_allclose(reward.potentials(batch)[[0, 2]], plain[[0, 2]], atol=1e-5)
    assert reward.potentials(batch)[1] == 2.0
