"""Fixtures and settings that all tests share. The models themselves are made in tiny_models.py."""

from __future__ import annotations

import os

# Before transformers is imported: no test may reach for a model hub, and its processes share the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import tiny_models
import torch
from transformers import LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    """Every test starts from the same random state, alone or among others, in whatever order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return tiny_models.tiny_tokenizer()


# Models are made anew for every test: a test may train them.
@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    return tiny_models.tiny_model("llama")


@pytest.fixture
def tiny_causal_reward_model() -> LlamaForSequenceClassification:
    return tiny_models.tiny_causal_reward_model()
