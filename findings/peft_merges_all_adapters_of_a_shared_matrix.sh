#!/usr/bin/env bash
# peft 0.21.2: merging an adapter on layers that share one matrix gives another model than was trained, without a word.
#
# Zamba's attention blocks are one set of weights used at several depths. get_peft_model puts an adapter of its own on
# each place, and training and saving the adapter are fine with that. merge_and_unload() adds all of them to the one
# matrix, so that every place computes with the sum. safe_merge=True does not notice; no warning, no error. A warning
# about tied weights exists for embeddings only.
#
# Seen with transformers 5.23.0 and torch 2.13.0, on a Zamba with two such places and random adapters on q_proj:
#   2 places, 1 matrix; logits of the adapted model up to 3.62, those of the merged one differ by 0.23
#   merged weight - (weight + the sum of all 2 adapters): 3e-08
#
# What helps: give the places one adapter (set the same lora_A and lora_B modules on all) and merge it once, or keep
# the adapter unmerged.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" 2>/dev/null || { python3 -m venv --without-pip "$folder/venv"; python3 -m pip --python "$folder/venv/bin/python" install -q pip; }
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "peft==0.21.2" "numpy<3"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import ZambaConfig, ZambaForCausalLM


def projections(model):
    layers = model.model.layers
    return [layer.shared_transf.self_attn.q_proj for layer in layers if hasattr(layer, "shared_transf")]


torch.manual_seed(0)
shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
layers = dict(num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)
config = ZambaConfig(**shape, **layers, mamba_d_state=8, n_mamba_heads=2, initializer_range=0.1)
model = ZambaForCausalLM(config).eval()
matrices = len({projection.weight.data_ptr() for projection in projections(model)})
before = projections(model)[0].weight.detach().clone()
ids = torch.randint(0, 64, (1, 12))

adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
places = projections(adapted.get_base_model())
adapters = [place.get_delta_weight("default").detach() for place in places]
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    trained = adapted(ids, use_cache=False).logits
    merged = adapted.merge_and_unload(safe_merge=True)
    logits = merged(ids, use_cache=False).logits
told = [str(warning.message) for warning in caught if "merg" in str(warning.message) or "tied" in str(warning.message)]
difference = float((trained - logits).abs().max())
print(
    f"{len(places)} places, {matrices} matrix; logits of the adapted model up to {float(trained.abs().max()):.2f}, "
    f"those of the merged one differ by {difference:.2f}"
)
of_sum = float((projections(merged)[0].weight.detach() - before - sum(adapters)).abs().max())
print(f"merged weight - (weight + the sum of all {len(places)} adapters): {of_sum:.0e}")
as_seen = len(places) == 2 and matrices == 1 and difference > 0.01 and of_sum < 1e-5 and not told
raise SystemExit(0 if as_seen else "the behaviour has changed")
PYTHON
