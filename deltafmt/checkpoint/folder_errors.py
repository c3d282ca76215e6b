"""What a folder without weights is, and what to do: a line for each thing that people take for a model."""

from __future__ import annotations

import os
from pathlib import Path

from deltafmt.checkpoint.components import LoaderFolders
from deltafmt.checkpoint.weight_choice import ADAPTER_STEM, UNREADABLE, file_names
from deltafmt.checkpoint.weight_names import ENDING, bounded
from deltafmt.errors import DeltafmtError, InvalidFileError
from deltafmt.index.file_names import ADAPTER_CONFIG

IS_ADAPTER = "this is an adapter, not a model; import-lora makes a delta file of it"


def is_adapter_file(name: str) -> bool:
    """Tell whether a file is an adapter's, as PEFT names its files."""
    return name == ADAPTER_CONFIG or name.startswith(f"{ADAPTER_STEM}.")


def has_other_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights of another format than safetensors, or an adapter."""
    return any(UNREADABLE.search(name) or is_adapter_file(name) for name in file_names(folder))


def no_weights(folder: Path, loader: LoaderFolders) -> DeltafmtError:
    """Return the error for a folder in which no safetensors weights are a model."""
    names = file_names(folder)
    if any(map(is_adapter_file, names)):
        return InvalidFileError(f"{folder}: {IS_ADAPTER}")
    start = f"{folder}: no .safetensors weights in this folder"
    unreadable = [name for name in names if UNREADABLE.search(name)]
    if unreadable:
        return InvalidFileError(f"{start}; {unreadable[0]} cannot be read, convert it to safetensors")
    if (folder / "snapshots").is_dir():
        return InvalidFileError(
            f"{start}; it is a model's folder in the hub's cache: name the folder snapshots/REVISION"
        )
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")][:1000]
    holding = [path.name for path in below if any(name.endswith(ENDING) for name in _names(path))]
    if holding:
        unnamed = f"{loader.index} names none of its folders, and " if loader.index else ""
        verb = "holds" if len(holding) == 1 else "hold"
        return InvalidFileError(f"{start}; {unnamed}{bounded(holding)} {verb} weights: pack each folder by itself")
    return InvalidFileError(start)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
