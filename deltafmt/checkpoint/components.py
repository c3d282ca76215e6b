"""Folders below a checkpoint's folder that its loader reads: a pipeline's components, the modules of an embedder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deltafmt.checkpoint.weight_choice import read_json
from deltafmt.index.file_names import is_safe_path

PIPELINE_INDEX: Final = "model_index.json"  # diffusers
MODULES_INDEX: Final = "modules.json"  # sentence-transformers
_ROUTER_CONFIG: Final = "router_config.json"
# Folders without weights that transformers reads.
_SMALL_FOLDERS: Final = ("additional_chat_templates",)
_MAX_COMPONENTS: Final = 1000


@dataclass(frozen=True, slots=True)
class LoaderFolders:
    """What the loader of a folder reads.

    Attributes:
        declared: the folders that an index names, whether or not they are there; relative paths.
        present: those of them that are there, and small folders that loaders look for.
        reads_top: True if weights at the top of the folder belong to the model.
        index: the file that names the folders, or an empty string.
    """

    declared: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    reads_top: bool = True
    index: str = ""


def loader_folders(folder: Path) -> LoaderFolders:
    """Return the folders that the loader of a checkpoint reads, by what the checkpoint's own indexes say."""
    declared: list[str] = []
    reads_top, index = True, ""
    pipeline, modules = read_json(folder / PIPELINE_INDEX), read_json(folder / MODULES_INDEX)
    if isinstance(pipeline, dict):
        # {"unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [null, null], "_class_name": "..."}
        index, reads_top = PIPELINE_INDEX, False
        for name, value in pipeline.items():
            if (
                not name.startswith("_")
                and isinstance(value, list)
                and any(isinstance(component, str) for component in value)
            ):
                declared.append(name)
    elif isinstance(modules, list):
        # [{"idx": 0, "path": "", "type": "...Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "...Pooling"}]
        index = MODULES_INDEX
        paths = [module.get("path", "") for module in modules if isinstance(module, dict)]
        declared = [path.strip("/") for path in paths if isinstance(path, str)]
        reads_top = "" in declared or not declared
        declared = [path for path in declared if path]
    for component in ("", *declared):
        declared += _routed(folder, component)
    safe = [component for component in dict.fromkeys(declared) if is_safe_path(component)][:_MAX_COMPONENTS]
    present = [component for component in (*safe, *_SMALL_FOLDERS) if (folder / component).is_dir()]
    return LoaderFolders(tuple(safe), tuple(present), reads_top, index)


def _routed(folder: Path, component: str) -> list[str]:
    """Return the folders of a router's routes: ``{"types": {"query_0_Transformer": "...", ...}}``."""
    found = read_json(folder / component / _ROUTER_CONFIG) if is_safe_path(component or "x") else None
    types = found.get("types") if isinstance(found, dict) else None
    if not isinstance(types, dict):
        return []
    return [f"{component}/{name}" if component else name for name in types if isinstance(name, str)]
