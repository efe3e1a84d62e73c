"""examples/smollm2_ppo.py from start to end, on a tiny model in place of SmolLM2."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
from places import EXAMPLES
from tiny_models import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_smollm2_ppo_leaves_its_measurements(tmp_path, monkeypatch, capsys, full):
    source, output = tmp_path / "model", tmp_path / "out"
    tiny_model("llama").save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    flags = ["--model", str(source), "--timesteps", "384", "--output", str(output), "--dtype", "float32"]
    flags += ["--learning-rate", "0.01", "--save-model", *(["--full"] if full else ["--rank", "4"])]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "smollm2_ppo.py"), *flags])
    runpy.run_path(str(EXAMPLES / "smollm2_ppo.py"), run_name="__main__")
    shown = capsys.readouterr().out
    for words in ("perplexity of held-out snippets", "KL to the reference", "384 tokens in", "peak memory"):
        assert words in shown
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert (results["parameters"] == results["trained_parameters"]) == full
    assert results["before"]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert abs(results["after"]["kl"]) > 1e-3
    assert results["after"]["held_out_perplexity"] != results["before"]["held_out_perplexity"]
    assert results["peak_memory_mib"] > 100
    assert len(results["before"]["samples"]) == len(results["after"]["samples"]) == 64
    assert (output / "progress.csv").is_file()
    assert (output / "model" / "adapter").is_dir() != full
    AutoModelForCausalLM.from_pretrained(output / "model")
