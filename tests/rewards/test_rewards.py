"""The reward protocol: functions, arithmetic, None, errors, asynchronous functions, prefixes."""

from __future__ import annotations

import asyncio
import copy
import functools
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, prefix_batch, text_batch
from tiny_models import EOS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from textgym.rewards import FunctionReward, PrefixBatch, Reward, RewardError, as_reward

TOKENIZER = tiny_tokenizer()
PROMPTS = ["the film", "a plot", "i"]
COMPLETIONS = ["is good and funny .", "too slow", "love it !"]


def length(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou" for c in completion) / 10 for completion in completions]


def even_or_none(prompts, completions, **columns):
    return [None if len(completion) % 2 else len(completion) / 2 for completion in completions]


@pytest.fixture
def batch() -> PrefixBatch:
    return text_batch(TOKENIZER, PROMPTS, COMPLETIONS)


def score(reward, completions=COMPLETIONS, prompts=None, **columns):
    return reward(prompts=prompts or ["p"] * len(completions), completions=completions, **columns)


# --- functions


def test_a_function_gets_everything_as_keyword_lists(batch):
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [0.0] * 3

    batch.columns["answer"] = [1, 2, 3]
    FunctionReward(reward).potentials(batch)
    assert seen == {
        "prompts": PROMPTS,
        "completions": [" is good and funny .", " too slow", " love it !"],
        "completion_ids": TOKENIZER(COMPLETIONS)["input_ids"],
        "answer": [1, 2, 3],
    }


def test_a_function_without_kwargs_gets_what_it_names(batch):
    batch.columns["answer"] = [1, 2, 3]

    def reward(completions, answer, weight=2):
        return [a * weight for a in answer]

    assert FunctionReward(reward).potentials(batch).tolist() == [2, 4, 6]


def test_a_missing_column_is_named_with_those_there_are(batch):
    batch.columns["source"] = ["x"] * 3

    def graded(completions, answer, **columns):
        return [0.0] * len(completions)

    with pytest.raises(
        RewardError,
        match=r"'graded': needs 'answer', .* available: prompts, completions, completion_ids, source",
    ):
        FunctionReward(graded).potentials(batch)


def test_trl_reward_functions_run_unchanged(batch):
    rewards = pytest.importorskip("trl.rewards")
    ids = TOKENIZER(COMPLETIONS)["input_ids"]  # 5, 2 and 3 tokens
    overlong = as_reward(rewards.get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2))
    assert overlong.name == "soft_overlong_punishment_reward"
    assert overlong.potentials(batch).tolist() == [-1.0, 0.0, -0.5]  # equation 13 of the DAPO paper
    assert overlong.potentials(batch).tolist() == overlong.fn(completion_ids=ids)
    repetition = rewards.get_repetition_penalty_reward(ngram_size=1)
    repeated = text_batch(TOKENIZER, ["the", "a"], ["very very very very", "good film"])
    assert as_reward(repetition).potentials(repeated).tolist() == [-0.75, 0.0]


@pytest.mark.parametrize(
    "scores",
    [
        [1, 2.5, True],
        (1, 2.5, 1),
        np.array([1, 2.5, 1]),
        np.array([1, 2.5, 1], dtype=np.float16),
        np.array([1, 2.5, 1], dtype=object),
        [np.float32(1), np.float64(2.5), np.bool_(True)],
        torch.tensor([1, 2.5, 1]),
        torch.tensor([1, 2.5, 1], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(1)],
    ],
)
def test_scores_may_be_lists_arrays_or_tensors_of_numbers(scores):
    assert score(FunctionReward(lambda **_: scores)) == [1.0, 2.5, 1.0]


@pytest.mark.parametrize(
    ("scores", "complaint"),
    [
        ([1.0, math.nan, 0.0], "row 1 .*' too slow'.*returned float nan"),
        ([1.0, 2.0, math.inf], "row 2 .*' love it !'.*returned float inf"),
        ([1.0, "0.5", 2.0], "row 1 .*returned str '0.5'"),
        ([[1.0], 2.0, 3.0], r"row 0 .*returned list \[1.0\]"),
        ([10**400, 2.0, 3.0], "row 0 .*returned int 1000"),
        (np.array([1.0, np.nan, 3.0]), "row 1 .*returned float nan"),
        (torch.tensor([1.0, 2.0, -torch.inf]), "row 2 .*returned float -inf"),
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([], "returned 0 scores for 3 completions"),
        (np.zeros((3, 1)), r"returned an array of shape \(3, 1\)"),
        (torch.tensor(1.0), r"returned an array of shape \(\)"),
        (1.0, "returned float 1.0, not a list"),
        (None, "returned NoneType None, not a list"),
        ("abc", "returned str 'abc', not a list"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "returned dict .*, not a list"),
        ((s for s in [1.0, 2.0, 3.0]), "returned generator .*, not a list"),
    ],
)
def test_wrong_scores_raise_naming_reward_row_and_text(batch, scores, complaint):
    def suspicious(**kwargs):
        return scores

    for reward in (FunctionReward(suspicious), suspicious + FunctionReward(length)):
        with pytest.raises(RewardError, match=rf"reward 'suspicious'.*{complaint}.*expected one finite number or None"):
            reward.potentials(batch)
    with pytest.raises(RewardError, match="suspicious"):
        score(FunctionReward(suspicious))


def test_errors_name_the_environment_row_and_a_short_piece_of_text():
    words = ["very"] * 50
    batch = text_batch(TOKENIZER, ["the"], [" ".join(words)])
    batch.rows[:] = 17
    with pytest.raises(RewardError) as caught:
        FunctionReward(lambda completions, **_: [math.nan], name="broken").potentials(batch)
    error = caught.value
    assert (error.reward, error.row, error.completion) == ("broken", 17, " very" * 50)
    shown = str(error).partition("(completion ")[2].partition("): ")[0]
    assert shown.startswith("' very very")
    assert len(shown) <= 60
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_an_exception_in_the_function_is_chained(batch):
    def careless(completions, **columns):
        return [1 / 0 for _ in completions]

    with pytest.raises(RewardError, match=r"'careless', row 0 .*raised ZeroDivisionError: .*batch of 3") as caught:
        FunctionReward(careless).potentials(batch)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    class Careless(Reward):
        def __call__(self, *, prompts, completions, **columns):
            raise KeyError("answer")

    with pytest.raises(RewardError, match=r"'Careless', row 0 .*raised KeyError: 'answer'"):
        Careless().potentials(batch)


# --- asynchronous functions


async def patient(prompts, completions, **columns):
    await asyncio.sleep(0)
    return length(prompts, completions)


def test_async_functions_are_waited_for():
    assert score(FunctionReward(patient)) == length(None, COMPLETIONS)
    assert score(FunctionReward(lambda **kwargs: patient(**kwargs))) == length(None, COMPLETIONS)


def test_async_functions_run_where_a_loop_is_running_already():
    async def notebook():
        return score(FunctionReward(patient))

    assert asyncio.run(notebook()) == length(None, COMPLETIONS)


def test_async_functions_share_one_loop_so_connections_stay_open():
    loops = []

    async def connected(completions, **columns):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    score(FunctionReward(connected))
    score(FunctionReward(connected))
    assert loops[0] is loops[1]


def test_async_functions_may_call_async_rewards():
    inner = FunctionReward(patient)

    async def outer(prompts, completions, **columns):
        return inner(prompts=prompts, completions=completions)

    assert score(FunctionReward(outer)) == length(None, COMPLETIONS)


def test_an_exception_in_an_async_function_is_chained():
    async def failing(**kwargs):
        await asyncio.sleep(0)
        raise ConnectionError("no route")

    for reward in (failing, FunctionReward(failing) + 0):
        with pytest.raises(RewardError, match=r"'failing'.*raised ConnectionError: no route") as caught:
            score(as_reward(reward))
        assert isinstance(caught.value.__cause__, ConnectionError)


# --- arithmetic

A, B = FunctionReward(length), FunctionReward(vowels)
EXPRESSIONS = {
    "length + vowels": (A + B, lambda a, b: a + b),
    "length - vowels": (A - B, lambda a, b: a - b),
    "length * vowels": (A * B, lambda a, b: a * b),
    "0.5 * length + 0.5 * vowels": (0.5 * A + 0.5 * B, lambda a, b: 0.5 * a + 0.5 * b),
    "length - (vowels - 2)": (A - (B - 2), lambda a, b: a - (b - 2)),
    "3 - (length + vowels)": (3 - (A + B), lambda a, b: 3 - (a + b)),
    "-(length + 1)": (-(A + 1), lambda a, b: -(a + 1)),
    "1 + length": (1 + A, lambda a, b: 1 + a),
    "(length + 1) / 4": ((A + 1) / 4, lambda a, b: (a + 1) / 4),
    "2 * (length / 3)": (2 * (A / 3), lambda a, b: 2 * (a / 3)),
    "length * (vowels * length)": (A * (B * A), lambda a, b: a * (b * a)),
    "(length - vowels).clip(0, 9.5)": ((A - B).clip(0, 9.5), lambda a, b: np.clip(a - b, 0, 9.5)),
    "length.normalized(5, 2)": (A.normalized(5, 2), lambda a, b: (a - 5) / 2),
    "2 * length": (np.float64(2) * A, lambda a, b: 2 * a),
    "length + 3": (A + np.int64(3), lambda a, b: a + 3),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_arithmetic_is_that_of_the_scores(name, batch):
    reward, expected = EXPRESSIONS[name]
    assert reward.name == name
    np.testing.assert_allclose(reward.potentials(batch), expected(A.potentials(batch), B.potentials(batch)), rtol=1e-12)
    np.testing.assert_allclose(score(reward), expected(np.array(score(A)), np.array(score(B))), rtol=1e-12)
    at = [np.array([0, 2, 5]), np.array([], dtype=int), np.array([1])]
    parts = zip(A.prefix_potentials(batch, at), B.prefix_potentials(batch, at), strict=True)
    for got, (a, b) in zip(reward.prefix_potentials(batch, at), parts, strict=True):
        np.testing.assert_allclose(got, expected(a, b), rtol=1e-12)


def test_plain_callables_combine_from_either_side(batch):
    for reward in (A + vowels, vowels + A):
        np.testing.assert_allclose(reward.potentials(batch), A.potentials(batch) + B.potentials(batch))
    assert (length - B).name == "length - vowels"
    assert (functools.partial(length) * B).name == "length * vowels"


def test_the_sum_of_a_list_is_a_reward(batch):
    np.testing.assert_allclose(sum([A, B, A]).potentials(batch), 2 * A.potentials(batch) + B.potentials(batch))


def test_division_is_by_numbers_only():
    for divide in (lambda: A / B, lambda: 1 / A, lambda: A / length, lambda: length / A):
        with pytest.raises(TypeError, match=r"can't divide by the reward '(length|vowels)'"):
            divide()
    with pytest.raises(ZeroDivisionError, match="'length' divided by zero"):
        A / 0


def test_rewards_combine_with_rewards_callables_and_finite_numbers_only():
    for other in ("text", None, [1.0], {}):
        for combine in (lambda o: A + o, lambda o: o - A, lambda o: A * o, lambda o: A / o):
            with pytest.raises(TypeError, match=r"rewards combine with rewards, functions|can't divide by"):
                combine(other)
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            A * number
        with pytest.raises(ValueError, match="finite"):
            number + A


def test_overflow_is_an_error(batch):
    with pytest.raises(RewardError, match=r"'1e\+308 \* length': overflows float64"):
        (1e308 * A).potentials(batch)


@pytest.mark.parametrize("bounds", [(1, 1), (2, 1), (0, math.inf), (math.nan, 1)])
def test_clip_needs_finite_increasing_bounds(bounds):
    with pytest.raises(ValueError, match="low|high"):
        A.clip(*bounds)


# --- None

NONE_EXPRESSIONS = [
    # reward, its score where even_or_none is None and length is 3, the potential there
    (FunctionReward(even_or_none), None, 0.0),
    (2 * FunctionReward(even_or_none), None, 0.0),
    (FunctionReward(even_or_none) / 2, None, 0.0),
    (FunctionReward(even_or_none) * A, None, 0.0),
    (FunctionReward(even_or_none).clip(1, 2), None, 0.0),
    (FunctionReward(even_or_none).normalized(1, 2), None, 0.0),
    (even_or_none + A, 3.0, 3.0),
    (A - FunctionReward(even_or_none), 3.0, 3.0),
    (even_or_none + FunctionReward(even_or_none), None, 0.0),
    (FunctionReward(even_or_none) + 5, 5.0, 5.0),
    (5 - FunctionReward(even_or_none), 5.0, 5.0),
]


@pytest.mark.parametrize(("reward", "expected", "potential"), NONE_EXPRESSIONS, ids=lambda x: getattr(x, "name", ""))
def test_none_adds_nothing_and_otherwise_stays_none(reward, expected, potential):
    assert score(reward, ["abc"]) == [expected]
    batch = text_batch(TOKENIZER, ["the"], ["it"])  # the completion is " it", 3 characters
    assert reward.potentials(batch).tolist() == [potential]
    assert reward.prefix_potentials(batch, [np.array([1])])[0].tolist() == [potential]


# --- normalising


def test_calibration_gives_mean_0_and_std_1_with_the_biased_variance(batch):
    reward = A.normalized()
    assert reward.needs_calibration
    reward.calibrate(np.array([1.0, 3.0]))  # biased standard deviation 1, the unbiased one is 1.41
    assert (reward.mean, reward.std) == (2.0, 1.0)
    assert not reward.needs_calibration
    reward = A.normalized()
    reward.calibrate_on(batch)
    values = reward.potentials(batch)
    assert values.mean() == pytest.approx(0)
    assert values.std() == pytest.approx(1)


def test_rows_that_do_not_apply_are_left_out_of_calibration():
    batch = text_batch(TOKENIZER, ["a"] * 3, ["it", "of", "cast"])  # " it" and " of" have 3 characters, " cast" 5
    reward = FunctionReward(lambda completions, **_: [None if c == " of" else len(c) for c in completions])
    normalized = reward.normalized()
    normalized.calibrate_on(batch)
    assert (normalized.mean, normalized.std) == (4.0, 1.0)
    normalized.calibrate_on(batch.at([0], [1]), batch.at([1, 2], [1, 1]))
    assert (normalized.mean, normalized.std) == (4.0, 1.0)


def test_uncalibrated_parts_are_found_inner_ones_first(batch):
    inner = A.normalized()
    reward = (0.5 * inner + B + inner.clip(-1, 1)).normalized() - B.normalized(0, 1)
    outer = reward.parts[0]
    assert reward.uncalibrated() == [inner, outer]
    for part in reward.uncalibrated():
        part.calibrate_on(batch)
    assert not reward.needs_calibration
    assert reward.uncalibrated() == []
    assert not A.needs_calibration


def test_use_before_calibration_says_what_to_do(batch):
    reward = 0.5 * A.normalized()
    for use in (
        lambda: reward.potentials(batch),
        lambda: reward.prefix_potentials(batch, all_lengths(batch)),
        lambda: score(reward),
    ):
        with pytest.raises(RewardError, match=r"'length.normalized\(\)': is not calibrated: .*mean=.*std="):
            use()


def test_calibration_needs_scores_that_differ():
    for scores in ([2.0, 2.0], [0.1] * 10):
        with pytest.raises(RewardError, match="no standard deviation"):
            A.normalized().calibrate(np.array(scores))
    for scores in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(RewardError, match="needs finite scores"):
            A.normalized().calibrate(np.array(scores))


@pytest.mark.parametrize("numbers", [(1, None), (None, 1), (0, 0), (0, -1), (math.nan, 1), (0, math.inf)])
def test_normalized_needs_a_finite_mean_and_a_positive_std(numbers):
    with pytest.raises(ValueError, match=r"mean|std"):
        A.normalized(*numbers)


# --- prefixes


def test_prefixes_are_cut_padded_and_finished_only_when_whole():
    batch = prefix_batch(TOKENIZER, [[5], [6, 7]], [[8, 9, EOS], [10]], pad=33, width=9, answer=["x", "y"])
    cut = batch.at([0, 0, 1, 0], [3, 2, 0, 0])
    assert cut.input_ids.tolist() == [[5, 8, 9, EOS], [5, 8, 9, 0], [6, 7, 0, 0], [5, 0, 0, 0]]
    assert cut.lengths.tolist() == [4, 3, 2, 1]
    assert cut.prompt_lengths.tolist() == [1, 1, 2, 1]
    assert cut.finished.tolist() == [True, False, False, False]
    assert cut.rows.tolist() == [0, 0, 1, 0]
    assert cut.columns == {"answer": ["x", "x", "y", "x"]}
    assert cut.completion_ids == [[8, 9, EOS], [8, 9], [], []]
    assert batch.input_ids[0].tolist() == [5, 8, 9, EOS, 33, 33, 33, 33, 33]
    for length_ in (-1, 4):
        with pytest.raises(ValueError, match=rf"completion_lengths\[0\] is {length_}, but row 0 has 3"):
            batch.at([0], [length_])


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece: a space before each word, which decoding takes off the first; bytes for the rest."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [(piece, -2.0) for piece in ("▁", "▁good", "▁film", "good", "film", "s")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


METASPACE = metaspace_tokenizer()


@settings(max_examples=60)
@given(
    ids=st.lists(st.integers(0, len(METASPACE) - 1) | st.sampled_from(METASPACE("good film 好")["input_ids"])),
    prompt_length=st.integers(0, 8),
)
def test_decoded_prompt_and_completion_make_up_the_decoded_text(ids, prompt_length):
    prompt_length = min(prompt_length, len(ids))
    batch = prefix_batch(METASPACE, [ids[:prompt_length]], [ids[prompt_length:]])
    prompt = prefix_batch(METASPACE, [ids[:prompt_length]], [[]]).texts[0]
    assert prompt + batch.completions[0] == batch.texts[0]


def test_completions_keep_their_leading_space_and_lose_special_tokens():
    good, film, s = METASPACE.convert_tokens_to_ids(["▁good", "▁film", "s"])
    batch = prefix_batch(METASPACE, [[1, good]] * 3, [[film, 2], [s], []])
    assert batch.completions == [" film", "s", ""]
    assert METASPACE.decode([film]) == "film"  # what decoding the completion alone would give


class Counting(Reward):
    """Scores a completion by its tokens and notes how many prefixes it got at once."""

    max_batch = 4

    def __init__(self):
        self.batches = []

    def __call__(self, *, prompts, completions, completion_ids, **columns):
        self.batches.append(len(completions))
        return [sum(ids) / 100 for ids in completion_ids]


def test_prefixes_are_scored_in_batches_of_bounded_size(batch):
    reward = Counting()
    at = all_lengths(batch)  # 6 + 3 + 4 prefixes
    values = reward.prefix_potentials(batch, at)
    assert reward.batches == [4, 4, 4, 1]
    for ids, row in zip(batch.completion_ids, values, strict=True):
        np.testing.assert_allclose(row, np.cumsum([0, *ids]) / 100)


def test_prefix_potentials_needs_one_entry_per_row(batch):
    with pytest.raises(ValueError, match="at has 1 entries for a batch of 3 rows"):
        A.prefix_potentials(batch, [np.array([0])])
    with pytest.raises(ValueError, match="row 1 has 2 completion tokens"):
        A.prefix_potentials(batch, [np.array([0]), np.array([3]), np.array([0])])


IDS = st.lists(st.integers(4, 63), min_size=1, max_size=6)


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
def test_prefix_potentials_are_the_potentials_of_each_prefix_in_any_order(rows, order, data):
    reward = (0.5 * Counting() - B.clip(0, 0.4)) * A + even_or_none
    batch = prefix_batch(TOKENIZER, [p for p, _ in rows], [c for _, c in rows])
    at = [np.array(data.draw(st.lists(st.integers(0, len(c)))), dtype=int) for _, c in rows]
    values = reward.prefix_potentials(batch, at)
    for (prompt, completion), lengths, row in zip(rows, at, values, strict=True):
        alone = [reward.potentials(prefix_batch(TOKENIZER, [prompt], [completion[:n]], width=20))[0] for n in lengths]
        assert row.tolist() == alone
    permutation = list(range(len(rows)))
    order.shuffle(permutation)
    shuffled = batch.at(permutation, batch.completion_lengths[permutation])
    assert reward.potentials(shuffled).tolist() == reward.potentials(batch)[permutation].tolist()


def test_a_subclass_that_overrides_potentials_is_used_and_checked_inside_sums(batch):
    class Fast(Reward):
        def __init__(self, value):
            self.value = value

        def __call__(self, *, prompts, completions, **columns):
            raise AssertionError("text is not needed")

        def potentials(self, batch):
            return np.full(len(batch), self.value)

        def prefix_potentials(self, batch, at):
            return [np.full(len(row), self.value) for row in at]

    at = all_lengths(batch)
    assert (Fast(2.0) + 1).potentials(batch).tolist() == [3.0] * 3
    assert [len(row) for row in (Fast(2.0) + A).prefix_potentials(batch, at)] == [6, 3, 4]
    with pytest.raises(RewardError, match=r"'Fast', row 0 .*potentials returned nan"):
        (Fast(math.nan) + 1).potentials(batch)
    with pytest.raises(RewardError, match=r"'Fast', row 0 .*prefix_potentials returned"):
        (Fast(math.nan) + 1).prefix_potentials(batch, at)

    class Short(Fast):
        def potentials(self, batch):
            return np.zeros(2)

        def prefix_potentials(self, batch, at):
            return [np.zeros(1) for _ in at]

    with pytest.raises(RewardError, match=r"'Short': potentials returned .* of shape \(2,\); expected shape \(3,\)"):
        (Short(0.0) + 1).potentials(batch)
    with pytest.raises(
        RewardError, match=r"'Short': prefix_potentials returned .* of shape \(1,\); expected shape \(6,\)"
    ):
        (Short(0.0) + 1).prefix_potentials(batch, at)


def test_an_empty_batch_gets_no_scores():
    batch = prefix_batch(TOKENIZER, [], [])
    never = FunctionReward(lambda completions: [max(map(len, completions))] * len(completions))
    assert never.potentials(batch).shape == (0,)
    assert (A + B).prefix_potentials(batch, []) == []


# --- as_reward and sharing


class NotYetMade(Reward):
    def __call__(self, *, prompts, completions, **columns):
        return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (NotYetMade, "reward is the class NotYetMade; pass an instance of it"),
        (dict, "reward is the class dict; pass an instance"),
        (3.0, "reward must be a callable .* a path or hub id .* got float 3.0"),
        ([length], "got list .*; several rewards combine by arithmetic"),
    ],
)
def test_as_reward_says_what_it_accepts(value, complaint):
    with pytest.raises(TypeError, match=complaint):
        as_reward(value)


def test_as_reward_wants_a_tokenizer_with_a_model(tiny_causal_reward_model):
    with pytest.raises(TypeError, match=r"CausalRewardModel\(model, tokenizer\)"):
        as_reward(tiny_causal_reward_model)


def test_as_reward_keeps_rewards_and_wraps_callables():
    assert as_reward(A) is A
    assert as_reward(length).name == "length"
    assert as_reward(Counting()).name == "Counting"
    assert as_reward(functools.partial(length)).name == "length"
    assert FunctionReward(length, name="brevity").name == "brevity"


def test_positional_only_functions_are_refused():
    def reward(prompts, completions, /):
        return []

    with pytest.raises(TypeError, match="'reward' has positional-only parameters"):
        as_reward(reward)
    with pytest.raises(TypeError, match="must be callable, got int 3"):
        FunctionReward(3)


def test_deep_copies_are_the_same_reward():
    reward = 0.5 * A + B.clip(0, 1)
    assert copy.deepcopy({"reward": reward})["reward"] is reward


def test_a_function_reward_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from textgym.rewards import as_reward; r = as_reward(lambda completions: [1.0]) + 1; "
        "assert r(prompts=['p'], completions=['c']) == [2.0]; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
