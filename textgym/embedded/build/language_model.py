"""The language model: a Llama of some five million parameters, trained on the real and the sampled snippets.

One document is one snippet, ``<s> text </s>``, at positions 0, 1, 2, ...; batches hold documents of like
length. The test and validation snippets take no part, and sampled snippets that overlap with them are
dropped.
"""

import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from . import teacher, tokenizer
from .forward import hidden_states
from .sources import CACHE, brown_sentences, movie_snippets
from .steps import take_step
from .teacher import length_sorted_batches, padded
from .text import words

FOLDER = CACHE / "language_model"
TRAINING_TEXT = CACHE / "training_text.json"
MAX_PIECES = 72
_UNWANTED = re.compile(r"\b(?:\w*fuck\w*|\w*shit\w*|cunts?|nigg\w+|rap(?:e|es|ed|ist)|sluts?|whores?|fag\w*|porn\w*)\b")


def clean_samples(files: int | None = None) -> list[str]:
    """Return the teacher's snippets (of the first ``files`` files) that are worth learning from, each once.

    Dropped: very short and very long ones, copies of train snippets, any that share half of their 4-word
    sequences with one validation or test snippet, repeated 3-word sequences, coarse words, and rare words: a
    word must occur in the train snippets, three times in the Brown corpus, or in eight samples.
    """
    snippets = movie_snippets()
    texts = list(dict.fromkeys(teacher.samples(files)))
    documents = [set(words(text)) for text in texts]
    known = {word for s in snippets["train"] for word in words(s.text)}
    for counts, least in (
        (Counter(word for sentence in brown_sentences() for word in words(sentence)), 3),
        (Counter(word for document in documents for word in document), 8),
    ):
        known |= {word for word, count in counts.items() if count >= least}
    copies = {s.text for part in snippets.values() for s in part}
    owners: dict[tuple[str, ...], set[int]] = {}
    for i, snippet in enumerate(snippets["validation"] + snippets["test"]):
        tokens = words(snippet.text)
        for j in range(len(tokens) - 3):
            owners.setdefault(tuple(tokens[j : j + 4]), set()).add(i)

    kept = []
    for text, document in zip(texts, documents, strict=True):
        tokens = words(text)
        if not 4 <= len(tokens) <= 44 or text in copies or not document <= known or _UNWANTED.search(text):
            continue
        trigrams = [tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)]
        if len(set(trigrams)) < len(trigrams):
            continue
        shared = Counter(i for j in range(len(tokens) - 3) for i in owners.get(tuple(tokens[j : j + 4]), ()))
        if shared and max(shared.values()) >= 0.5 * max(1, len(tokens) - 3):
            continue
        kept.append(text)
    return kept


def real_snippets() -> list[str]:
    """Return the train snippets without the coarse ones."""
    return [s.text for s in movie_snippets()["train"] if not _UNWANTED.search(s.text)]


def general_text() -> list[str]:
    """Return the sentences of the Brown corpus that are neither very long nor coarse."""
    return [text for text in brown_sentences() if len(words(text)) <= 40 and not _UNWANTED.search(text)]


def training_text() -> tuple[list[str], list[str]]:
    """Return the real and the sampled snippets that the models learn from (stored once built)."""
    if not TRAINING_TEXT.exists():
        TRAINING_TEXT.write_text(json.dumps({"real": real_snippets(), "sampled": clean_samples()}))
    text = json.loads(TRAINING_TEXT.read_text())
    return text["real"], text["sampled"]


def encode(texts: list[str]) -> list[list[int]]:
    """Return ``<s> text </s>`` as ids, without the texts of more than ``MAX_PIECES`` pieces."""
    pieces = tokenizer.load()
    rows = [[tokenizer.BOS, *ids, tokenizer.EOS] for ids in pieces.encode(texts)]
    return [row for row in rows if len(row) <= MAX_PIECES]


def new_model(hidden: int, layers: int, heads: int, key_heads: int, intermediate: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.SIZE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=256,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=tokenizer.BOS,
        eos_token_id=tokenizer.EOS,
        pad_token_id=tokenizer.PAD,
        attn_implementation="eager",  # over rows of 30 tokens its backward pass is the faster one on a CPU
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():  # residual branches start small (GPT-2's initialisation)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers))
    return model


def nats(model: LlamaForCausalLM, batch: list[list[int]], reduction: str = "mean") -> Tensor:
    """Cross-entropy of the documents in ``batch`` (all pieces after ``<s>``, with ``</s>``) in nats.

    Where gradients are wanted, bfloat16 does; where not, the figure is to be exact.
    """
    ids, labels = padded(batch, tokenizer.PAD)  # [B, L]
    chosen = labels[:, 1:] != -100
    if torch.is_grad_enabled():
        hidden = hidden_states(model.model, ids)  # [B, L, H]
        logits = F.linear(hidden[:, :-1][chosen], model.lm_head.weight.bfloat16())  # [N, V]
    else:
        logits = model.lm_head(model.model(ids).last_hidden_state[:, :-1][chosen])  # [N, V]
    return F.cross_entropy(logits.float(), labels[:, 1:][chosen], reduction=reduction)


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay the matrices but neither the norms nor the embedding."""
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embed" in n]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def fit(
    model: LlamaForCausalLM,
    rows: list[list[int]],
    held_out: list[list[int]],
    passes: float,
    learning_rate: float,
    batch_size: int = 160,
    weight_decay: float = 0.05,
    label: str = "language model",
) -> None:
    """Train for ``passes`` over the shuffled documents; the learning rate falls to zero along a cosine."""
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay), lr=learning_rate, betas=(0.9, 0.98), fused=True
    )

    def batches() -> Iterator[list[list[int]]]:
        while True:
            yield from length_sorted_batches(rows, batch_size, rng)

    started = reported = time.time()
    seen = 0
    running = 0.0
    model.train()
    total = max(1, round(passes * len(rows) / batch_size))
    for step, batch in zip(range(total), batches(), strict=False):
        progress = step / total
        rate = learning_rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = nats(model, batch)
        take_step(loss, model, optimizer)
        seen += sum(len(row) for row in batch)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if time.time() - reported > 30:
            reported = time.time()
            rate_seen = seen / (reported - started)
            print(
                f"{label}: {progress:.0%} step {step} {seen / 1e6:.2f}M pieces ({rate_seen:.0f}/s) "
                f"loss {running:.3f} held out {held_out_nats(model, held_out):.4f}",
                flush=True,
            )


@torch.inference_mode()
def held_out_nats(model: LlamaForCausalLM, rows: list[list[int]]) -> float:
    """Mean nats per piece over ``rows``."""
    model.eval()
    batches = length_sorted_batches(rows, 256, random.Random(0))
    total = sum(nats(model, batch, "sum").item() for batch in batches)
    model.train()
    return total / sum(len(row) - 1 for row in rows)


def shipped_shape() -> LlamaForCausalLM:
    return new_model(hidden=256, layers=4, heads=4, key_heads=2, intermediate=704)


def pretrain(passes: float = 1.0) -> None:
    """Train on general English first: it is plentiful, and half of what a review sentence needs."""
    path = FOLDER.with_name("general_model") / "weights.pt"
    if path.exists():
        return
    torch.manual_seed(0)
    model = shipped_shape()
    held_out = encode([s.text for s in movie_snippets()["validation"]])
    fit(model, encode(general_text()), held_out, passes, learning_rate=2e-3, label="general text")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)


def build(passes: float, real_weight: int = 2) -> None:
    """Train the language model on snippets; ``distillation.distil`` goes on from here."""
    if (FOLDER / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    started = time.time()
    real, sampled = training_text()
    held_out = encode([s.text for s in movie_snippets()["validation"]])
    rows = encode(real) * real_weight + encode(sampled)
    model = shipped_shape()
    model.load_state_dict(torch.load(FOLDER.with_name("general_model") / "weights.pt"))
    size = sum(p.numel() for p in model.parameters())
    print(f"language model: {size / 1e6:.2f}M parameters, {len(rows)} documents", flush=True)
    fit(model, rows, held_out, passes, learning_rate=2e-3)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = True
    model.generation_config.max_length = 64
    model.to(torch.float16).save_pretrained(FOLDER)
    tokenizer.copy_files(FOLDER)
    (FOLDER / "seconds.json").write_text(json.dumps(round(time.time() - started)))
