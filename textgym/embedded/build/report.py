"""Measures the shipped files and writes ``REPORT.md`` and ``report.json`` beside them.

Everything here is measured on the test snippets, which no model was fitted to, and on the models as they are
shipped (float16 weights, computed in float32). What the shipped models are compared with and is not shipped itself,
the trigrams and the reward model's teacher, is measured while the build's folder has it; else its figures stay those
of the report before.
"""

import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from . import sentiment_teacher, tokenizer
from .language_model import TRAINING_TEXT, general_text, nats, real_snippets, training_text
from .reward_model import agreement, end_scores, position_scores
from .sampling import sample
from .sources import CACHE, Snippet, fetch, movie_snippets
from .text import words
from .trigram import InterpolatedTrigram, MixedTrigram


def known_word_share(texts: list[str], known: set[str]) -> tuple[float, list[str]]:
    """Return the share of the words (not punctuation) that are in ``known``, and the words that are not."""
    found = [word for text in texts for word in words(text) if word[0].isalnum()]
    unknown = [word for word in found if word not in known]
    return 1 - len(unknown) / max(1, len(found)), unknown


def language_model_perplexity(model: LlamaForCausalLM) -> dict[str, float]:
    """Return the perplexity per word of the test snippets (punctuation marks and a text's end count as words)."""
    texts = [s.text for s in movie_snippets()["test"]]
    rows = [[tokenizer.BOS, *ids, tokenizer.EOS] for ids in tokenizer.load().encode(texts)]
    with torch.inference_mode():
        total = sum(nats(model, [row], "sum").item() for row in rows)
    word_count = sum(len(words(text)) + 1 for text in texts)
    piece_count = sum(len(row) - 1 for row in rows)
    return {
        "words": word_count,
        "language_model": math.exp(total / word_count),
        "language_model_per_piece": math.exp(total / piece_count),
    }


def trigram_perplexities() -> dict[str, Any]:
    """Return the same of the two trigrams, the weights they were given, and how much text they learned from."""
    snippets = movie_snippets()
    real, sampled, general = ([words(text) for text in part] for part in (*training_text(), general_text()))
    validation, test = ([words(s.text) for s in snippets[split]] for split in ("validation", "test"))
    trigrams = {
        # as often as the language model saw each part
        "interpolated_trigram": InterpolatedTrigram(real * 2 + sampled + general, validation),
        "kneser_ney_mixture": MixedTrigram(
            {"real": real, "sampled": sampled, "real and sampled": real + sampled, "general": general}, validation
        ),
    }
    word_count = sum(len(tokens) + 1 for tokens in test)
    return {
        "training_text": {"real": len(real), "sampled": len(sampled), "general": len(general)},
        "perplexity": {
            name: math.exp(sum(trigram.nats(tokens) for tokens in test) / word_count)
            for name, trigram in trigrams.items()
        },
        "weights": {name: dict(zip(trigram.names, trigram.weights, strict=True)) for name, trigram in trigrams.items()},
    }


def vader_scores(texts: list[str]) -> list[float]:
    """Return the compound scores of VADER, the rule-based scorer that comes in the same archive as the snippets."""
    [path] = fetch("vaderSentiment").glob("*/vaderSentiment/vaderSentiment.py")
    spec = importlib.util.spec_from_file_location("vaderSentiment.vaderSentiment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def prefix_agreement(model: Any, snippets: list[Snippet]) -> dict[str, tuple[float, float]]:
    """Return accuracy and Pearson's r of the score at 25, 50, 75 and 100 % of the pieces, and after ``</s>``."""
    pieces = tokenizer.load()
    result = {}
    encoded = [pieces.encode(s.text) for s in snippets]
    for percent in (25, 50, 75, 100):
        scores = []
        for ids in encoded:
            prefix = [tokenizer.BOS, *ids[: math.ceil(len(ids) * percent / 100)]]
            with torch.inference_mode():
                scores.append(position_scores(model, torch.tensor([prefix]))[0, -1].item())
        result[f"{percent} %"] = agreement(scores, snippets)
    result["with </s>"] = agreement(end_scores(model, [s.text for s in snippets]), snippets)
    return result


def folder_bytes(folder: Path, leave_out: tuple[str, ...] = ()) -> int:
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.relative_to(folder).parts[0] not in leave_out
    )


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def write(assets: Path) -> None:
    """Measure the assets in the folder ``assets`` and write the report into it."""
    import textgym.embedded as embedded

    load_seconds = {
        "language model": _seconds(lambda: AutoModelForCausalLM.from_pretrained(assets / "language_model")),
        "reward model": _seconds(lambda: AutoModelForSequenceClassification.from_pretrained(assets / "reward_model")),
        "tokenizer": _seconds(lambda: AutoTokenizer.from_pretrained(assets / "language_model")),
    }
    model = AutoModelForCausalLM.from_pretrained(assets / "language_model", dtype=torch.float32).eval()
    reward_model = AutoModelForSequenceClassification.from_pretrained(
        assets / "reward_model", dtype=torch.float32
    ).eval()
    test = movie_snippets()["test"]
    texts = [s.text for s in test]
    pieces = tokenizer.load()

    # words of the sampled snippets that stand in none of these don't count
    known = {word for text in real_snippets() + general_text() for word in words(text)}
    drawn = [pieces.decode(ids) for ids in sample(model, 500, seed=0)]
    share, unknown = known_word_share(drawn, known)
    test_share, _ = known_word_share(texts, known)
    print(f"report: {share:.4f} of the sampled words are known", flush=True)

    earlier = json.loads((assets / "report.json").read_text())
    trigrams = trigram_perplexities() if TRAINING_TEXT.exists() else earlier["trigrams"]
    perplexity = language_model_perplexity(model)
    lower_by = {name: 1 - perplexity["language_model"] / value for name, value in trigrams["perplexity"].items()}
    teacher = "MiniLM, tuned (teacher of the reward model)"
    if sentiment_teacher.FOLDER.exists():
        teacher_agreement = agreement(sentiment_teacher.scores(texts), test)
    else:
        teacher_agreement = earlier["sentiment"][teacher]

    judge = embedded.WordSentiment()
    sentiment = {
        "reward model (shipped)": agreement(end_scores(reward_model, texts), test),
        "TF-IDF + ridge (shipped as judge)": agreement(judge(prompts=[""] * len(texts), completions=texts), test),
        "VADER, lexicon and rules": agreement(vader_scores(texts), test),
        teacher: teacher_agreement,
    }
    seconds = earlier["training_seconds"] | {
        name: json.loads((CACHE / name / "seconds.json").read_text())
        for name in (
            "teacher",
            "sentiment_teacher",
            "language_model",
            "distilled_model",
            "mixed_model",
            "reward_model",
            "hardened_reward_model",
        )
        if (CACHE / name / "seconds.json").exists()
    }
    sizes = {name: folder_bytes(assets / name) for name in ("language_model", "reward_model", "prompts", "judge")}
    figures = {
        "snippets": {split: len(part) for split, part in movie_snippets().items()},
        "parameters": {
            "language_model": sum(p.numel() for p in model.parameters()),
            "reward_model": sum(p.numel() for p in reward_model.parameters()),
        },
        "perplexity": {**perplexity, "lower_by": lower_by},
        "trigrams": trigrams,
        "known_words": {
            "distinct": len(known),
            "share": share,
            "share_in_test_snippets": test_share,
            "unknown": unknown,
        },
        "sentiment": sentiment,
        "sentiment_of_prefixes": prefix_agreement(reward_model, test),
        "bytes": {**sizes, "together": folder_bytes(assets, leave_out=("build",))},
        "load_seconds": load_seconds,
        "training_seconds": seconds,
        "prompts": {split: len(embedded.load_prompts(split)) for split in ("train", "test")},
    }
    (assets / "report.json").write_text(json.dumps(figures, indent=1) + "\n")
    (assets / "REPORT.md").write_text(_markdown(figures, drawn[:50]))


def _markdown(figures: dict[str, Any], samples: list[str]) -> str:
    perplexity = figures["perplexity"]
    trigrams = figures["trigrams"]
    known = figures["known_words"]
    text = trigrams["training_text"]
    lines = [
        "# The embedded models: measurements",
        "",
        "Written by `python -m textgym.embedded.build report`; the same figures are in `report.json`. Everything is",
        "measured on the test snippets, which no model was fitted to, with the models as shipped.",
        "",
        f"Snippets: {figures['snippets']['train']} train, {figures['snippets']['validation']} validation (their "
        f"beginnings are the train prompts), {figures['snippets']['test']} test.",
        f"Training text: {text['real']} real and {text['sampled']} sampled snippets, after {text['general']} "
        "sentences of general text.",
        f"Prompts: {figures['prompts']['train']} train, {figures['prompts']['test']} test.",
        "",
        "## Language model",
        "",
        f"{figures['parameters']['language_model'] / 1e6:.2f} million parameters. Perplexity per word (punctuation "
        "marks and the end of the text count as words), beside those",
        "of an interpolated trigram on the same training text and of a mixture of four modified Kneser-Ney trigrams on "
        "its parts, all with",
        "weights tuned on the validation snippets. Unknown words are spelled by all three. Where the teacher's",
        "snippets are not at hand, the trigrams' figures are those of the report before.",
        "",
        f"| {perplexity['words']} words of the test snippets | perplexity | the language model's is lower by |",
        "| --- | ---: | ---: |",
        f"| language model | {perplexity['language_model']:.1f} | |",
        *(
            f"| {label} | {trigrams['perplexity'][name]:.1f} | {perplexity['lower_by'][name]:.1%} |"
            for name, label in (
                ("interpolated_trigram", "interpolated trigram"),
                ("kneser_ney_mixture", "Kneser-Ney mixture"),
            )
        ),
    ]
    weights = "; ".join(
        f"of the {model.replace('_', ' ')} " + ", ".join(f"{name} {weight:.2f}" for name, weight in parts.items())
        for model, parts in trigrams["weights"].items()
    )
    lines += [
        "",
        f"Language model per piece: {perplexity['language_model_per_piece']:.1f}. Weights {weights}.",
        "",
        f"Of the words in 500 samples at temperature 1, {known['share']:.2%} occur in the real snippets or the general "
        f"text ({known['distinct']} words; the sampled snippets have more, so this is the least it can be). Of the "
        f"words in the test snippets, {known['share_in_test_snippets']:.2%} do.",
        "",
        "## Reward model",
        "",
        f"{figures['parameters']['reward_model'] / 1e6:.2f} million parameters. Measured on the test snippets with a "
        "human score beyond ±0.5.",
        "",
        "| scorer | accuracy | Pearson |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {a:.3f} | {r:.3f} |" for name, (a, r) in figures["sentiment"].items()),
        "",
        "The reward model on prefixes, against the score of the whole snippet:",
        "",
        "| prefix | accuracy | Pearson |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {a:.3f} | {r:.3f} |" for name, (a, r) in figures["sentiment_of_prefixes"].items()),
        "",
        "## Size and time",
        "",
        "| files | MB |",
        "| --- | ---: |",
        *(f"| {name} | {size / 1e6:.2f} |" for name, size in figures["bytes"].items()),
        "",
        "Seconds to load: "
        + ", ".join(f"{name} {value:.2f}" for name, value in figures["load_seconds"].items())
        + ". Seconds to train: "
        + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures["training_seconds"].items())
        + ".",
        "",
        "## Fifty samples of the language model",
        "",
        "At temperature 1, the first fifty of the 500, nothing left out.",
        "",
        *(f"{i + 1}. {sample}" for i, sample in enumerate(samples)),
        "",
    ]
    return "\n".join(lines)
