"""What travels beside the weights: the small files with which the unpacked folder loads, chosen by what they are.

The files at the top of the folder travel, and those of the folders that the model's loader reads. Left out, with a
reason each, are files of weights and pickles, what belongs to training or to an adapter, code, logs, files that look
like secrets, and files of unknown purpose that are large or binary. Patterns of the user's decide otherwise.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from deltafmt.checkpoint import secret_files
from deltafmt.checkpoint.components import LoaderFolders
from deltafmt.checkpoint.file_kinds import HEAD_BYTES, LFS_POINTER, WEIGHT_KINDS, is_torch_archive, kind_of
from deltafmt.checkpoint.weight_choice import ADAPTER_STEM, UNREADABLE, is_folder, read_json
from deltafmt.checkpoint.weight_names import ENDING, bounded
from deltafmt.errors import InvalidFileError, Remedy, UsageError
from deltafmt.index.file_names import ADAPTER_CONFIG, ascii_lower, collisions, is_program, is_safe_path, is_weight_file
from deltafmt.output import storage_error
from deltafmt.regular_file import open_regular

MAX_ATTACHMENT_BYTES: Final = 64 * 1024 * 1024
MAX_UNASKED_BYTES: Final = 1024 * 1024
_MAX_WALKED: Final = 100_000

# Files that loaders of models read, by their names in lower case. They travel whatever their size.
_LOADED: Final = (
    *(
        "tokenizer*",
        "*vocab*.json",
        "*vocab*.txt",
        "vocab.*",
        "merges*.txt",
        "*.tiktoken",
        "*.model",
        "*.model.v[0-9]*",
    ),
    *("*.spm", "*.bpe", "bpe.codes", "tekken.json", "encoder.json", "*.jinja", "config.json", "*config.json"),
    *(
        "*.vocab",
        "*.dic",
        "unigram.json",
        "idf.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "dict*.txt",
        "modules.json",
        "model_index.json",
        "chat_template*",
    ),
)
HIDDEN: Final = "hidden files never travel"
# Hidden folders of programs, which hold nothing of the model.
_TOOLS: Final = (".git", ".cache", ".ipynb_checkpoints")
_CODE: Final = (
    ".py",
    ".pyc",
    ".pyi",
    ".ipynb",
    ".sh",
    ".bash",
    ".bat",
    ".cmd",
    ".ps1",
    ".so",
    ".dll",
    ".dylib",
    ".exe",
)
_IMAGES: Final = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".ico", ".bmp")
_MORE_WEIGHTS: Final = re.compile(
    r"\.(safetensors|distcp|dill|joblib|pk|p|cloudpickle|torch|tar|nemo|mlmodel|pb|tfrecords?|engine|bin|pt|pth|ckpt|h5"
    r"|msgpack|gguf|ggml|onnx|onnx_data|npz|npy|pkl|pickle|tflite|ot|deltafmt|partial)(\.tmp|\.[0-9]+)?$"
    r"|\.(safetensors|bin)\.index(\.[^.]+)?\.json$|\.safetensors\.[^.]+\.index\.json$"
)
_TRAINING: Final = re.compile(
    r"(optimizer|optim_states?|optim|scheduler|scaler|loss_scaler|rng_state|random_states?|training_args|dataloader_state)"
    r"([_\-.].*)?"
)
# The parts of the names of files with a model's own code, as transformers writes them.
_MODEL_CODE: Final = re.compile(
    r"(modeling|configuration|tokenization|processing|image_processing|feature_extraction|video_processing|pipeline"
    r"|generation|conversation|custom)[_\w]*\.py"
)


@dataclass(frozen=True, slots=True)
class AttachRules:
    """What the user says of the files beside the weights.

    Attributes:
        attach: patterns of relative paths that travel although they would not by themselves.
        no_attach: patterns of relative paths that do not travel. They win over ``attach``.
    """

    attach: Sequence[str] = ()
    no_attach: Sequence[str] = ()

    def wants(self, path: str) -> bool:
        """Tell whether a pattern asks for a file."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.attach)

    def refuses(self, path: str) -> bool:
        """Tell whether a pattern leaves a file out; the path of a folder may end with a slash."""
        plain = path.removesuffix("/")
        return any(fnmatch.fnmatchcase(found, pattern) for pattern in self.no_attach for found in {path, plain})

    def refuses_component(self, component: str) -> bool:
        """Tell whether a pattern names a folder, so that its weights do not travel either: ``2_Dense/*``."""
        return any(pattern.removesuffix("*").removesuffix("/") == component for pattern in self.no_attach)


NO_RULES: Final = AttachRules()


@dataclass(slots=True)
class Travelling:
    """The files that travel, by their paths in the folder, and why others do not.

    Attributes:
        files: the files that travel.
        left_out: the reason for every other file and folder, by its path; a folder's ends in ``/``.
        unwanted: paths that the user's patterns leave out.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unwanted: list[str] = field(default_factory=list)


def find_travelling(
    folder: Path,
    loader: LoaderFolders,
    read: Collection[str],
    rules: AttachRules = NO_RULES,
    *,
    refuse_links: bool = True,
) -> Travelling:
    """Decide for every file of a checkpoint's folder whether it travels with the delta.

    Args:
        folder: the checkpoint's folder.
        loader: the folders that the checkpoint's loader reads.
        read: paths of the files that are read as weights, and their indexes.
        rules: what the user says.
        refuse_links: True to refuse a link that leaves the folder; otherwise the link is left out.

    Raises:
        InvalidFileError: a link leaves the folder.
        UsageError: a pattern takes no file.
        StorageError: the folder cannot be read.
    """
    found = Travelling()
    judge = _Judge(folder, rules, refuse_links)
    try:
        for path, is_folder in _walk(folder, loader, rules):
            if path in read:
                continue
            name = f"{path}/" if is_folder else path
            if rules.refuses(name):
                found.unwanted.append(name)
                continue
            reason = judge.folder(path, loader) if is_folder else judge.file(path)
            if reason is None:
                continue
            if reason:
                found.left_out[name] = reason
            else:
                found.files[path] = folder / path
    except OSError as error:
        raise storage_error("cannot read", error.filename or folder, error) from error
    _leave_out_collisions(found)
    # A folder is not left out if a pattern takes a file of it.
    for name in [name for name in found.left_out if name.endswith("/")]:
        if any(path.startswith(name) for path in found.files):
            del found.left_out[name]
    found.files = dict(sorted(found.files.items()))
    _check_patterns(folder, found, rules)
    return found


def _leave_out_collisions(found: Travelling) -> None:
    """Leave out files whose names are others' but for the case of letters; the name in lower case stays."""
    names = sorted(found.files, key=lambda name: (name != ascii_lower(name), name))
    for name, other in collisions(names).items():
        del found.files[name]
        found.left_out[name] = f"not every system can hold it beside {other}"


def _walk(folder: Path, loader: LoaderFolders, rules: AttachRules) -> Iterator[tuple[str, bool]]:
    """Give the paths of files and folders: those at the top and in the loader's folders; with patterns, all."""
    read = set(loader.present)
    inner = {
        "/".join(component.split("/")[:depth]) for component in read for depth in range(1, component.count("/") + 2)
    }
    stack = [""]
    count = 0
    while stack:
        where = stack.pop()
        for entry in sorted(os.scandir(folder / where), key=lambda entry: entry.name):
            path = f"{where}/{entry.name}" if where else entry.name
            count += 1
            if count > _MAX_WALKED:
                raise UsageError(f"{folder}: more than {_MAX_WALKED:,} files to look through for what travels")
            if not is_folder(entry):
                if not where or where in read or rules.wants(path):
                    yield path, False
                continue
            if path not in inner:
                yield path, True
            hidden = entry.name.startswith(".") or entry.is_symlink()
            if path in inner or (rules.attach and not hidden):
                stack.append(path)


class _Judge:
    """Says of a file why it does not travel."""

    def __init__(self, folder: Path, rules: AttachRules, refuse_links: bool) -> None:
        self._folder = folder
        self._rules = rules
        self._refuse_links = refuse_links
        self._root = folder.resolve()
        self._code = _declared_code(folder)

    def folder(self, path: str, loader: LoaderFolders) -> str | None:
        """Return why a folder's files do not travel; None if nothing needs to be said."""
        name = path.rpartition("/")[2]
        if name.startswith("."):
            return None if name in _TOOLS else HIDDEN
        if "/" in path and path.rpartition("/")[0] not in loader.present:
            return None  # its parent is named
        return "a folder that the model's loader does not read"

    def file(self, path: str) -> str | None:
        """Return why a file does not travel, an empty string if it does, and None if nothing needs to be said."""
        name = path.rpartition("/")[2]
        secret = secret_files.by_name(name)
        if name.startswith("."):
            return f"{secret}; {HIDDEN}" if secret else HIDDEN
        if not is_safe_path(path):
            return "its name is not allowed on every system"
        place = self._folder / path
        asked = self._rules.wants(path)
        if not place.exists():
            return "a link that leads nowhere"
        if not place.is_file():
            return "not a regular file"
        never = _never_by_name(name.lower())
        if never:
            return never
        if not asked and self._leaves(place):
            reason = f"a link that leaves the folder, to {place.resolve()}"
            if self._refuse_links:
                raise InvalidFileError(f"{place} is {reason}", Remedy("no_attach", glob.escape(path)))
            return reason
        size = place.stat().st_size
        never = _never_by_content(place, size)
        if never or asked:
            return never
        return secret or self._unasked(path, place, size)

    def _leaves(self, place: Path) -> bool:
        """Tell whether a link leaves the folder. Links to the blobs of the hub's cache count as files of the folder.

        The cache keeps a model as ``snapshots/REVISION/config.json``, a link to ``../../blobs/DIGEST``.
        """
        target = place.resolve()
        if target.is_relative_to(self._root):
            return False
        caches = (parent.parent for parent in self._root.parents if parent.name == "snapshots")
        return all(target.parent != cache / "blobs" for cache in caches)

    def _unasked(self, path: str, place: Path, size: int) -> str:
        """Return why a file travels only when it is asked for."""
        name = path.rpartition("/")[2].lower()
        if name.endswith(_CODE):
            return "" if path in self._code else "code"
        if "tfevents" in name or name.endswith(".log"):
            return "a log"
        if not name.endswith(".json") and (_TRAINING.fullmatch(name) or name == "latest"):
            return "a trainer's state"
        kind = kind_of(_read(place, HEAD_BYTES))
        if kind:
            return kind
        loaded = any(fnmatch.fnmatchcase(name, pattern) for pattern in _LOADED)
        if size > MAX_UNASKED_BYTES:
            return "" if loaded else f"{size:,} bytes; files above a megabyte travel only when asked for"
        data = _read(place, size)
        if loaded and not name.endswith("config.json"):
            return ""
        if b"\0" in data:
            return "" if loaded or name.endswith(_IMAGES) else "a binary file of unknown purpose"
        return secret_files.by_content(data)


def _never_by_name(name: str) -> str:
    """Return why a file cannot travel even if it is asked for, if its name in lower case tells."""
    if name.startswith(ADAPTER_STEM):
        return "an adapter's weights; merge them, or pack them with import-lora"
    if name == ADAPTER_CONFIG:
        return "an adapter's; beside merged weights, a loader would apply the adapter again"
    if is_program(name):
        return "a program, which a delta file cannot hold"
    if name.endswith(ENDING):
        return "weights that the model's loader does not read"
    if is_weight_file(name) or _MORE_WEIGHTS.search(name) or UNREADABLE.search(name):
        model = name.startswith(("pytorch_model", "diffusion_pytorch"))
        return "a file of weights or of a trainer's state" + "; only safetensors weights are packed" * model
    return ""


def _never_by_content(place: Path, size: int) -> str:
    """Return why a file cannot travel even if it is asked for, if its size or its bytes tell."""
    if size > MAX_ATTACHMENT_BYTES:
        return f"{size:,} bytes, and a file that travels has at most {MAX_ATTACHMENT_BYTES:,}"
    kind = kind_of(_read(place, HEAD_BYTES), whole=size <= HEAD_BYTES)
    if not kind and HEAD_BYTES < size <= MAX_UNASKED_BYTES:
        kind = kind_of(_read(place, size), whole=True)
    if kind == "a zip archive" and is_torch_archive(_read(place, size)):
        kind = "a PyTorch file"
    if kind == LFS_POINTER:
        return f"{kind}, not the file itself; git lfs pull brings the file"
    return f"{kind}, which may hold weights or code" if kind in WEIGHT_KINDS else ""


def _declared_code(folder: Path) -> set[str]:
    """Return the files of code at the top of a folder that its configurations name, and those of the same model.

    A configuration with an ``auto_map`` needs the model's own code: the files that it names, and those that these
    import, which have names like ``modeling_x.py``.
    """
    declared: set[str] = set()
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        found = read_json(folder / name)
        auto_map = found.get("auto_map") if isinstance(found, dict) else None
        for value in auto_map.values() if isinstance(auto_map, dict) else ():
            for reference in value if isinstance(value, list) else (value,):
                # "configuration_x.XConfig"; "owner/name--configuration_x.XConfig" is code of another repository.
                if isinstance(reference, str) and "--" not in reference:
                    declared.add(reference.rpartition(".")[0].split(".")[0] + ".py")
    if not declared:
        return set()
    code = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".py")}
    return {name for name in code if name in declared or _MODEL_CODE.fullmatch(name)}


def _check_patterns(folder: Path, found: Travelling, rules: AttachRules) -> None:
    """Refuse a pattern that takes no file, or only files that cannot travel.

    Raises:
        UsageError: names the pattern.
    """
    for pattern in rules.attach:
        if any(fnmatch.fnmatchcase(path, pattern) for path in found.files):
            continue
        barred = {name: why for name, why in found.left_out.items() if fnmatch.fnmatchcase(name, pattern)}
        if barred:
            name, why = next(iter(barred.items()))
            raise UsageError(f"attach pattern {pattern!r} takes no file of {folder} that can travel: {name} is {why}")
        if not any(fnmatch.fnmatchcase(name, pattern) for name in found.unwanted):
            raise UsageError(f"attach pattern {pattern!r} matches no file of {folder}")
    known = [*found.unwanted, *found.files, *found.left_out]
    for pattern in rules.no_attach:
        if not any(AttachRules(no_attach=(pattern,)).refuses(name) for name in known):
            raise UsageError(f"no-attach pattern {pattern!r} matches no file of {folder}, where {bounded(known)} are")


def _read(path: Path, size: int) -> bytes:
    with open_regular(path) as file:
        return file.read(size)
