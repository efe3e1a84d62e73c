"""Fixtures and settings that all tests share. The models themselves are made in tiny_models.py."""

from __future__ import annotations

import gc
import os
import shutil
from collections import Counter
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
from hypothesis import HealthCheck, settings
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import textgym.embedded

torch.set_num_threads(1)
# How long an example takes, and making it, says more of the machine.
settings.register_profile("textgym", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("textgym")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests come first and then those with many, so that no process is left alone with one at the end.
    slow = {item.path for item in items if "slow" in item.keywords}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))
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


@pytest.fixture(scope="module")
def runs_without_pictures() -> Iterator[None]:
    """Training runs end without drawing their curves, which takes longer than a run of a tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("textgym.agents.runs.training.plot_runs", lambda folders, output: None)
        yield


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny language model, for tests that open it and leave it as it is."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.tiny_model("llama").save_pretrained(path)
    tiny_models.tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def _narrow_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded models' directories by the names they have in textgym.embedded, as narrow models of random weights.

    Their tokenizer, their settings and what is built on top of them are those of the embedded models.
    """
    folder = tmp_path_factory.mktemp("narrow")
    kinds = {"LANGUAGE_MODEL": AutoModelForCausalLM, "REWARD_MODEL": AutoModelForSequenceClassification}
    for name, kind in kinds.items():
        source = getattr(textgym.embedded, name)
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
        config = AutoConfig.from_pretrained(source)
        config.update({"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 2})
        config.update({"intermediate_size": 64, "num_hidden_layers": 1, "initializer_range": 0.2})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kind.from_config(config).save_pretrained(folder / name)
    return {name: folder / name for name in kinds}


def _narrow_models(_narrow_directories: dict[str, Path]) -> Iterator[None]:
    """For tests of what is done with the embedded models, to which the texts and scores don't matter."""
    with pytest.MonkeyPatch.context() as patch:
        for name, path in _narrow_directories.items():
            patch.setattr(textgym.embedded, name, path)
        yield


narrow_embedded_models = pytest.fixture(_narrow_models)
narrow_embedded_models_throughout = pytest.fixture(_narrow_models, scope="module")  # for all tests of a file


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    """A directory with a tiny causal transformer and no head."""
    tiny_models.tiny_model("llama").save_pretrained(tmp_path / "untrained")
    tiny_models.tiny_tokenizer().save_pretrained(tmp_path / "untrained")
    return tmp_path / "untrained"
