"""What the build of the embedded models does beyond training: spelling, and two writers in one model."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from textgym.embedded import LANGUAGE_MODEL
from textgym.embedded.build import tokenizer as build_tokenizer
from textgym.embedded.build.mixture import Mixture, deepened, divergence
from textgym.embedded.build.sampling import KnownWords, sample
from textgym.embedded.build.text import words

KNOWN = set("a the film is it's movie good bad warm hearted warm-hearted funny and very story of life don't".split())


@pytest.fixture(scope="module")
def pieces():
    return build_tokenizer.load(LANGUAGE_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(LANGUAGE_MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def vocabulary(pieces):
    return KnownWords(KNOWN, pieces)


def encoded(pieces, text):
    return [build_tokenizer.BOS, *pieces.encode(text), build_tokenizer.EOS]


def log_prob_of_text(model, ids, temperature=1.0):
    """The log-probability of a text, from the model's own forward."""
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, :-1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum().item()


@pytest.mark.parametrize(
    ("begun", "piece", "fits"),
    [
        ("", "▁film", True),
        ("", "▁actor", False),
        ("mov", "ie", True),
        ("mov", "es", False),
        ("movie", "s", False),
        ("movie", "▁good", True),
        ("mov", "▁good", False),
        ("movie", ".", True),
        ("mov", ".", False),
        ("it", "'", True),
        ("film", "'", False),
        ("warm-", "h", True),
        ("warm-", "s", False),
        ("warm-", "▁film", False),
    ],
)
def test_a_piece_is_allowed_if_it_leads_to_a_known_word(vocabulary, pieces, begun, piece, fits):
    number = pieces.piece_to_id(piece)
    assert pieces.id_to_piece(number) == piece
    assert bool(vocabulary.allowed(begun)[number]) == fits
    assert (vocabulary.after(begun, number) is not None) == fits


def test_a_hyphen_joins_known_words_only(vocabulary, pieces):
    [hyphen] = [i for i in range(len(pieces)) if pieces.id_to_piece(i) == "-"]
    assert vocabulary.after("good", hyphen) == ""
    assert vocabulary.after("warm", hyphen) == "warm-"  # "warm-hearted" is a word
    assert vocabulary.after("mov", hyphen) is None


def test_a_text_may_end_between_words_only(vocabulary):
    assert vocabulary.allowed("movie")[build_tokenizer.EOS]
    assert vocabulary.allowed("")[build_tokenizer.EOS]
    assert not vocabulary.allowed("mov")[build_tokenizer.EOS]


def test_the_careful_writer_uses_known_words_only(model, vocabulary, pieces):
    texts = [pieces.decode(ids) for ids in sample(model, 30, seed=0, max_tokens=24, known_words=vocabulary)]
    free = [pieces.decode(ids) for ids in sample(model, 30, seed=0, max_tokens=24)]

    def unknown(texts):
        # the last word may have been cut off by the limit
        whole = [word for text in texts for word in words(text)[:-1] if word[0].isalnum()]
        return [word for word in whole if not set(word.split("-")) <= KNOWN]

    assert unknown(texts) == []
    assert len(unknown(free)) > 50


def test_next_pieces_multiply_to_the_probability_of_the_mixture(model, vocabulary, pieces):
    everything = KnownWords(KNOWN | {"zebra"}, pieces)
    rows = [encoded(pieces, text) for text in ("the film is good.", "a warm-hearted movie.", "it's a very bad story.")]
    mixture = Mixture(model, everything, temperature=0.7, share=0.8)
    probs, _ = mixture.next_pieces(rows)
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(probs)))
    places = iter(probs)
    for row in rows:
        ours = sum(math.log(next(places)[piece]) for piece in row[1:])
        with torch.inference_mode():
            logits = model(torch.tensor([row])).logits[0, :-1] / 0.7
        logits = logits.clone()  # out of inference mode
        careful = 0.0
        begun = ""
        for place, piece in enumerate(row[1:]):
            logits[place, ~everything.allowed(begun)] = -math.inf
            careful += logits[place].log_softmax(-1)[piece].item()
            begun = "" if piece == build_tokenizer.EOS else everything.after(begun, piece)
        free = log_prob_of_text(model, row)
        expected = math.log(0.8 * math.exp(careful) + 0.2 * math.exp(free))
        assert ours == pytest.approx(expected, abs=1e-3)


def test_no_text_is_less_probable_than_the_free_writers_share_of_it(model, vocabulary, pieces):
    row = encoded(pieces, "zanzibar's bureaucracy, unflinching, defies synopsis.")  # no word of it is known
    probs, careful = Mixture(model, vocabulary, temperature=0.6, share=0.9).next_pieces([row])
    ours = sum(math.log(place[piece]) for place, piece in zip(probs, row[1:], strict=True))
    assert ours == pytest.approx(math.log(0.1) + log_prob_of_text(model, row), abs=1e-3)
    assert careful[0].item() == pytest.approx(0.9)
    assert careful[-1] == 0


def test_padding_does_not_change_the_mixture(model, vocabulary, pieces):
    short, long = encoded(pieces, "a good film."), encoded(pieces, "it's a good film and a very funny story of life.")
    mixture = Mixture(model, vocabulary, temperature=0.7, share=0.8)
    alone = torch.cat([mixture.next_pieces([row])[0] for row in (short, long)])
    torch.testing.assert_close(mixture.next_pieces([short, long])[0], alone, atol=1e-5, rtol=1e-4)


def test_a_deepened_model_is_the_same_function(model, pieces):
    rows = [encoded(pieces, text) for text in ("the film is good.", "a story of life.")]
    deeper = deepened(model)
    assert deeper.config.num_hidden_layers == model.config.num_hidden_layers + 1
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row])
            torch.testing.assert_close(deeper(ids).logits, model(ids).logits)


def test_the_divergence_is_zero_for_the_model_itself_and_positive_for_a_sharper_one(model, pieces):
    rows = [encoded(pieces, text) for text in ("the film is good.", "a story of life and a movie.")]
    with torch.inference_mode():
        logits = [model(torch.tensor([row])).logits[0, :-1] for row in rows]
        same = torch.cat(logits).softmax(-1)
        sharper = (torch.cat(logits) / 0.5).softmax(-1)
        assert divergence(model, rows, same).item() == pytest.approx(0, abs=1e-5)
        expected = torch.nn.functional.kl_div(torch.cat(logits).log_softmax(-1), sharper, reduction="batchmean")
        assert divergence(model, rows, sharper).item() == pytest.approx(expected.item(), abs=1e-4)
        assert expected > 0.05
