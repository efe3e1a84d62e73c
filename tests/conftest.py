"""Fixtures and settings that all tests share. The models themselves are made in tiny_models.py."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session", autouse=True)
def _state_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user's own state is not the tests': the key that runs of one's own are told by (agents/runs/trust.py)."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


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


# For tests that train reward models.
@pytest.fixture(scope="module")
def frozen_garbage() -> Iterator[None]:
    """Trainer collects garbage at its end, and the libraries' objects, which are none, take it most of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def pictures() -> None:
    """For tests that look at the report's picture, which takes longer than a small training."""


@pytest.fixture
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without a picture, but where a test asks for it."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("textgym.reward_training.report.draw_report", lambda report, path: None)


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """A directory with a tiny causal transformer and no head."""
    tiny_models.tiny_model("llama").save_pretrained(tmp_path / "untrained")
    tiny_models.tiny_tokenizer().save_pretrained(tmp_path / "untrained")
    return tmp_path / "untrained"
