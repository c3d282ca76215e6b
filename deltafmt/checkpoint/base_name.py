"""The name under which people know a checkpoint, for messages: never a path, which tells of one machine alone."""

from __future__ import annotations

import re
from pathlib import Path

from deltafmt.checkpoint.folder import Checkpoint

# How the hub's cache lays out a model: models--OWNER--NAME/snapshots/COMMIT.
_CACHED = re.compile(r"models--(.+)")


def base_name(checkpoint: Checkpoint) -> str:
    """Return ``_name_or_path`` of the configuration if that is a name of the hub, or else the folder's name.

    In the cache of the hub, the name is the model's. For a file, the name of its folder stands before that of the file.
    """
    configured = checkpoint.config().get("_name_or_path")
    if isinstance(configured, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", configured) and configured[0] != ".":
        return configured
    # A name of bytes that are no UTF-8: the file that records it holds Unicode alone.
    return _of_place(Path(checkpoint.path).absolute()).encode("utf-8", "replace").decode("utf-8")


def _of_place(path: Path) -> str:
    for folder in (path, *path.parents):
        found = _CACHED.fullmatch(folder.name)
        if found:
            return found[1].replace("--", "/")
    return path.name if path.is_dir() else f"{path.parent.name}/{path.name}"
