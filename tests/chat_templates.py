"""Chat templates of the usual families, written for the tests, and small chat models with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
from tiny_models import CHAT_SPECIAL, CHATML

START, END = CHAT_SPECIAL, CHAT_SPECIAL + 1  # <|im_start|> and <|im_end|>

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' +"
    " message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant'"
    " else message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
OPEN = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama 3": (LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), "<|endoftext|>"),
    "plain": (OPEN, (), "<|endoftext|>"),
}


def one(completions: list[str], **columns: Any) -> list[float]:
    """A reward that finds everything good."""
    return [1.0] * len(completions)


def make(path: Path | str, **options: Any) -> gym.Env[Any, Any]:
    """An environment on a chat model."""
    chosen: dict[str, Any] = {"prompts": ["hi"], "reward": one, "kl_coef": 0.0, "max_new_tokens": 8, **options}
    return gym.make("TextGen-v0", language_model=str(path), **chosen)


def write(env: gym.Env[Any, Any], ids: list[int]) -> tuple[bool, dict[str, Any]]:
    """Step tokens until the episode ends; whether it terminated, and the last info."""
    for token in ids:
        _, _, terminated, truncated, info = env.step(token)
        if terminated or truncated:
            break
    return terminated, info
