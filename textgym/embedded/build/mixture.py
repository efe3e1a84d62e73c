"""A careful and a free writer in one model.

A model this small makes slips when it writes freely. Dividing its logits by a temperature below 1 makes its sentences
sounder, but real text much less probable, because every rare word then costs more, at every place. A mixture of whole
texts costs little: of

    p(y) = c · p_careful(y) + (1 - c) · p_free(y)

a share c of all samples is careful, and no text is less probable than (1 - c) · p_free(y): that is -log(1 - c) nats a
text, 0.08 nats a word for c = 0.84 and texts of 23 words.

Both writers are one language model. The free one is the model as it is; the careful one has its logits divided by
``CAREFUL_TEMPERATURE`` and spells known words only. The next piece of the mixture is known exactly,

    p(y_t | y_<t) = w_t · p_careful(y_t | y_<t) + (1 - w_t) · p_free(y_t | y_<t),    w_t = P(careful | y_<t),

with w_t from Bayes' rule and the two probabilities of the text so far. The model that is shipped learns these
distributions (distillation, Hinton et al. 2015). For that it has one layer more, which begins by changing nothing: it
has to tell from the text so far who is writing it, and to sharpen what the layers below predict where that is the
careful one.
"""

import copy
import json
import math
import random
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from . import tokenizer
from .distillation import save
from .language_model import encode, general_text, held_out_nats, real_snippets
from .sampling import KnownWords, sample
from .sources import CACHE, movie_snippets
from .steps import take_step
from .teacher import length_sorted_batches, padded
from .text import words

CAREFUL_TEMPERATURE = 0.55
CAREFUL_SHARE = 0.84
IMPOSSIBLE = -60.0  # log-probability of a word that the careful writer does not know


def known_words() -> KnownWords:
    """Return the careful writer's words: those of the train snippets, and those three times in the general text."""
    counts = Counter(word for text in general_text() for word in words(text))
    known = {word for text in real_snippets() for word in words(text)}
    return KnownWords(known | {word for word, count in counts.items() if count >= 3}, tokenizer.load())


class Mixture:
    """The distribution over texts that the shipped model learns.

    :param model: the language model that both writers are
    :param vocabulary: the words of the careful writer
    :param temperature: of the careful writer
    :param share: of the texts, the careful writer's
    """

    def __init__(self, model: LlamaForCausalLM, vocabulary: KnownWords, temperature: float, share: float) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.temperature, self.share = temperature, share

    def texts(self, rows: int, seed: int, careful: bool) -> list[list[int]]:
        """Return texts of one of the writers as ``<s> text </s>``."""
        narrowed: dict[str, Any] = {"temperature": self.temperature, "known_words": self.vocabulary} if careful else {}
        return [[tokenizer.BOS, *ids, tokenizer.EOS] for ids in sample(self.model, rows, seed, **narrowed) if ids]

    def careful_masks(self, ids: list[int]) -> tuple[Tensor, int]:
        """Return the pieces that the careful writer may choose at each place, bool [L - 1, V], and how many places
        it can reach: after an unknown word there is none."""
        masks = []
        begun: str | None = ""
        for piece in ids[1:]:
            if begun is None:
                break
            masks.append(self.vocabulary.allowed(begun))
            begun = "" if piece == tokenizer.EOS else self.vocabulary.after(begun, piece)
        reached = len(masks)
        return torch.stack(masks + [torch.ones_like(masks[0])] * (len(ids) - 1 - reached)), reached

    @torch.no_grad()
    def next_pieces(self, texts: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Return the mixture's distribution of the next piece at every place of the texts.

        :return: probabilities [N, V] of the places of all texts, one text after the other, and the probability
            [N] that the careful writer is writing
        """
        ids, _ = padded(texts, tokenizer.PAD)  # [B, L]
        hidden = self.model.model(ids).last_hidden_state  # [B, L, H]
        probs, weights = [], []
        for row, states in zip(texts, hidden, strict=True):
            following = torch.tensor(row[1:])[:, None]
            places = len(row) - 1
            masks, reached = self.careful_masks(row)
            logits = self.model.lm_head(states[:places]).float()  # [L - 1, V]
            free = logits.log_softmax(-1)
            careful = (logits / self.temperature).masked_fill(~masks, -math.inf).log_softmax(-1)
            gained = (careful.gather(1, following) - free.gather(1, following))[:, 0].clamp(min=IMPOSSIBLE)
            odds = math.log(self.share / (1 - self.share)) + gained.cumsum(0) - gained  # [L - 1] before each piece
            weight = odds.sigmoid()
            weight[reached:] = 0
            probs.append(weight[:, None] * careful.exp() + (1 - weight[:, None]) * free.exp())
            weights.append(weight)
        return torch.cat(probs), torch.cat(weights)


def deepened(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy with one layer more on top, a copy of the last whose outputs are zero: the same function."""
    config = copy.deepcopy(model.config)
    last = config.num_hidden_layers
    config.num_hidden_layers += 1
    deeper = LlamaForCausalLM(config)
    weights = model.state_dict()
    for name, weight in model.state_dict().items():
        if f".layers.{last - 1}." in name:
            zero = name.endswith(("o_proj.weight", "down_proj.weight"))
            weights[name.replace(f".{last - 1}.", f".{last}.")] = torch.zeros_like(weight) if zero else weight
    deeper.load_state_dict(weights)
    return deeper


def divergence(student: LlamaForCausalLM, texts: list[list[int]], wanted: Tensor) -> Tensor:
    """Return the mean KL divergence of the student from the distributions ``wanted`` [N, V], in nats a place."""
    ids, labels = padded(texts, tokenizer.PAD)  # [B, L]
    chosen = labels[:, 1:] != -100
    hidden = student.model(ids).last_hidden_state[:, :-1][chosen]  # [N, H]
    log_probs = student.lm_head(hidden).float().log_softmax(-1)  # [N, V]
    return (torch.xlogy(wanted, wanted) - wanted * log_probs).sum(-1).mean()


def build(steps: int, batch_size: int = 80, learning_rate: float = 2e-3) -> None:
    """Store the mixture of the averaged model's two manners, as one model.

    Only the new layer learns: when the others do, too, the free writer's probabilities of rare words suffer. In
    float32, because the posterior sums what the places of a text say, and their rounding.
    """
    folder = CACHE / "mixed_model"
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    rng = random.Random(0)
    started = reported = time.time()
    writer = AutoModelForCausalLM.from_pretrained(CACHE / "averaged_model", dtype=torch.float32).eval()
    mixture = Mixture(writer.requires_grad_(False), known_words(), CAREFUL_TEMPERATURE, CAREFUL_SHARE)
    parts = {
        0.45: [text for i in range(16) for text in mixture.texts(1000, 1000 + i, careful=True)],
        0.25: encode(real_snippets()),
        0.30: [text for i in range(6) for text in mixture.texts(1000, 2000 + i, careful=False)],
    }
    print(f"mixture: {[len(part) for part in parts.values()]} texts in {time.time() - started:.0f} s", flush=True)
    held_out = encode([s.text for s in movie_snippets()["validation"]])
    student = deepened(writer).requires_grad_(False)
    new_layer = student.model.layers[-1].requires_grad_(True)
    optimizer = torch.optim.AdamW(new_layer.parameters(), lr=learning_rate, betas=(0.9, 0.98), fused=True)
    step, running = 0, math.nan
    while step < steps:
        # a few batches at once, sorted by length
        texts = [text for share, part in parts.items() for text in rng.sample(part, round(share * batch_size) * 8)]
        for batch in length_sorted_batches(texts, batch_size, rng)[: steps - step]:
            rate = learning_rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            wanted, _ = mixture.next_pieces(batch)
            loss = divergence(student, batch, wanted)
            take_step(loss, new_layer, optimizer)
            running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
            step += 1
            if time.time() - reported > 60:
                reported = time.time()
                print(
                    f"mixture: step {step}/{steps} {time.time() - started:.0f} s divergence {running:.4f} nats a piece",
                    flush=True,
                )
    print(f"mixture: held out {held_out_nats(student, held_out):.4f} nats a piece", flush=True)
    save(student, folder)
    (folder / "seconds.json").write_text(json.dumps(round(time.time() - started)))
