"""Rewards and metrics count words where a script has spaces, and characters where it has none."""

from __future__ import annotations

import itertools

import pytest

from textgym.metrics import distinct_n, mean_length, repetition
from textgym.rewards import (
    Bleu,
    DistinctN,
    EmbeddingCoherence,
    ExactMatch,
    KeywordAbsence,
    KeywordPresence,
    LanguageIdentity,
    LengthDebiased,
    LengthTarget,
    Meteor,
    NoveltyReward,
    Repetition,
    Rouge,
    SelfBLEU,
    Ter,
    TokenF1,
    as_reward,
)
from textgym.text_units import clauses_of, is_chinese, sentences_of, spaced, units_of, words_of

CHINESE, JAPANESE, THAI = "今天天气真好，出门记得带伞哦。", "にほんごの映画です。", "ภาษาไทยดีมาก"
LAO, KHMER, BURMESE = "ພາສາລາວ", "ភាសាខ្មែរ", "မြန်မာစာ"
UNSPACED = [CHINESE, JAPANESE, THAI, LAO, KHMER, BURMESE]
SPACED = ["A good film, it's fine.", "très bon café", "хороший фильм", "좋은 영화 입니다", "हिन्दी में फिल्म", "שלום עולם"]


def score(reward, completion, **columns):
    return reward(prompts=["p"], completions=[completion], **{name: [value] for name, value in columns.items()})[0]


@pytest.mark.parametrize("text", SPACED)
def test_scripts_with_spaces_are_divided_at_them(text):
    assert units_of(text) == text.split()
    assert spaced(text) == text
    assert len(words_of(text)) == len(text.split())


@pytest.mark.parametrize("text", UNSPACED)
def test_scripts_without_spaces_are_divided_into_characters_that_keep_their_marks(text):
    units = units_of(text)
    assert "".join(units) == text
    assert 1 < len(units) <= len(text)
    assert "".join(words_of(text)) == text.replace("，", "").replace("。", "")


def test_mixed_texts_have_both_kinds_of_words():
    assert units_of("今天看film很good！ ok") == ["今", "天", "看", "film", "很", "good", "！", "ok"]
    assert is_chinese("今天 film")
    assert not is_chinese(JAPANESE)


@pytest.mark.parametrize("text", [CHINESE, THAI, "今天看film很good！"])
def test_the_units_of_a_prefix_begin_those_of_the_whole(text):
    whole = units_of(text)
    for n in range(len(text)):
        units = units_of(text[:n])
        assert units[:-1] == whole[: max(len(units) - 1, 0)]


def test_keywords_are_found_where_no_space_stands_around_them():
    assert score(KeywordPresence(["伞"]), "出门记得带伞哦") == 1.0
    assert score(KeywordPresence(["伞", "天气", "雪"]), CHINESE) == pytest.approx(2 / 3)
    assert score(KeywordAbsence(["伞"]), "出门记得带伞哦") == -1.0
    assert score(KeywordPresence(["film"]), "今天看film很好") == 1.0
    assert score(KeywordPresence(["film"]), "今天看films很好") == 0.0
    assert score(KeywordPresence(["ไทย"]), THAI) == 1.0
    assert score(KeywordPresence(["warm"]), "warmth") == 0.0


@pytest.mark.parametrize("text", UNSPACED)
def test_repetition_and_diversity_see_what_is_repeated(text):
    assert score(Repetition(2), text * 3) < score(Repetition(2), text) <= 0
    assert score(Repetition(2), text * 3) < -0.5
    assert 0 < score(DistinctN(2), text * 3) < 0.5 < score(DistinctN(2), text)
    assert 0 < distinct_n([text * 3], 2) < 0.5 < distinct_n([text], 2)
    assert repetition([text * 3], 2) > 0.5
    assert mean_length([text]) == len(units_of(text))
    assert score(NoveltyReward(2, floor=1), text) > 0.5
    assert score(LengthTarget(len(units_of(text)), unit="words"), text) == 1.0


def test_length_in_words_charges_for_characters():
    flat = as_reward(lambda completions: [0.0] * len(completions))
    assert score(LengthDebiased(flat, slope=1.0), "今天good") == -3.0


@pytest.mark.parametrize("text", [*UNSPACED, *SPACED])
def test_metrics_of_a_text_with_itself_are_perfect_in_every_script(text):
    for reward, best in ((Rouge("rouge1"), 1.0), (Rouge("rougeL"), 1.0), (TokenF1(), 1.0), (ExactMatch(), 1.0)):
        assert score(reward, text, reference=text) == pytest.approx(best)
    assert score(Bleu(), text, reference=text) == pytest.approx(100.0)
    assert score(Ter(), text, reference=text) == 0
    assert score(Meteor(), text, reference=text) > 0.9


def test_metrics_of_half_a_text_lie_between():
    half = "今天天气真好"
    for reward in (Rouge("rouge1"), Rouge("rougeL"), TokenF1(), Meteor()):
        assert 0 < score(reward, half, reference=CHINESE) < 1
    assert 0 < score(Bleu(), half + "呀出门", reference=CHINESE) < 100
    assert score(Rouge("rouge1"), "雪山", reference=CHINESE) == 0
    assert -100 < score(Ter(), half, reference=CHINESE) < 0


def test_chinese_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    theirs = sacrebleu.BLEU(effective_order=True, tokenize="zh").sentence_score("今天天气很好", ["今天天气真好。"])
    assert score(Bleu(), "今天天气很好", reference="今天天气真好。") == pytest.approx(theirs.score)


def test_rouge_of_latin_script_is_rouge_scores_own_and_may_have_another_tokenizer():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"], use_stemmer=True)
    for text, reference in itertools.permutations(
        ["très bon café's films", "A good filming, très fine.", "3.5 films"], 2
    ):
        theirs = scorer.score(reference, text)["rouge1"].fmeasure
        assert score(Rouge("rouge1", stemmer=True), text, reference=reference) == pytest.approx(theirs)
    assert score(Rouge("rouge1", tokenizer=list), "ab", reference="ac") == 0.5
    with pytest.raises(TypeError, match="tokenizer='words' must be a function"):
        Rouge(tokenizer="words")


def test_an_answer_is_right_without_its_full_stop():
    assert score(ExactMatch(), " 北京。", reference="北京") == 1.0
    assert score(TokenF1(), "在北京", reference="北京") == pytest.approx(0.8)


def test_copies_in_chinese_are_copies():
    texts = [CHINESE, CHINESE, "雪山很高"]
    assert SelfBLEU()(prompts=["p"] * 3, completions=texts)[:2] == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "language"), [("你好", "zh"), ("今天天气真好", "zh"), ("にほんご", "ja"), ("한국", "ko")]
)
def test_a_few_characters_tell_the_language(text, language):
    assert score(LanguageIdentity(language), text) > 0.9
    assert score(LanguageIdentity("en"), text) < 0.01


def test_one_chinese_sentence_has_clauses_to_compare():
    assert sentences_of("你好！再见。") == ["你好！", "再见。"]
    assert clauses_of(CHINESE) == ["今天天气真好，", "出门记得带伞哦。"]
    assert clauses_of("I saw 3,000 films, all good") == ["I saw 3,000 films,", "all good"]

    def lengths(texts):
        return [[len(text), 1.0] for text in texts]

    reward = EmbeddingCoherence(encoder=lengths)
    assert reward(prompts=["今天天气真好"], completions=["，出门记得带伞哦。"])[0] > 0.9
    assert reward(prompts=["p"], completions=[""]) == [0.0]
