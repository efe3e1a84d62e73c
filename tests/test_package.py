"""The package as it is imported and installed: ids, lazy parts, the list of subpackages, the test models."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from typing import Any

import gymnasium
import pytest
import torch
from places import ROOT
from tiny_models import ARCHITECTURES, CONTEXT, EOS, PAD, VOCABULARY, tiny_model

import textgym
from textgym.agents.names import HOME
from textgym.registration import ENVIRONMENTS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDERS = {"textgym": "textgym", "envs": "textgym.envs", "agents": "textgym.agents"}
NOT_SHIPPED = {"textgym.embedded.build"}


def python(code: str) -> str:
    """What ``code`` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_textgym_loads_neither_torch_nor_stable_baselines3():
    heavy = "{'torch', 'transformers', 'stable_baselines3', 'matplotlib'}"
    assert python(f"import sys, textgym; print(sorted({heavy} & set(sys.modules)))") == "[]"


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """What a fresh interpreter finds: what an agent has loaded, and the parts that are there after ``import textgym``.

    For each part textgym is imported anew, and what it takes seconds to import for it is not.
    """
    code = (
        "import json, sys, textgym\n"
        "textgym.agents.PPO\n"
        "heavy = {'transformers.trainer', 'peft', 'datasets', 'sb3_contrib'} & set(sys.modules)\n"
        "found = []\n"
        f"for part in {sorted(textgym.__all__)}:\n"
        "    for name in [name for name in sys.modules if name.split('.')[0] == 'textgym']:\n"
        "        del sys.modules[name]\n"
        "    import textgym\n"
        "    found += [part] if hasattr(textgym, part) else []\n"
        "print(json.dumps({'loaded': sorted(heavy), 'parts': found}))"
    )
    found: dict[str, Any] = json.loads(python(code))
    return found


def test_using_an_agent_does_not_load_the_trainer_of_transformers(fresh):
    """It takes seconds, and brings whatever is installed beside it."""
    assert fresh["loaded"] == []


def test_help_is_shown_without_loading_what_takes_seconds():
    commands = [[], ["train"], ["generate"], ["evaluate"], ["train-reward"], ["sft"], ["rewards"]]
    code = (
        "import sys\nfrom textgym.agents.cli.main import main\n"
        f"for command in {commands}:\n"
        "    sys.argv = ['textgym', *command, '--help']\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "    heavy = {'torch', 'transformers', 'stable_baselines3', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        "    print('loaded:', command, sorted(heavy))"
    )
    shown = python(code).splitlines()
    assert [line for line in shown if "loaded:" in line] == [f"loaded: {command} []" for command in commands]
    assert sum("Usage" in line for line in shown) >= len(commands)


def test_each_public_name_of_the_agents_stands_in_one_table_and_is_found():
    tree = ast.parse((ROOT / "agents" / "__init__.py").read_text(encoding="utf-8"))
    for_type_checkers = {
        alias.name: node.module.removeprefix("textgym.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module not in ("__future__", "typing", "textgym.agents.names")
        for alias in node.names
    }
    assert for_type_checkers == HOME
    assert set(textgym.agents.__all__) == set(HOME) == set(dir(textgym.agents)) & set(HOME)
    for name in HOME:
        assert getattr(textgym.agents, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'PPOO'"):
        _ = textgym.agents.PPOO


def test_version_is_the_one_in_pyproject():
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert textgym.__version__ == tomllib.load(file)["project"]["version"]


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'textgym' has no attribute 'no_such_part'"):
        _ = textgym.no_such_part


def test_every_part_is_an_attribute_without_a_further_import(fresh):
    assert set(textgym.__all__) <= set(dir(textgym))
    assert fresh["parts"] == sorted(textgym.__all__)


def test_reloading_registers_no_id_twice():
    importlib.reload(textgym)  # a warning would fail the test
    assert set(ENVIRONMENTS) <= set(gymnasium.registry)


@pytest.mark.parametrize("env_id", sorted(ENVIRONMENTS))
def test_entry_points_of_every_id_exist(env_id):
    spec = gymnasium.spec(env_id)
    for entry_point in (spec.entry_point, spec.vector_entry_point):
        module, name = entry_point.split(":")
        assert isinstance(getattr(importlib.import_module(module), name), type)


def setuptools_configuration() -> dict[str, Any]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["tool"]["setuptools"]


def test_pyproject_lists_every_subpackage():
    listed = set(setuptools_configuration()["packages"])
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert listed == found - NOT_SHIPPED


def test_pyproject_packs_every_data_file_of_the_embedded_models():
    folder = ROOT / "textgym" / "embedded"
    patterns = setuptools_configuration()["package-data"]["textgym.embedded"]
    packed = {path for pattern in patterns for path in folder.glob(pattern)}
    skipped = {"build", "__pycache__"}
    data = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py"}
    assert {path for path in data if not skipped & set(path.relative_to(folder).parts)} <= packed


def test_the_tiny_tokenizer_round_trips_and_keeps_its_special_tokens_apart(tiny_tokenizer):
    assert len(tiny_tokenizer) == len(set(VOCABULARY)) == 64
    special = [tiny_tokenizer.pad_token_id, tiny_tokenizer.bos_token_id]
    special += [tiny_tokenizer.eos_token_id, tiny_tokenizer.unk_token_id]
    assert special == [0, 1, 2, 3]
    text = "this film is great , but the end was dull ."
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tiny_models_are_reproducible_and_leave_the_random_state_alone(architecture):
    state = torch.get_rng_state()
    model, again, other = (tiny_model(architecture, seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    input_ids = torch.randint(4, len(VOCABULARY), (2, CONTEXT))
    with torch.no_grad():
        logits, same, different = (m(input_ids=input_ids).logits for m in (model, again, other))
    assert logits.shape == (2, CONTEXT, len(VOCABULARY))
    assert torch.equal(logits, same)
    assert not torch.allclose(logits, different, atol=0.1)
    assert (model.config.pad_token_id, model.config.eos_token_id) == (PAD, EOS)


def test_the_tiny_reward_model_tells_texts_apart(tiny_causal_reward_model):
    input_ids = torch.randint(4, len(VOCABULARY), (16, 12))
    with torch.no_grad():
        scores = tiny_causal_reward_model(input_ids=input_ids).logits[:, 0]
    assert 0.1 < scores.std() < 10


def test_a_remark_of_another_library_about_what_nobody_uses_does_not_open_the_output():
    name = "bitsandbytes.backends.cpu.ops"
    said = "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please ..."
    code = f"import logging, textgym; log = logging.getLogger({name!r}); log.warning({said!r}, 1); log.warning('else')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "else\n"
