#!/usr/bin/env bash
# transformers 5.23.0: Mamba (the first) goes on from a cache by several tokens as if there were no state.
#
# One token after a cached text continues from its state; two or more (the next turn of a chat, a long prompt in pieces,
# assisted decoding) are scanned from a state of zeros, as mamba_selective_scan takes no initial state. No error. Only
# the convolution sees what came before. Mamba2ForCausalLM passes initial_states and is right.
#
# Seen: largest difference of logits between a forward over 16 tokens and one over 8 and then the other 8
#   MambaForCausalLM   5e-02, of logits up to 2.5
#   Mamba2ForCausalLM  5e-07
# Exits with 1 when Mamba is right, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" 2>/dev/null || { python3 -m venv --without-pip "$folder/venv"; python3 -m pip --python "$folder/venv/bin/python" install -q pip; }
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check "torch==2.13.0" "transformers==5.23.0" "numpy<3"
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM


def difference(config, kind):
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.randint(0, 64, (1, 16))
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits[0, -1]
        cache = DynamicCache(config=config)
        model(ids[:, :8], cache_params=cache, use_cache=True)
        rest = model(ids[:, 8:], cache_params=cache, use_cache=True).logits[0, -1]
    return float((rest - whole).abs().max())


shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.2)
first = difference(MambaConfig(**shape), MambaForCausalLM)
second = difference(Mamba2Config(**shape, num_heads=8, head_dim=8, n_groups=1, chunk_size=8), Mamba2ForCausalLM)
print(f"Mamba {first:.1e}, Mamba-2 {second:.1e}")
raise SystemExit(0 if first > 1e-3 and second < 1e-5 else 1)
PYTHON
