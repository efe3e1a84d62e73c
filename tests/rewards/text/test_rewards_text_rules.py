"""Rules of text quality: what each counts, its range, both forms, and its arguments."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_batches import all_lengths, prefix_batch, text_batch
from tiny_models import EOS, tiny_tokenizer

from textgym.encodable_text import well_formed
from textgym.metrics import distinct_n, repetitions
from textgym.rewards import (
    Constraint,
    DistinctN,
    FunctionReward,
    Grammar,
    JsonFormat,
    KeywordAbsence,
    KeywordPresence,
    LanguageIdentity,
    LengthTarget,
    Profanity,
    Readability,
    RegexMatch,
    Repetition,
    RewardError,
    SentimentLexicon,
    XmlTags,
)
from textgym.rewards.text.text_rules import syllables
from textgym.text_units import sentences_of, words_of

TOKENIZER = tiny_tokenizer()
WORDS = st.lists(st.sampled_from(["a", "good", "film", "very", "!"]), max_size=12).map(" ".join)


def score(reward, *completions, **columns):
    return reward(prompts=["p"] * len(completions), completions=list(completions), **columns)


# --- length


def test_lengths_in_tokens_are_those_of_the_batch_without_decoding():
    batch = prefix_batch(TOKENIZER, [[5], [6]], [[7, 8, 9, EOS], [10]])
    reward = LengthTarget(3)
    scores = reward.prefix_potentials(batch, all_lengths(batch))
    assert [row.tolist() for row in scores] == [
        [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, pytest.approx(2 / 3)],
        [0.0, pytest.approx(1 / 3)],
    ]
    assert reward.potentials(batch).tolist() == [scores[0][4], scores[1][1]]
    assert reward(prompts=["p"] * 2, completions=["", ""], completion_ids=batch.completion_ids) == [
        scores[0][4],
        scores[1][1],
    ]
    assert "completions" not in vars(batch)
    with pytest.raises(RewardError, match="needs 'completion_ids'"):
        score(reward, "a")


@pytest.mark.parametrize(("unit", "text"), [("words", "a b c d e"), ("characters", "abcde")])
def test_within_the_tolerance_the_length_is_right(unit, text):
    for target, expected in ((5, 1.0), (6, 1.0), (4, 1.0), (7, 5 / 6), (3, 0.5), (2, 0.0)):
        assert score(LengthTarget(target, unit, tolerance=1), text) == [pytest.approx(expected)]
    batch = text_batch(TOKENIZER, ["the"], ["film is good"])
    assert LengthTarget(3, "words").prefix_potentials(batch, [np.arange(4)])[0].tolist() == pytest.approx(
        [0, 1 / 3, 2 / 3, 1]
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0,), "target=0 must be a finite number greater than 0"),
        ((np.inf,), "target=inf must be a finite number"),
        ((5, "lines"), "unit='lines' must be one of 'tokens', 'words', 'characters'"),
        ((5, "words", 5), "tolerance=5 must be a finite number at least 0 and less than 5"),
    ],
)
def test_length_arguments_are_checked(arguments, complaint):
    tolerance = arguments[2] if len(arguments) > 2 else 0.0
    with pytest.raises(ValueError, match=complaint):
        LengthTarget(*arguments[:2], tolerance=tolerance)


# --- repetition


@settings(max_examples=50)
@given(text=WORDS, n=st.integers(1, 4))
def test_repetition_and_distinct_n_are_those_of_the_metrics_module(text, n):
    assert score(Repetition(n), text) == [pytest.approx(-repetitions([text], n)[0])]
    assert score(DistinctN(n), text) == [pytest.approx(distinct_n([text], n))]


def test_characters_are_counted_for_languages_without_spaces():
    assert score(DistinctN(1, "characters"), "好好好看") == [0.5]
    assert score(Repetition(1, "characters"), "好好好看") == [-0.5]
    for arguments, complaint in (((0,), "n=0 must be a whole number"), ((1, "lines"), "unit='lines' must be one of")):
        for rule in (DistinctN, Repetition):
            with pytest.raises(ValueError, match=complaint):
                rule(*arguments)


# --- keywords


def test_keywords_are_whole_words_in_any_case_unless_parts_count():
    texts = ("a STRASSE", "art-house", "the artist", "no")
    assert score(KeywordPresence(["straße", "art"]), *texts) == [0.5, 0.5, 0.0, 0.0]
    assert score(KeywordAbsence(["straße", "art"]), *texts) == [-0.5, -0.5, 0.0, 0.0]
    assert score(KeywordPresence(["art"], whole_words=False), *texts) == [0.0, 1.0, 1.0, 0.0]
    assert score(KeywordPresence(["C++", "(sic)"]), "C++ (sic)", "C") == [1.0, 0.0]
    assert score(KeywordPresence(["a", "a ", "b"]), "a") == [0.5]


def test_keywords_may_differ_from_row_to_row():
    column = [["warm", "funny"], "slow", None]
    assert score(KeywordPresence(column="words"), "warm", "slow", "x", words=column) == [0.5, 1.0, None]
    assert score(KeywordAbsence(column="words"), "warm", "slow", "x", words=column) == [-0.5, -1.0, None]
    with pytest.raises(RewardError, match="needs 'topic', .* available: prompts, completions, words"):
        score(KeywordPresence(column="topic"), "a", words=["b"])
    for entry in (3, [], ["a", ""], [1]):
        with pytest.raises(RewardError, match="row 1 .*column 'words': keywords must be a list of"):
            score(KeywordPresence(column="words"), "a", "b", words=["a", entry])


def test_keyword_arguments_are_checked():
    for arguments in ({}, {"keywords": ["a"], "column": "b"}):
        with pytest.raises(ValueError, match="give keywords= or column="):
            KeywordPresence(**arguments)
    for keywords in ("warm", [], [""], [3]):
        with pytest.raises(ValueError, match="keywords must be a list of"):
            KeywordPresence(keywords)


# --- readability


def test_readability_is_flesch_and_kincaid():
    text = "The film is slow. I did not like it at all, but the music was wonderful."
    words, sentences, count = 16, 2, 19  # won-der-ful and mu-sic: 14 + 3 + 2
    ease = 206.835 - 1.015 * words / sentences - 84.6 * count / words
    grade = 0.39 * words / sentences + 11.8 * count / words - 15.59
    assert score(Readability(), text, "", " ...") == [pytest.approx(ease), 0.0, 0.0]
    assert score(Readability("grade"), text, "") == [pytest.approx(grade), 0.0]
    assert score(Readability(), "Go.") == [pytest.approx(121.22)]
    assert score(Readability("grade"), "Go.") == [pytest.approx(-3.40)]
    with pytest.raises(ValueError, match="measure='smog' must be one of 'ease', 'grade'"):
        Readability("smog")


# As in the CMU Pronouncing Dictionary.
SYLLABLES = "a 1, actor 2, beautiful 3, comedy 3, criticism 4, piano 3, people 2, hour 1, movement 2, nation 2"
SYLLABLES += ", strange 1, table 2, their 1, watched 1, Wonderful 3, seeing 2"


@pytest.mark.parametrize("entry", SYLLABLES.split(", "))
def test_syllables_of_common_words(entry):
    word, count = entry.split()
    assert syllables(word) == int(count)


# --- grammar


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        ("capital", " is good. It is (really). “Yes.” 3 of them.", [" is good. it is", "A. b."]),
        ("end", 'He said "no."', ["He said", "a,", "", "(a."]),
        ("repeated", "that that he had had is a fact, no? No.", ["the the", "The the film", "very very good"]),
        ("article", "an hour, a user, an apple, a one-off, a European, an honest, A film, A 3", ["a apple", "an film"]),
        ("spacing", "Well... so: yes, 3.5 (or .5)!\n  indented", ["a , b", "a  b", "what ?", "end ."]),
        ("pronoun", "I'm sure I am, i.e. ii; hi-i", ["i am", "so i'm", "and i"]),
        ("brackets", 'a (b [c] "d") “e”', ["(a", "a)", 'a "b', "(a]", "“a"]),
    ],
)
def test_each_rule_finds_its_fault_and_leaves_the_rest_alone(rule, right, wrong):
    assert Grammar().violations(right)[rule] == 0
    for text in wrong:
        if (rule, text) != ("end", "(a."):
            assert Grammar().violations(text)[rule] > 0, text


def test_grammar_counts_violations_per_word():
    assert score(Grammar(["article", "repeated"]), " a apple is is an pear now") == [pytest.approx(1 - 3 / 7)]
    assert score(Grammar(["end"]), "no end", "One.", "One") == [0.5, 1.0, 0.0]
    with pytest.raises(ValueError, match="rules='spelling' must be one of 'capital', 'end', "):
        Grammar(["spelling"])
    with pytest.raises(ValueError, match=r"rules=\[\] must have at least 1 text"):
        Grammar([])


# --- formats


def test_regular_expressions_in_both_forms():
    for where, expected in (("anywhere", [1, 1, 1, 0]), ("start", [1, 1, 0, 0]), ("whole", [1, 0, 0, 0])):
        reward = RegexMatch(r"a+b", where=where)
        assert score(reward, "aab", "abc", "cab", "ba") == expected
        negative = RegexMatch(re.compile("a+b"), where=where, form="penalty")
        assert score(negative, "aab", "abc", "cab", "ba") == [-x for x in expected]
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression: .*unterminated"):
        RegexMatch("(")
    with pytest.raises(ValueError, match="where='end' must be one of"):
        RegexMatch("a", where="end")
    with pytest.raises(ValueError, match="form='negative' must be one of"):
        RegexMatch("a", form="negative")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50)
@given(value=JSON)
def test_what_json_writes_is_json_and_half_of_it_is_not(value):
    text = json.dumps(value)
    assert score(JsonFormat(), text, f" {text}\n", text + "]", "[" + text) == [1.0, 1.0, 0.0, 0.0]


def test_json_is_what_rfc_8259_says():
    texts = ("NaN", "[Infinity]", "{'a': 1}", '{"a": 1,}', "[" * 100_000, "1" * 10_000, '"\\ud800"', "nul")
    assert score(JsonFormat(), *texts) == [0, 0, 0, 0, 0, 1, 1, 0]
    assert score(JsonFormat(["a", "b", "c"]), '{"a": 1, "d": 2}', "{}", "3", "") == [pytest.approx(2 / 3), 0.5, 0, 0]
    for keys, error in (("a", TypeError), ([], ValueError), (3, TypeError)):
        with pytest.raises(error, match="^keys="):
            JsonFormat(keys)


def test_tags_are_opened_and_closed_once_in_their_order():
    texts = {
        "<think>a</think><answer>b</answer>": 1.0,
        " x <think>\n</think> y <answer></answer>": 1.0,
        "<answer>b</answer><think>a</think>": 0.5,
        "<think><answer>b</answer></think>": 0.5,
        "<think>a</think><think>b</think><answer></answer>": 0.5,
        "</think>a<think>": 0.0,
        "<think>a": 0.0,
        "<Think>a</Think>": 0.0,
        "": 0.0,
    }
    assert score(XmlTags(), *texts) == list(texts.values())
    for tags, complaint in (
        ("think", "tags='think' must be a list"),
        ([], "at least 1 text"),
        (3, "tags=3 must be a list"),
        (["<a>"], "must be names such as 'think'"),
        (["a", "a"], "differ"),
    ):
        with pytest.raises((TypeError, ValueError), match=complaint):
            XmlTags(tags)


# --- lexicons


def test_sentiment_is_that_of_vader():
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    texts = (
        " VADER is smart, handsome, and funny!",
        " not bad at all",
        " The plot was good, but the dialog is uncompelling.",
        "",
    )
    assert score(SentimentLexicon(), *texts) == [vader.polarity_scores(text)["compound"] for text in texts]
    assert score(SentimentLexicon(), "VADER is smart, handsome, and funny.") == [0.8316]  # in its README


def test_language_identity_is_that_of_py3langid():
    langid = pytest.importorskip("py3langid.langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    texts = ("This film is good and funny.", "Ce film est vraiment très drôle.", "这部电影很好看")
    for language in ("en", "fr"):
        expected = [dict(identifier.rank(text))[language] for text in texts]
        assert score(LanguageIdentity(language), *texts) == pytest.approx(expected, abs=1e-6)
    ranks = dict(identifier.rank(texts[2]))  # Chinese is Mandarin, Wu and Cantonese
    expected = sum(ranks[name] for name in ("zh", "wuu", "yue"))
    assert score(LanguageIdentity("zh"), texts[2])[0] == pytest.approx(expected, abs=1e-3)
    among = score(LanguageIdentity("en", among=["fr"]), texts[0])[0]
    assert among > score(LanguageIdentity("en"), texts[0])[0]
    assert score(LanguageIdentity("sr"), "", " 123 😀", "\x00") == [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="unknown language english; known are ace, af, "):
        LanguageIdentity("english")
    with pytest.raises(ValueError, match="unknown language xx"):
        LanguageIdentity("en", among=["xx"])


def test_profanity_counts_words_and_the_longest_phrases():
    reward = Profanity(["hell", "bloody hell fire", "Damn"])
    assert score(reward, "bloody hell fire now", "bloody hell", "DAMN damned", "", "hello") == [
        -0.75,
        -0.5,
        -0.5,
        0.0,
        0.0,
    ]
    pytest.importorskip("better_profanity")
    from better_profanity import profanity

    profanity.load_censor_words()
    default = Profanity()
    for text in ("a lovely film", "what the hell is this", "pure crap", "an ass in a classroom", "Scunthorpe"):
        assert (score(default, text)[0] < 0) == profanity.contains_profanity(text)
    for words, complaint in (
        ("damn", "words='damn' must be a list of texts"),
        ([], "holds no word"),
        ([" "], "holds no word"),
    ):
        with pytest.raises((TypeError, ValueError), match=complaint):
            Profanity(words)


# --- constraints


def test_constraints_have_a_positive_a_negative_and_a_graded_form():
    reward = FunctionReward(lambda completions: [None if c == "x" else len(c) for c in completions], name="length")
    texts = ("", "ab", "abcd", "abcdefgh", "x")
    assert score(Constraint(reward, at_least=2, at_most=4, form="bonus"), *texts) == [0, 1, 1, 0, None]
    assert score(Constraint(reward, at_least=2, at_most=4), *texts) == [-1, 0, 0, -1, None]
    assert score(Constraint(reward, at_least=2, at_most=4, form="distance"), *texts) == [-2, 0, 0, -4, None]
    assert score(Constraint(reward, at_most=3, form="distance"), *texts) == [0, 0, -1, -5, None]
    assert Constraint(reward, at_least=2, at_most=4).name == "Constraint(length, at_least=2, at_most=4)"
    batch = text_batch(TOKENIZER, ["the"], ["film is good"])
    demand = Constraint(LengthTarget(3), at_least=0.5, form="bonus")
    assert demand.prefix_potentials(batch, [np.arange(4)])[0].tolist() == [0, 0, 1, 1]
    assert "completions" not in vars(batch)  # the part kept its own way to score prefixes


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "give at_least=, at_most= or both"),
        ({"at_least": 2, "at_most": 1}, "at_least=2 lies above at_most=1"),
        ({"at_most": np.nan}, "at_most=nan must be a finite number"),
        ({"at_least": 0, "form": "hard"}, "form='hard' must be one of 'bonus', 'penalty', 'distance'"),
    ],
)
def test_constraint_arguments_are_checked(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Constraint(LengthTarget(3), **arguments)


# --- words and sentences


@settings(max_examples=50)
@given(text=st.text(alphabet="ab .!?。\n\"')3", max_size=30))
def test_sentences_make_up_the_text_but_for_white_space_and_bare_marks(text):
    sentences = sentences_of(text)
    assert all(words_of(sentence) for sentence in sentences)
    assert words_of(" ".join(sentences)) == words_of(text) or "." in text or "'" in text
    joined = re.sub(r"\s", "", "".join(sentences))
    rest = iter(re.sub(r"\s", "", text))
    assert all(mark in rest for mark in joined)  # in their order


def test_only_lone_surrogates_are_replaced():
    assert well_formed("a\ud83d\ude00\udfff😀\x00") == "a\ufffd\ufffd\ufffd😀\x00"
    assert well_formed("a\ufffd שלום") == "a\ufffd שלום"
