"""Loading a fine-tune's folder as a model, with transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from deltafmt.calibration.tokens import first_line
from deltafmt.errors import StorageError, UsageError
from deltafmt.extras import need


def load_model(folder: Path, dtype: torch.dtype | None, what: str = "calibration") -> Any:
    """Load a model to the host; its configuration names the class.

    Args:
        folder: a checkpoint folder.
        dtype: the dtype of the weights; None for the dtype that the configuration names.
        what: what needs the model, for messages.

    Raises:
        StorageError: the folder does not exist.
        MissingExtraError: transformers is missing.
        UsageError: transformers cannot load the folder, or the folder lacks a weight.
    """
    if not folder.is_dir():
        raise StorageError(f"no such folder: {folder}; {what} needs a checkpoint's folder")
    need(what, "torch", "transformers", extra="transformers")
    import transformers

    logging: Any = transformers.utils.logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        names = getattr(config, "architectures", None) or ["AutoModel"]
        cls = getattr(transformers, names[0], None)
        if cls is None:
            raise UsageError(f"{folder}: transformers does not know the architecture {names[0]!r}")
        model, info = cls.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{folder}: transformers cannot load the model: {first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if info["missing_keys"]:
        raise UsageError(f'{folder}: the model\'s weight "{min(info["missing_keys"])}" is not there')
    return model.eval()


def model_key(folder: Path) -> str:
    """Return a key of a folder's weights that changes when they do: names, sizes and times of the files."""
    files = sorted(folder.glob("*.safetensors"))
    stats = [os.stat(file) for file in files]
    return " ".join(f"{file.name}:{s.st_size}:{s.st_mtime_ns}" for file, s in zip(files, stats, strict=True))
