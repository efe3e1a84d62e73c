"""Mean and standard deviation of a reward on texts of the reference model, for rewards that ask to be normalised."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from textgym.action_masks import masks_of
from textgym.generation import complete_texts
from textgym.language_model import LanguageModel
from textgym.prompts.fitting import FittedPrompt
from textgym.prompts.rows import PromptRow, PromptSource
from textgym.replies.base import Reply, aside
from textgym.rewards import Reward
from textgym.sampling import SamplingSettings

SAMPLES = 256
BATCH = 64


def calibrate(
    reward: Reward,
    model: LanguageModel,
    prompts: PromptSource,
    sampling: SamplingSettings,
    fit: Callable[[PromptRow], FittedPrompt],
    reply: Reply | None = None,
) -> None:
    """Sample complete texts from the reference model and calibrate every ``.normalized()`` part on their scores.

    The samples are the same in every run and touch no random state but their own.

    :param sampling: how an agent samples
    :param fit: cuts a prompt as the environment does
    :param reply: who speaks after each turn; afterwards it is as it was before
    :raises ReplyError: if the reply fails
    """
    masks = masks_of(sampling, model, model)
    rng, generator = np.random.default_rng(0), torch.Generator(device=model.device).manual_seed(0)
    batches = []
    with aside(reply, seed=0):
        for _ in range(SAMPLES // BATCH):
            fitted = [fit(prompts.sample(rng)) for _ in range(BATCH)]
            texts = complete_texts(model, fitted, sampling, masks=masks, generator=generator, reply=reply)
            batches.append(texts.batch(np.arange(BATCH)))
    reward.forget(np.arange(BATCH))
    for part in reward.uncalibrated():
        part.calibrate_on(*batches)
