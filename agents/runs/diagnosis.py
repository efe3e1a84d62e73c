"""What a run's held-out figures say when something went wrong, in a line each."""

from __future__ import annotations

from collections.abc import Mapping

FAR_PER_TOKEN = 1.0  # nats: of each token the reference thinks e times less likely than the policy does
# Times the perplexity before training: SmolLM2 writes word salad at 1.7, and 1.1 is chance in 64 short texts.
UNLIKELY = 1.5
MOSTLY = 0.9


def diagnose(first: Mapping[str, float], last: Mapping[str, float]) -> list[str]:
    """Sentences about what a user should look at; none where nothing is conspicuous.

    :param first: figures of the evaluation before training, see :func:`~textgym.agents.runs.held_out.held_out_figures`
    :param last: of the newest evaluation
    """
    found = []
    paid = any(figures.get("reply_reward") for figures in (first, last))  # by replies: the score is not all that counts
    if paid:
        if last["return"] < first["return"]:
            found.append(f"what a text is worth fell from {first['return']:.3g} to {last['return']:.3g}")
    elif last["score_std"] == 0 and first["score_std"] == 0:
        found.append(
            f"all texts have the same score, {last['score']:g}, before training and after: there is nothing to learn "
            "from this reward on these prompts"
        )
    elif last["zero"] >= MOSTLY:
        found.append(
            f"{last['zero']:.0%} of the scores are 0: the reward seldom says what is better; one that rises step by "
            "step towards what you want teaches more"
        )
    if not paid and last["score_high"] < first["score_low"]:
        found.append(f"the score fell from {first['score']:.3g} to {last['score']:.3g}")
    if last.get("ended") == 0:
        found.append("no text ended by itself: all were cut off at max_new_tokens; give more, or a missing_eos_penalty")
    if last["perplexity"] >= UNLIKELY * first["perplexity"]:
        found.append(
            f"the perplexity under the reference rose from {first['perplexity']:.3g} to {last['perplexity']:.3g}: the "
            f"texts are far from what it writes, so read samples.md; {_KEEP_NEAR}"
        )
    elif last["kl"] >= FAR_PER_TOKEN * last["length"]:
        found.append(
            f"the KL to the reference is {last['kl'] / last['length']:.2g} nats per token: the policy has left it far "
            f"behind, so read samples.md; {_KEEP_NEAR}"
        )
    if 0 < last["distinct_2"] <= first["distinct_2"] / 2:
        found.append(
            f"the texts have become alike: distinct-2 fell from {first['distinct_2']:.3f} to {last['distinct_2']:.3f}"
        )
    return found


_KEEP_NEAR = "a greater kl_coef, a kl_target or a smaller learning_rate keeps it nearer"
