"""What travels with weights that were read as values: the configuration without its quantization.

With it, a loader would look for codes and scales that are not there.
"""

from __future__ import annotations

import json
from typing import Any, Final

from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.checkpoint.quantizers import SETTINGS
from deltafmt.checkpoint.weight_choice import read_json

# Files in which quantizers write what they did.
QUANTIZERS_FILES: Final = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml")


def leave_out_quantization(checkpoint: Checkpoint) -> None:
    """Take what a checkpoint's small files say of its quantization out of what travels.

    Raises:
        InvalidFileError, UsageError, StorageError: as :meth:`Checkpoint.decide_travelling` raises them.
    """
    beside = checkpoint.decide_travelling()
    for path, place in list(beside.files.items()):
        name = path.rpartition("/")[2]
        if name in QUANTIZERS_FILES:
            del beside.files[path]
            beside.left_out[path] = "a quantizer's; the weights are packed as the values that they mean"
        elif name == "config.json":
            config = read_json(place)
            plain = _plain(config)
            if plain != config:
                checkpoint.rewritten[path] = (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode()


def _plain(config: Any, depth: int = 3) -> Any:
    """Return a configuration without what it says of quantization, also in the models inside it."""
    if not isinstance(config, dict) or not depth:
        return config
    return {key: _plain(value, depth - 1) for key, value in config.items() if key not in SETTINGS}
