#!/usr/bin/env bash
# transformers 5.23.0: a model that was asked for its hidden states once can no longer be pickled.
#
# The first forward with output_hidden_states=True (or output_attentions=True) registers forward hooks on the model's
# layers, and they stay: functions defined inside a function, which pickle can't name. Before that forward the same model
# goes through pickle, and so through multiprocessing with spawn. copy.deepcopy and save_pretrained keep working.
#
# Seen with torch 2.13.0, on a T5 and on a Llama:
#   t5: pickles before: True, after: False (AttributeError)
#   llama: pickles before: True, after: False (AttributeError)
#
# What helps: ask a copy (copy.deepcopy) for hidden states and keep the model itself, or pickle with cloudpickle.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" 2>/dev/null || { python3 -m venv --without-pip "$folder/venv"; python3 -m pip --python "$folder/venv/bin/python" install -q pip; }
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "numpy<3"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import pickle

import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration


def pickles(model):
    try:
        pickle.dumps(model)
    except Exception as error:
        return f"False ({type(error).__name__})"
    return "True"


ids = torch.tensor([[1, 2, 3]])
t5 = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
llama = LlamaForCausalLM(
    LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
)
found = []
for name, model, inputs in (("t5", t5, {"decoder_input_ids": ids}), ("llama", llama, {})):
    before = pickles(model)
    with torch.no_grad():
        model(input_ids=ids, output_hidden_states=True, **inputs)
    found.append(f"{name}: pickles before: {before}, after: {pickles(model)}")
print("\n".join(found))
expected = [f"{name}: pickles before: True, after: False (AttributeError)" for name in ("t5", "llama")]
raise SystemExit(0 if found == expected else "the behaviour has changed")
PYTHON
