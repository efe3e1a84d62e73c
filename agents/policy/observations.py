"""What a policy reads of observations: the spaces that they come from, their tokens, and the masks of actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from textgym.language_model import LanguageModel
from textgym.vocabulary import is_encoder_decoder

Observation: TypeAlias = Any  # a mapping of names to arrays or tensors; checked when it is read


def check_spaces(observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """:raises ValueError: unless they are the spaces of a text environment"""
    names = ("input_ids", "attention_mask")
    fits = isinstance(observation_space, spaces.Dict) and set(names) <= set(observation_space.spaces)
    if not fits or not isinstance(action_space, spaces.Discrete):
        raise ValueError(
            "a language-model policy needs a text environment such as TextGen-v0, with observations "
            "Dict(input_ids, attention_mask, ...) and actions Discrete(V); "
            f"got {observation_space} and {action_space}"
        )


def check_model(language_model: LanguageModel, observation_space: spaces.Dict, action_space: spaces.Discrete) -> None:
    """Whether a policy can be made of a language model, in an environment with these spaces.

    :raises ValueError: if it has other tokens, frozen weights, or reads what observations don't have
    """
    if int(action_space.n) != language_model.vocab_size:
        raise ValueError(
            f"the environment has {int(action_space.n)} actions and the language model "
            f"{language_model.name} {language_model.vocab_size} tokens: give the policy the environment's own model"
        )
    if not any(p.requires_grad for p in language_model.model.parameters()):
        raise ValueError(
            f"all weights of the language model {language_model.name} are frozen, "
            "as a reference's are; give the policy its trainable_copy()"
        )
    if is_encoder_decoder(language_model.model.config) and "prompt_length" not in observation_space.spaces:
        raise ValueError(
            f"the language model {language_model.name} is an encoder-decoder: observations need "
            "prompt_length, which says what the encoder reads; this environment's have "
            f"{', '.join(sorted(observation_space.spaces))}"
        )


def check_keys(obs: Any, names: tuple[str, ...]) -> None:
    """:raises ValueError: unless an observation is a mapping that has these names"""
    if isinstance(obs, tuple):
        raise ValueError(
            "the observation is a tuple: Gymnasium's reset returns (observation, info), pass the first only"
        )
    if not isinstance(obs, Mapping) or not set(names) <= set(obs):
        got = f"a dict with keys {sorted(obs)}" if isinstance(obs, Mapping) else f"a {type(obs).__name__}"
        needed = f"{', '.join(names[:-1])} and {names[-1]}"
        raise ValueError(f"the observation must be a dict with {needed}, got {got}")


def read_tokens(
    obs: Observation, names: tuple[str, ...], context: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Checked token ids ``(B, L)``, lengths ``(B,)`` and, where they are read, prompt lengths ``(B,)``.

    :param obs: observations of B rows
    :param names: what is read of them
    :param context: L
    :param vocab_size: V
    :raises ValueError: if they are not right-padded rows of tokens
    """
    check_keys(obs, names)
    ids, mask = _as_numpy(obs["input_ids"]), _as_numpy(obs["attention_mask"])
    if ids.ndim != 2 or ids.shape[1] != context or mask.shape != ids.shape or not len(ids):
        raise ValueError(
            f"the observation has input_ids {ids.shape} and attention_mask {mask.shape}; "
            f"this policy reads (B, {context}) of each"
        )
    if ids.dtype.kind not in "iu":
        raise ValueError(f"input_ids must be whole numbers, got {ids.dtype}: were they normalised?")
    lengths = mask.sum(1, dtype=np.int64)
    real = np.arange(context) < lengths[:, None]
    if not (mask.astype(bool) == real).all() or (lengths < 1).any():
        raise ValueError("attention_mask must be ones, at least one, and then zeros (right padding)")
    if ((ids < 0) | (ids >= vocab_size))[real].any():
        raise ValueError(
            f"input_ids must lie between 0 and {vocab_size - 1}, got {int(ids[real].min())} to {int(ids[real].max())}"
        )
    return ids, lengths, _prompt_lengths(obs, lengths) if "prompt_length" in names else None


def _prompt_lengths(obs: Observation, lengths: np.ndarray) -> np.ndarray:
    """``(B,)`` tokens of each row that the encoder reads."""
    prompts = _as_numpy(obs["prompt_length"])
    if prompts.size != len(lengths) or prompts.dtype.kind not in "iu":
        raise ValueError(
            f"prompt_length has shape {prompts.shape} and type {prompts.dtype}, expected whole numbers "
            f"({len(lengths)}, 1)"
        )
    prompts = prompts.reshape(-1)
    if ((prompts < 1) | (prompts > lengths)).any():
        raise ValueError("prompt_length must lie between 1 and the number of tokens of its row")
    return prompts


def as_mask(action_masks: np.ndarray | Tensor | None, rows: int, language_model: LanguageModel) -> Tensor | None:
    """``(B, V)`` bool on the model's device; None where every token may be chosen.

    :param rows: B
    :raises ValueError: if it has another shape, or allows nothing in some row
    """
    if action_masks is None:
        return None
    masks = torch.as_tensor(action_masks, device=language_model.model.device).bool()
    if masks.shape != (rows, language_model.vocab_size):
        raise ValueError(f"action_masks has shape {tuple(masks.shape)}, expected {(rows, language_model.vocab_size)}")
    if not masks.any(1).all():
        raise ValueError("action_masks allows no token at all in some row")
    return masks


def _as_numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
