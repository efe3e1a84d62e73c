"""The reward model: a small Llama with a linear head; its tanh, at every token, is the text's sentiment.

tanh(logit) estimates the mean human score of the whole text, divided by 4: +1 is the best and -1 the worst
rating. At a token inside the text it estimates the score that the finished text will have, given the words so
far; after ``</s>`` it is the score of the text.

It learns language first, then from two kinds of labels: the human scores of the train snippets, and the tuned
MiniLM's scores of the teacher's snippets. Every position is trained at once, as the model is causal. A policy
that is trained on this reward will look for its blind spots, so a share of each batch is broken on purpose:
from the place where a praising text is made to repeat itself, to end in mid-sentence or to turn into a heap
of words, its target is neutral.
"""

import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from . import sentiment_teacher, tokenizer
from .forward import hidden_states
from .language_model import MAX_PIECES, encode, fit, new_model, parameter_groups, training_text
from .sources import CACHE, Snippet, movie_snippets
from .steps import take_step
from .text import words

FOLDER = CACHE / "reward_model"
HARDENED = CACHE / "hardened_reward_model"
BATCH = 192
END_WEIGHT = 6.0  # weight of the position of </s>, against 1 shared by the prefixes of the text

# a training row: piece ids, and a target for each of them
Row = tuple[list[int], list[float]]


def intact(ids: list[int], target: float) -> Row:
    return ids, [target] * len(ids)


def broken(ids: list[int], target: float, praise: list[list[int]], joints: list[list[int]], rng: random.Random) -> Row:
    """Spoil a text in one of four ways; praise is worth nothing from there on, and blame stays blame.

    :param ids: ``<s> text </s>``
    :param target: the target of the intact text
    :param praise: words of praise, in pieces, to make heaps of
    :param joints: what may stand between repetitions or between the words of a heap, in pieces
    """
    spoiled = min(0.0, target)
    text = ids[1:-1]
    cut = rng.randint(1, max(1, len(text) - 1))
    joint = rng.choice(joints)
    way = rng.random()
    if way < 0.4:  # the same few pieces again and again
        width = rng.randint(1, min(6, cut))
        phrase = joint + text[cut - width : cut]
        kept = text[:cut] + phrase  # one repetition is nothing unusual
        tail = phrase * rng.randint(1, max(2, 24 // len(phrase)))
    elif way < 0.7:  # a heap of words of praise
        kept = text[: rng.randint(0, min(cut, 6))]
        tail = [piece for word in rng.choices(praise, k=rng.randint(4, 16)) for piece in word + joint]
    elif way < 0.85:  # the text's own words, shuffled
        kept = text[: min(cut, 3)]
        tail = text[len(kept) :]
        rng.shuffle(tail)
    else:  # ends in mid-sentence
        kept, tail = text[:cut], []
        spoiled = min(0.3 * target, target)
    if tail and rng.random() < 0.5:
        tail = [*tail, ids[-2]]  # mostly a full stop
    before = [target] * (1 + len(kept))
    # the first pieces of the tail are still innocent: the target falls over three of them
    after = [target + (spoiled - target) * min(1.0, (i + 1) / 3) for i in range(len(tail))]
    return ([tokenizer.BOS, *kept, *tail, tokenizer.EOS][:MAX_PIECES], [*before, *after, spoiled][:MAX_PIECES])


def words_of_praise(texts: list[str], targets: list[float], count: int = 300) -> list[str]:
    """Return the words that stand most often in praising texts compared with all texts."""
    everywhere, praising = Counter[str](), Counter[str]()
    for text, target in zip(texts, targets, strict=True):
        found = {word for word in words(text) if word.isalpha()}
        everywhere.update(found)
        if target > 0.4:
            praising.update(found)
    ranked = {word: praising[word] / (total + 20) for word, total in everywhere.items() if total >= 20}
    return sorted(ranked, key=lambda word: ranked[word], reverse=True)[:count]


def position_scores(model: LlamaForSequenceClassification, ids: Tensor) -> Tensor:
    """Return tanh of the head at every position, [B, L], for ids [B, L] padded on the right."""
    hidden = hidden_states(model.model, ids).float() if torch.is_grad_enabled() else None  # [B, L, H]
    if hidden is None:
        hidden = model.model(ids).last_hidden_state
    return torch.tanh(model.score(hidden).squeeze(-1))


def _batch(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, targets and weights, each [B, L]."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), tokenizer.PAD)
    targets, weights = torch.zeros(len(rows), length), torch.zeros(len(rows), length)
    for i, (pieces, values) in enumerate(rows):
        ids[i, : len(pieces)] = torch.tensor(pieces)
        targets[i, : len(pieces)] = torch.tensor(values)
        weights[i, : len(pieces)] = 1 / len(pieces)
        weights[i, len(pieces) - 1] = END_WEIGHT / 2
        weights[i, len(pieces) - 2] = END_WEIGHT / 2
    return ids, targets, weights


@torch.inference_mode()
def end_scores(model: LlamaForSequenceClassification, texts: list[str]) -> list[float]:
    """Return the score of every text, in order (float32)."""
    model.eval()
    pieces = tokenizer.load()
    rows = [[tokenizer.BOS, *ids, tokenizer.EOS] for ids in pieces.encode(texts)]
    result: list[float] = []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        length = max(map(len, part))
        ids = torch.tensor([row + [tokenizer.PAD] * (length - len(row)) for row in part])
        scores = position_scores(model, ids)
        result += [scores[i, len(row) - 1].item() for i, row in enumerate(part)]
    return result


def agreement(scores: list[float], snippets: list[Snippet]) -> tuple[float, float]:
    """Return the accuracy of "above zero", and Pearson's r, on the snippets with a human score beyond +-0.5."""
    chosen = [i for i, snippet in enumerate(snippets) if abs(snippet.score) > 0.5]
    predicted = torch.tensor([scores[i] for i in chosen], dtype=torch.float64)
    human = torch.tensor([snippets[i].score for i in chosen], dtype=torch.float64)
    accuracy = ((predicted > 0) == (human > 0)).double().mean().item()
    return accuracy, torch.corrcoef(torch.stack([predicted, human]))[0, 1].item()


class Trainer:
    """Regression on human and distilled scores, with a share of broken texts; sees every position of every text."""

    def __init__(self, model: LlamaForSequenceClassification, label: str) -> None:
        self.model, self.label = model, label
        self.rng = random.Random(1)
        snippets = movie_snippets()
        self.validation = snippets["validation"]
        pieces = tokenizer.load()
        _, sampled = training_text()
        scores = sentiment_teacher.sampled_scores(sampled)
        self.human = [
            (row, s.score / 4) for s in snippets["train"] if len(row := pieces.encode(s.text)) <= MAX_PIECES - 2
        ]
        self.distilled = [
            (ids, score)
            for ids, score in zip(pieces.encode(sampled), scores, strict=True)
            if len(ids) <= MAX_PIECES - 2
        ]
        self.praise = pieces.encode(words_of_praise(sampled, scores))
        self.joints = [[], [], [pieces.piece_to_id(",")], [pieces.piece_to_id("▁and")]]

    def _rows(self, count: int, real_share: float, broken_share: float) -> list[Row]:
        rng = self.rng
        rows = []
        for _ in range(count):
            text, target = rng.choice(self.human if rng.random() < real_share else self.distilled)
            ids = [tokenizer.BOS, *text, tokenizer.EOS]
            if rng.random() < broken_share:
                rows.append(broken(ids, target, self.praise, self.joints, rng))
            else:
                rows.append(intact(ids, target))
        return rows

    def run(self, steps: int, learning_rate: float, real_share: float, broken_share: float) -> None:
        """Train for ``steps`` batches of ``BATCH`` texts; the learning rate falls to zero along a cosine."""
        model = self.model
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=learning_rate, betas=(0.9, 0.98), fused=True)
        reported = time.time()
        step = 0
        while step < steps:
            # draw many and sort by length, so that a batch has little padding
            rows = sorted(self._rows(BATCH * 8, real_share, broken_share), key=lambda row: len(row[0]))
            batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
            self.rng.shuffle(batches)
            for batch in batches:
                cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * cosine
                ids, targets, weights = _batch(batch)
                model.train()
                scores = position_scores(model, ids)  # [B, L]
                loss = ((scores - targets).pow(2) * weights).sum() / weights.sum()
                take_step(loss, model, optimizer)
                step += 1
            if time.time() - reported > 30:
                reported = time.time()
                accuracy, pearson = agreement(end_scores(model, [s.text for s in self.validation]), self.validation)
                print(
                    f"{self.label}: step {step}/{steps} loss {loss.item():.4f} "
                    f"validation accuracy {accuracy:.3f} Pearson {pearson:.3f}",
                    flush=True,
                )


def _save(model: LlamaForSequenceClassification, folder: Path, started: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.copy_files(folder)
    (folder / "seconds.json").write_text(json.dumps(round(time.time() - started)))


def build(trunk_passes: float, steps: int) -> None:
    """Train a trunk on language, then the reward model, and store it as float16.

    :param trunk_passes: passes over the training text to learn language
    :param steps: batches of ``BATCH`` texts to learn sentiment
    """
    if (FOLDER / "model.safetensors").exists():
        return
    torch.manual_seed(1)
    started = time.time()
    real, sampled = training_text()
    language_model = new_model(hidden=160, layers=3, heads=5, key_heads=5, intermediate=432)
    validation = encode([s.text for s in movie_snippets()["validation"]])
    fit(language_model, encode(real) * 3 + encode(sampled), validation, trunk_passes, 3e-3, label="reward trunk")

    config = LlamaConfig.from_dict(language_model.config.to_dict())
    config.num_labels = 1
    config.pad_token_id = tokenizer.PAD
    config.reward_activation = "tanh"
    config.tie_word_embeddings = False
    config._attn_implementation = "eager"
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(language_model.model.state_dict())
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(config.hidden_size + 1))
    Trainer(model, "reward model").run(steps, learning_rate=1e-3, real_share=0.25, broken_share=0.2)
    _save(model, FOLDER, started)


def harden(steps: int) -> None:
    """Go on with more broken texts, the shipped form: a policy finds what is left of a reward model's blind spots."""
    if (HARDENED / "model.safetensors").exists():
        return
    torch.manual_seed(2)
    started = time.time()
    model = LlamaForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager")
    Trainer(model, "hardened reward model").run(steps, learning_rate=8e-4, real_share=0.25, broken_share=0.45)
    _save(model, HARDENED, started)
