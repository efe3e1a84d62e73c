"""Measures the shipped files and writes ``REPORT.md`` and ``report.json`` beside them.

Everything here is measured on the test snippets, which no model was fitted to, and on the models as they are
shipped (float16 weights, computed in float32).
"""

import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
)

from . import sentiment_teacher, tokenizer
from .language_model import general_text, nats, training_text
from .reward_model import agreement, end_scores, position_scores
from .sources import CACHE, Snippet, fetch, movie_snippets
from .text import words
from .trigram import InterpolatedTrigram, MixedTrigram


@torch.inference_mode()
def sample(model: LlamaForCausalLM, rows: int, seed: int, max_tokens: int = 64) -> list[list[int]]:
    """Return the pieces of ``rows`` samples from the full distribution at temperature 1, with no prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, 1), tokenizer.BOS)  # [B, L]
    ended = torch.zeros(rows, dtype=torch.bool)
    cache = None
    tokens = ids
    for _ in range(max_tokens):
        out = model(tokens, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        probs = out.logits[:, -1].float().softmax(-1)  # [B, V]
        tokens = torch.multinomial(probs, 1, generator=generator)
        tokens[ended] = tokenizer.PAD
        ended |= tokens[:, 0] == tokenizer.EOS
        ids = torch.cat([ids, tokens], dim=1)
        if ended.all():
            break
    return [[i for i in row[1:] if i not in (tokenizer.EOS, tokenizer.PAD)] for row in ids.tolist()]


def known_word_share(texts: list[str], known: set[str]) -> tuple[float, list[str]]:
    """Return the share of the words (not punctuation) that are in ``known``, and the words that are not."""
    found = [word for text in texts for word in words(text) if word[0].isalnum()]
    unknown = [word for word in found if word not in known]
    return 1 - len(unknown) / max(1, len(found)), unknown


def perplexities(model: LlamaForCausalLM) -> dict[str, Any]:
    """Return held-out perplexities per word (punctuation marks and the text's end count as words)."""
    snippets = movie_snippets()
    real, sampled, general = ([words(text) for text in part] for part in (*training_text(), general_text()))
    validation = [words(s.text) for s in snippets["validation"]]
    interpolated = InterpolatedTrigram(real * 2 + sampled + general, validation)  # as often as the model saw each
    mixed = MixedTrigram(
        {"real": real, "sampled": sampled, "real and sampled": real + sampled, "general": general}, validation
    )
    texts = [s.text for s in snippets["test"]]
    pieces = tokenizer.load()
    sums = {"all": np.zeros(3), "known": np.zeros(3)}  # nats of the language model and of the two trigrams
    counts = {"all": 0, "known": 0}
    piece_count = 0
    for text in texts:
        ids = [tokenizer.BOS, *pieces.encode(text), tokenizer.EOS]
        tokens = words(text)
        with torch.inference_mode():
            ours = nats(model, [ids], "sum").item()
        piece_count += len(ids) - 1
        for key in ["all"] + ["known"] * (set(tokens) <= mixed.known):
            sums[key] += [ours, interpolated.nats(tokens), mixed.nats(tokens)]
            counts[key] += len(tokens) + 1
    result: dict[str, Any] = {}
    for key, count in counts.items():
        model_perplexity, *trigrams = np.exp(sums[key] / count).tolist()
        result[key] = {"words": count, "language_model": model_perplexity}
        for name, value in zip(("interpolated_trigram", "kneser_ney_mixture"), trigrams, strict=True):
            result[key][name] = {"perplexity": value, "lower_by": 1 - model_perplexity / value}
    result["language_model_per_piece"] = math.exp(sums["all"][0] / piece_count)
    result["weights"] = {
        name: dict(zip(model.names, model.weights, strict=True))
        for name, model in (("interpolated_trigram", interpolated), ("kneser_ney_mixture", mixed))
    }
    return result


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

    real, sampled = training_text()
    known_in_snippets = {word for text in real + sampled for word in words(text)}
    known = known_in_snippets | {word for text in general_text() for word in words(text)}
    drawn = [pieces.decode(ids) for ids in sample(model, 500, seed=0)]
    share, unknown = known_word_share(drawn, known)
    snippet_share, _ = known_word_share(drawn, known_in_snippets)
    test_share, _ = known_word_share(texts, known)
    print(f"report: {share:.4f} of the sampled words are known", flush=True)

    judge = embedded.WordSentiment()
    sentiment = {
        "reward model (shipped)": agreement(end_scores(reward_model, texts), test),
        "TF-IDF + ridge (shipped as judge)": agreement(judge(prompts=[""] * len(texts), completions=texts), test),
        "VADER, lexicon and rules": agreement(vader_scores(texts), test),
        "MiniLM, tuned (teacher of the reward model)": agreement(sentiment_teacher.scores(texts), test),
    }
    seconds = {
        name: json.loads((CACHE / name / "seconds.json").read_text())
        for name in (
            "teacher",
            "sentiment_teacher",
            "language_model",
            "distilled_model",
            "reward_model",
            "hardened_reward_model",
        )
        if (CACHE / name / "seconds.json").exists()
    }
    sizes = {name: folder_bytes(assets / name) for name in ("language_model", "reward_model", "prompts", "judge")}
    figures = {
        "snippets": {split: len(part) for split, part in movie_snippets().items()},
        "training_text": {
            "real": len(real),
            "sampled": len(sampled),
            "general": len(general_text()),
            "distinct_words": len(known),
        },
        "parameters": {
            "language_model": sum(p.numel() for p in model.parameters()),
            "reward_model": sum(p.numel() for p in reward_model.parameters()),
        },
        "perplexity_per_word": perplexities(model),
        "known_words": {
            "share": share,
            "share_without_general_text": snippet_share,
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
    perplexity = figures["perplexity_per_word"]
    known = figures["known_words"]
    text = figures["training_text"]
    lines = [
        "# The embedded models: measurements",
        "",
        "Written by `python -m textgym.embedded.build report`; the same figures are in `report.json`. Everything is",
        "measured on the test snippets, which no model was fitted to, with the models as shipped.",
        "",
        f"Snippets: {figures['snippets']['train']} train, {figures['snippets']['validation']} validation (their "
        f"beginnings are the train prompts), {figures['snippets']['test']} test.",
        f"Training text: {text['real']} real and {text['sampled']} sampled snippets, after {text['general']} "
        f"sentences of general text; {text['distinct_words']} distinct words.",
        f"Prompts: {figures['prompts']['train']} train, {figures['prompts']['test']} test.",
        "",
        "## Language model",
        "",
        f"{figures['parameters']['language_model'] / 1e6:.2f} million parameters. Perplexity per word (punctuation "
        "marks and the end of the text count as words), beside those",
        "of an interpolated trigram on the same training text and of a mixture of four modified Kneser-Ney trigrams on "
        "its parts, all with",
        "weights tuned on the validation snippets. Unknown words are spelled by all three.",
        "",
        "| test snippets | words | language model | interpolated trigram | lower by | Kneser-Ney mixture | lower by |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for key, name in (("all", "all"), ("known", "those of known words only")):
        row = perplexity[key]
        cells = [f"{row['language_model']:.1f}"]
        for trigram in ("interpolated_trigram", "kneser_ney_mixture"):
            cells += [f"{row[trigram]['perplexity']:.1f}", f"{row[trigram]['lower_by']:.1%}"]
        lines.append(f"| {name} | {row['words']} | {' | '.join(cells)} |")
    weights = "; ".join(
        f"of the {model.replace('_', ' ')} " + ", ".join(f"{name} {weight:.2f}" for name, weight in parts.items())
        for model, parts in perplexity["weights"].items()
    )
    lines += [
        "",
        f"Language model per piece: {perplexity['language_model_per_piece']:.1f}. Weights {weights}.",
        "",
        f"Of the words in 500 samples at temperature 1, {known['share']:.2%} occur in the training text "
        f"({known['share_without_general_text']:.2%} in its snippets alone; of the words in the test snippets, "
        f"{known['share_in_test_snippets']:.2%} occur in the training text).",
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
