"""Text generation, token by token, as a Gymnasium environment, and agents that train language models in it.

Importing ``textgym`` registers the environment ids and nothing more: torch, transformers and
Stable-Baselines3 are loaded when ``textgym.envs``, ``textgym.agents`` or another part is first used. Each
part is an attribute, so ``import textgym`` is the only import a script needs::

    import gymnasium as gym, textgym

    env = gym.make("TextGen-v0")
    model = textgym.agents.PPO("LanguageModelPolicy", env)
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pkgutil
from typing import TYPE_CHECKING, Any

from textgym.registration import register_envs

if TYPE_CHECKING:
    from textgym import agents, embedded, envs, rewards

    __version__: str

__all__ = ["__version__", "agents", "embedded", "envs", "rewards"]


def _worth_saying(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


# peft imports bitsandbytes wherever it is installed, and bitsandbytes then remarks, on processors with bf16 products,
# that it has no fast 4-bit product. Nothing here uses one.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_worth_saying)


def __getattr__(name: str) -> Any:
    """Import a public part of the package on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        return version("textgym")
    if not name.startswith("_") and importlib.util.find_spec(f"textgym.{name}") is not None:
        return importlib.import_module(f"textgym.{name}")
    raise AttributeError(f"module 'textgym' has no attribute {name!r}")


def __dir__() -> list[str]:
    modules = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, *modules})


register_envs()
