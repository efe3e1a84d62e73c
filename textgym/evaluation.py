"""How good are a model's texts, and how far have they drifted? Samples on held-out prompts, with the usual figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from textgym.generation import complete_rows
from textgym.language_model import LanguageModel
from textgym.metrics import distinct_n
from textgym.prompts import PromptRow
from textgym.rewards import PrefixBatch, Reward


@dataclass
class Evaluation:
    """Completions of B prompts and what was measured on each."""

    prompts: list[str]
    completions: list[str]
    scores: np.ndarray  # (B,) Φ of prompt and completion
    kl: np.ndarray  # (B,) Σ_t log π − log π_ref over the completion, nats
    ref_log_prob: np.ndarray  # (B,) log π_ref of the completion, nats
    lengths: np.ndarray  # (B,) tokens, with the end-of-sequence token
    ended: np.ndarray  # (B,) bool, whether the completion ended by itself

    @property
    def perplexity(self) -> float:
        """Per token, of all completions under the reference model."""
        return float(np.exp(-self.ref_log_prob.sum() / self.lengths.sum()))

    @property
    def distinct_2(self) -> float:
        """Share of word pairs that are different from all others (Li et al. 2016)."""
        return distinct_n(self.completions, 2)

    def figures(self) -> dict[str, float]:
        """The means that a table shows."""
        return {
            "score": float(self.scores.mean()),
            "score_std": float(self.scores.std()),
            "positive": float((self.scores > 0).mean()),
            "kl": float(self.kl.mean()),
            "perplexity": self.perplexity,
            "distinct_2": self.distinct_2,
            "length": float(self.lengths.mean()),
            "eos_rate": float(self.ended.mean()),
        }


def evaluate(
    model: LanguageModel,
    reference: LanguageModel,
    reward: Reward,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> Evaluation:
    """Complete each prompt once and measure the texts.

    :param model: writes the completions
    :param reference: what KL and perplexity are measured against
    :param reward: Φ
    :param prompts: B texts, each shorter than the model's context by ``max_new_tokens``
    :param temperature: of sampling; log-probabilities are taken at the same temperature, as the environment does
    :param batch_size: completions written side by side
    :param seed: of the sampling
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = [PromptRow(prompt, {}) for prompt in prompts[start : start + batch_size]]
        batch = complete_rows(
            model,
            rows,
            [model.encode(row.prompt) for row in rows],
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            generator=generator,
        )
        log_prob = completion_log_probs(model, batch, temperature)
        ref_log_prob = completion_log_probs(reference, batch, temperature)
        parts.append((batch, reward.potentials(batch), log_prob - ref_log_prob, ref_log_prob))
    return Evaluation(
        prompts=list(prompts),
        completions=[completion for batch, *_ in parts for completion in batch.completions],
        scores=np.concatenate([scores for _, scores, _, _ in parts]),
        kl=np.concatenate([kl for _, _, kl, _ in parts]),
        ref_log_prob=np.concatenate([ref for *_, ref in parts]),
        lengths=np.concatenate([batch.completion_lengths for batch, *_ in parts]),
        ended=np.concatenate([batch.finished for batch, *_ in parts]),
    )


@torch.no_grad()
def completion_log_probs(model: LanguageModel, batch: PrefixBatch, temperature: float = 1.0) -> np.ndarray:
    """Log-probability of each completion given its prompt, ``(B,)`` in nats, from one teacher-forced pass."""
    ids = torch.as_tensor(batch.input_ids, device=model.device)
    hidden = model.cached(ids.shape[1]).hidden_states(ids)  # (B, L, H)
    counts = batch.completion_lengths
    rows = np.repeat(np.arange(len(batch)), counts)
    at = np.concatenate([np.arange(p, n) for p, n in zip(batch.prompt_lengths, batch.lengths, strict=True)])
    i, t = torch.as_tensor(rows, device=model.device), torch.as_tensor(at, device=model.device)
    chosen, _ = model.token_log_probs(hidden[i, t - 1], ids[i, t], temperature, with_entropy=False)
    return np.bincount(rows, weights=chosen.double().cpu().numpy(), minlength=len(batch))
