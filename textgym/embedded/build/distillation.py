"""Soft labels: what the tuned SmolLM2 holds likely at every place of the training text, for the small model to learn.

A sentence shows the small model one next word at each place; the teacher's probabilities show it all the words
that fit there. The two have different vocabularies, but both spell the same text, so wherever a piece of both ends
at the same character, the teacher's most probable next pieces can be handed on: those that our vocabulary has as
one piece too, and that are not mere beginnings of rarer words. What probability is left over belongs to all other
pieces together; which of them, and what follows at every other place, the text itself says.
"""

import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from . import teacher, tokenizer
from .forward import hidden_states
from .language_model import (
    MAX_PIECES,
    encode,
    general_text,
    held_out_nats,
    parameter_groups,
    training_text,
)
from .sources import CACHE, movie_snippets
from .steps import run_processes, take_step
from .text import words

FOLDER = CACHE / "soft_labels"
WIDTH = 24  # the teacher's pieces kept at each place
REAL_WEIGHT = 2  # how often a real snippet is seen for each time a sampled one is
REAL_HARD = 0.2  # how much of a real snippet's loss is the ordinary one


@dataclass
class LabelledText:
    """One document with its soft labels.

    ids: ``<s> text </s>`` in our pieces, [L]; at place i the model predicts ids[i + 1]
    places: the places with soft labels, [P]
    labels: piece ids, [P, WIDTH], padded with 0 where ``shares`` is 0
    shares: their probabilities, [P, WIDTH]
    """

    ids: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    shares: np.ndarray


def piece_map(vocabulary: teacher.CutVocabulary, common: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return our id for each of the teacher's pieces, inside a text and at its start, -1 where there is none."""
    ours = tokenizer.load()
    index = {ours.id_to_piece(i): i for i in range(len(ours)) if not (ours.is_byte(i) or ours.is_control(i))}
    inside = np.full(len(vocabulary.kept), -1)
    at_start = np.full(len(vocabulary.kept), -1)
    for i, token in enumerate(vocabulary.tokenizer.convert_ids_to_tokens(vocabulary.kept)):
        word = token.removeprefix("Ġ")
        if token.startswith("Ġ") and word in common:
            inside[i] = index.get("▁" + word, -1)
        elif not token.startswith("Ġ"):
            inside[i] = index.get(token, -1)
            if word in common:
                at_start[i] = index.get("▁" + word, -1)
    inside[teacher.EOS] = at_start[teacher.EOS] = tokenizer.EOS
    return inside, at_start


def _ends(pieces: Iterable[str]) -> list[int]:
    """Return after how many characters each piece ends."""
    return np.cumsum([len(piece) for piece in pieces]).tolist()


@torch.inference_mode()
def _label(texts: list[str], threads: int, path: Path) -> None:
    torch.set_num_threads(threads)
    kept = json.loads((teacher.FOLDER / "vocabulary.json").read_text())
    vocabulary = teacher.CutVocabulary(AutoTokenizer.from_pretrained(teacher.FOLDER), kept)
    model = AutoModelForCausalLM.from_pretrained(teacher.FOLDER, dtype=torch.bfloat16, attn_implementation="eager")
    ours = tokenizer.load()
    real, sampled = training_text()
    common = {word for part in (real, sampled, general_text()) for text in part for word in words(text)}
    inside, at_start = piece_map(vocabulary, common)
    result: list[LabelledText | None] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    started = time.time()
    for start in range(0, len(order), 96):
        chosen = [i for i in order[start : start + 96] if vocabulary.encode(texts[i])]
        rows = [row for i in chosen if (row := vocabulary.encode(texts[i]))]
        if not rows:
            continue
        ids, _ = teacher.padded(rows, teacher.EOS)  # [B, L]
        hidden = model.model(ids).last_hidden_state  # [B, L, H]
        for i, row, states in zip(chosen, rows, hidden, strict=True):
            our_ids = ours.encode(texts[i])
            if len(our_ids) > MAX_PIECES - 2:
                continue
            tokens = vocabulary.tokenizer.convert_ids_to_tokens([kept[piece] for piece in row[1:-1]])
            # our first piece begins with the dummy prefix, one character before the text
            our_ends = [0, *(end - 1 for end in _ends(ours.id_to_piece(our_ids)))]
            their_place = {end: place for place, end in enumerate([0, *_ends(tokens)])}
            places = [place for place, end in enumerate(our_ends) if end in their_place]
            theirs = [their_place[our_ends[place]] for place in places]
            probs, best = model.lm_head(states[theirs]).float().softmax(-1).topk(WIDTH, dim=-1)  # [P, WIDTH]
            labels = inside[best.numpy()]
            if places and places[0] == 0:
                labels[0] = at_start[best[0].numpy()]
            shares = np.where(labels >= 0, probs.numpy(), 0)
            result[i] = LabelledText(
                np.array([tokenizer.BOS, *our_ids, tokenizer.EOS], dtype=np.int16),
                np.array(places, dtype=np.int16),
                np.maximum(labels, 0).astype(np.int16),
                shares.astype(np.float16),
            )
        if (start // 96) % 20 == 19:
            print(f"soft labels: {start + 96}/{len(texts)} in {time.time() - started:.0f} s", flush=True)
    torch.save([r for r in result if r is not None], path)


def build(processes: int = 2) -> None:
    """Label the real and the sampled snippets."""
    if FOLDER.exists():
        return
    real, sampled = training_text()
    temporary = FOLDER.with_name("soft_labels.part")
    temporary.mkdir(parents=True, exist_ok=True)
    context = torch.multiprocessing.get_context("fork")
    jobs = {f"{name}-{i}.pt": part[i::processes] for name, part in (("real", real), ("sampled", sampled))
            for i in range(processes)}  # fmt: skip
    workers = [
        context.Process(target=_label_all, args=([(jobs[f"{name}-{i}.pt"], temporary / f"{name}-{i}.pt")
                                                  for name in ("real", "sampled")],))
        for i in range(processes)
    ]  # fmt: skip
    run_processes(workers, "labelling")
    temporary.rename(FOLDER)


def _label_all(jobs: list[tuple[list[str], Path]]) -> None:
    for texts, path in jobs:
        _label(texts, 1, path)


def load(name: str) -> list[LabelledText]:
    """Return the labelled texts of one part: "real" or "sampled"."""
    paths = sorted(FOLDER.glob(f"{name}-*.pt"))
    return [text for path in paths for text in torch.load(path, weights_only=False)]


def soft_nats(model: LlamaForCausalLM, batch: list[LabelledText], hard: Tensor) -> Tensor:
    """Mean cross-entropy in nats between the model and what the teacher knows of each place, in bfloat16.

    The teacher's kept pieces form a distribution with one part more, "any other piece", which has the rest of the
    probability; the model is to give each part its share. What the other pieces are among themselves it learns
    from the text: where the piece that really follows is one of them, its probability among them counts. The
    expectation of this over texts from the teacher is the cross-entropy with the teacher's whole distribution.

    :param hard: ``(B,)`` how much of each text's loss is the ordinary cross-entropy with the piece that follows
    """
    length = max(len(text.ids) for text in batch)
    ids = torch.full((len(batch), length), tokenizer.PAD)  # [B, L]
    labels = torch.zeros(len(batch), length - 1, WIDTH, dtype=torch.long)
    shares = torch.zeros(len(batch), length - 1, WIDTH)
    for i, text in enumerate(batch):
        ids[i, : len(text.ids)] = torch.from_numpy(text.ids)
        places = torch.from_numpy(text.places).long()
        labels[i, places] = torch.from_numpy(text.labels).long()
        shares[i, places] = torch.from_numpy(text.shares).float()
    following = ids[:, 1:]
    chosen = following != tokenizer.PAD
    hidden = hidden_states(model.model, ids)[:, :-1][chosen]  # [N, H]
    logits = F.linear(hidden, model.lm_head.weight.bfloat16()).float()  # [N, V]
    labels, shares, actual = labels[chosen], shares[chosen], following[chosen]  # [N, WIDTH], [N, WIDTH], [N]
    hard = hard[:, None].expand(-1, length - 1)[chosen]  # [N]

    total = logits.logsumexp(-1)  # [N]
    of_kept = logits.gather(1, labels) - total[:, None]  # [N, WIDTH] log-probabilities
    of_actual = logits.gather(1, actual[:, None])[:, 0] - total
    kept = shares > 0
    others = -torch.where(kept, of_kept.exp(), 0).sum(-1)  # [N] minus the probability of all kept pieces
    of_others = torch.log1p(others.clamp(min=-(1 - 1e-4)))  # [N]
    among_others = ~(kept & (labels == actual[:, None])).any(-1)
    soft = -(shares * of_kept).sum(-1) - (1 - shares.sum(-1)).clamp(min=0) * of_others
    soft = soft - torch.where(among_others, of_actual - of_others, 0)
    return ((1 - hard) * soft - hard * of_actual).mean()


def distil(
    passes: float, start: str, name: str, seed: int = 0, learning_rate: float = 1e-3, batch_size: int = 160
) -> None:
    """Go on from the model of one stage, now with soft labels; store float16, the shipped form, as another stage.

    What is stored is the mean of the weights over the last three quarters of the steps, at a constant learning rate
    (stochastic weight averaging, Izmailov et al. 2018): a learning rate that falls to zero fits the texts too closely
    here, the perplexity on held-out snippets rises while the loss falls.
    """
    folder = CACHE / name
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(seed)
    rng = random.Random(seed)
    started = reported = time.time()
    model = AutoModelForCausalLM.from_pretrained(CACHE / start, dtype=torch.float32)
    mean = AveragedModel(model)
    # a person wrote the real snippets, so what really follows is worth something there; elsewhere it is the teacher's
    texts = [(text, REAL_HARD) for text in load("real") * REAL_WEIGHT] + [(text, 0.0) for text in load("sampled")]
    held_out = encode([s.text for s in movie_snippets()["validation"]])
    total = round(passes * len(texts) / batch_size)
    print(f"distillation: {len(texts)} texts, {total} steps", flush=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=learning_rate, betas=(0.9, 0.98), fused=True)
    step = 0
    running = 0.0
    while step < total:
        order = sorted(texts, key=lambda pair: (len(pair[0].ids), rng.random()))
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        rng.shuffle(batches)
        for batch in batches[: total - step]:
            rate = learning_rate * min(1.0, (step + 1) / 100)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = soft_nats(model, [text for text, _ in batch], torch.tensor([hard for _, hard in batch]))
            take_step(loss, model, optimizer)
            running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
            step += 1
            if step > total // 4:
                mean.update_parameters(model)
            if time.time() - reported > 45:
                reported = time.time()
                held = held_out_nats(cast(LlamaForCausalLM, mean.module), held_out)
                print(
                    f"distillation: step {step}/{total} {time.time() - started:.0f} s loss {running:.3f} "
                    f"held out, mean of weights {held:.4f}",
                    flush=True,
                )
    model = cast(LlamaForCausalLM, mean.module)
    save(model, folder)
    (folder / "seconds.json").write_text(json.dumps(round(time.time() - started)))


def average(first: str, second: str, name: str) -> None:
    """Store the mean of the weights of two stages.

    Two models on from the same beginning average to a better one than either (Wortsman et al. 2022, "Model soups").
    """
    folder = CACHE / name
    if (folder / "model.safetensors").exists():
        return
    model = AutoModelForCausalLM.from_pretrained(CACHE / first, dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(CACHE / second, dtype=torch.float32)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_((mine + theirs) / 2)
    save(model, folder)


def save(model: LlamaForCausalLM, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.do_sample = True
    model.generation_config.max_length = 64
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.copy_files(folder)
