"""Which files of a folder are the model. The choice is that of the programs that load such folders.

transformers reads ``model.safetensors`` before an index, and an index before everything beside it; a variant such as
``fp16`` on request. A folder whose weights have other names is read if the names leave no doubt.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deltafmt.checkpoint.file_kinds import instead_of_weights
from deltafmt.checkpoint.weight_names import (
    ENDING,
    KNOWN_STEMS,
    SHARD,
    bounded,
    index_name,
    split_name,
    with_variant,
)
from deltafmt.errors import InvalidFileError, StorageError
from deltafmt.index.file_names import MAX_PART_BYTES
from deltafmt.output import storage_error
from deltafmt.regular_file import read_regular

ADAPTER_STEM: Final = "adapter_model"
_MAX_JSON_BYTES: Final = 64 * 1024 * 1024
_INDEX_ENDING: Final = re.compile(r"\.safetensors(\.[^.]+)?\.index(\.[^.]+)?\.json")
# Weights that cannot be read, by their endings in any case of letters.
UNREADABLE: Final = re.compile(r"\.(bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|pkl|distcp|npz)$", re.IGNORECASE)
# Safetensors files that belong to training, not to the model.
_TRAINING: Final = re.compile(r"^(optimizer|optim|scheduler|scaler|training_state|random_states?|ema_optimizer)\b")


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """The weights of one folder.

    Attributes:
        name: what the weights are called when they are one file, such as ``model.safetensors``.
        files: the weight files, by name; for an index those that it names.
        index: the name of the index, or an empty string.
        unread: names of further safetensors files and indexes that lie in the folder, which are no part of the model.
    """

    name: str
    files: tuple[str, ...]
    index: str = ""
    unread: tuple[str, ...] = ()


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None if it is missing, is not JSON, or is too large for a configuration."""
    try:
        return None if path.stat().st_size > _MAX_JSON_BYTES else json.loads(read_regular(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Tell whether an entry is a folder, or a link to one; links that lead round in a circle are files."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def file_names(folder: Path) -> list[str]:
    """Return the names of the files of a folder, sorted; links that lead nowhere count as files.

    Raises:
        StorageError: the folder cannot be read.
    """
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not is_folder(entry))
    except OSError as error:
        raise storage_error("cannot read", folder, error) from error


def choose_weights(folder: Path, variant: str | None = None) -> WeightChoice | None:
    """Return the weights of a folder, or None if it has no safetensors weights.

    Args:
        folder: the folder; only its own files are looked at.
        variant: read the weights of this variant, such as ``fp16`` in ``model.fp16.safetensors``.

    Raises:
        InvalidFileError: the names leave in doubt which files are the model.
        StorageError: the folder cannot be read, or a shard of a series is missing.
    """
    names = file_names(folder)
    weights = [name for name in names if name.endswith(ENDING) and not name.startswith(".")]
    indexes = [name for name in names if _INDEX_ENDING.search(name)]
    found = _chosen(folder, weights, indexes, variant)
    if found is None:
        return None
    others = [name for name in (*weights, *indexes) if name not in (*found.files, found.index)]
    return WeightChoice(found.name, found.files, found.index, tuple(others))


def _chosen(folder: Path, weights: list[str], indexes: list[str], variant: str | None) -> WeightChoice | None:
    config = read_json(folder / "config.json")
    config = config if isinstance(config, dict) else {}
    diffusers = "_class_name" in config
    named = config.get("transformers_weights")
    if isinstance(named, str) and variant is None and named in (*weights, *indexes):
        return _indexed(folder, named) if named in indexes else WeightChoice(named, (named,))
    stems = sorted(KNOWN_STEMS, key=lambda stem: (stem == "diffusion_pytorch_model") != diffusers)
    for stem in stems:
        name = with_variant(stem, variant)
        own = [index for index in (index_name(name), f"{name}.index.json") if index in indexes]
        if name in weights and own and stem != "model":
            # Versions of diffusers differ: some take the file, others the index.
            raise InvalidFileError(
                f"{folder}: both {name} and {own[0]} are there, and loaders differ in which they read; "
                "remove the one that is stale, or name the weight file itself"
            )
        if name in weights:
            return WeightChoice(name, (name,))
        if own:
            return _indexed(folder, own[0], name)
    for stem in stems:
        series = _series(folder, weights, stem, variant)
        if series:
            return WeightChoice(with_variant(stem, variant), series)
    return _by_other_names(folder, weights, indexes, variant)


def _by_other_names(folder: Path, weights: list[str], indexes: list[str], variant: str | None) -> WeightChoice | None:
    """Choose among weights whose names no loader looks for: there must be one set of them."""
    if variant is not None:
        if weights or indexes:
            raise InvalidFileError(
                f"{folder}: it has no weights of the variant {variant!r}; there are {bounded([*indexes, *weights])}"
            )
        return None
    if len(indexes) > 1:
        raise InvalidFileError(f"{folder}: several indexes, {bounded(indexes)}; keep one")
    if indexes:
        return _indexed(folder, indexes[0])
    own = [name for name in weights if not name.startswith(ADAPTER_STEM) and not _TRAINING.match(name)]
    groups = _grouped(own)
    if len(groups) > 1:
        # A name and the same name with a variant: the plain name is what is read when no variant is asked for.
        plain = min(groups, key=len)
        if not all(group == plain or group.startswith(f"{plain}.") for group in groups):
            raise InvalidFileError(
                f"{folder}: {bounded(weights)} may be one model or several, and no index says which; "
                "name one of the files, or write a model.safetensors.index.json"
            )
        groups = {plain: groups[plain]}
    for group, members in groups.items():
        if members == [f"{group}{ENDING}"]:
            known, of_variant = split_name(members[0])
            if of_variant is not None and known in KNOWN_STEMS:
                raise InvalidFileError(
                    f"{folder}: it has weights of the variant {of_variant!r} alone, {members[0]}; "
                    "name the variant, or the file"
                )
            return WeightChoice(members[0], tuple(members))
        series = _series(folder, members, group, None) or _numbered(folder, members)
        return WeightChoice(f"{group}{ENDING}" if group else "model.safetensors", series)
    return None


def _grouped(weights: Sequence[str]) -> dict[str, list[str]]:
    """Return weight files by the stem that they share with the other files of their series, or their own stem."""
    groups: dict[str, list[str]] = {}
    series: dict[str, list[str]] = {}
    for name in weights:
        stem = name.removesuffix(ENDING)
        shard = SHARD.fullmatch(stem)
        numbered = re.fullmatch(r"(.*?)[-_.]?[0-9]{1,6}", stem)
        if shard:
            groups.setdefault(shard["stem"] + (shard["variant"] or ""), []).append(name)
        elif numbered:
            series.setdefault(numbered[1], []).append(name)
        else:
            groups.setdefault(stem, []).append(name)
    for stem, members in series.items():
        # One file whose name ends in a number is no series, as sd_v15; model-00002 is part of one.
        alone = len(members) == 1 and not re.search(r"(^|[^0-9])0[0-9]+\.safetensors$", members[0])
        groups.setdefault(members[0].removesuffix(ENDING) if alone else stem, []).extend(members)
    return groups


def _series(folder: Path, weights: Sequence[str], stem: str, variant: str | None) -> tuple[str, ...]:
    """Return the shards ``STEM-00001-of-0000N`` of a folder without an index; all of them must be there.

    Raises:
        StorageError: names the shards that are missing.
        InvalidFileError: there are shards of several saves.
    """
    suffix = f".{variant}" if variant else ""
    found: dict[int, dict[int, str]] = {}
    for name in weights:
        shard = SHARD.fullmatch(name.removesuffix(ENDING))
        if shard and (shard["stem"], shard["variant"] or "") in ((f"{stem}{suffix}", ""), (stem, suffix)):
            found.setdefault(int(shard["count"]), {})[int(shard["number"])] = name
    if not found:
        return ()
    if len(found) > 1:
        counts = ", ".join(f"of {count}" for count in sorted(found))
        raise InvalidFileError(
            f"{folder}: the shards of {stem} are of several saves ({counts}), and no index says which to read; "
            "remove those that are stale"
        )
    ((count, shards),) = found.items()
    first = 0 if 0 in shards else 1
    missing = [number for number in range(first, first + count) if number not in shards]
    if missing:
        width = len(re.search(r"-([0-9]+)-of-", shards[min(shards)])[1])  # type: ignore[index]
        names = [
            re.sub(r"-[0-9]+-of-", f"-{number:0{width}d}-of-", shards[min(shards)], count=1)
            for number in missing[:1000]
        ]
        raise StorageError(
            f"{folder}: {len(missing):,} of {count:,} shards {'is' if len(missing) == 1 else 'are'} missing: "
            f"{bounded(names)}; the download or the save is incomplete"
        )
    return tuple(shards[number] for number in sorted(shards))


def _numbered(folder: Path, members: list[str]) -> tuple[str, ...]:
    """Return files whose names differ by one number alone, such as ``weights.00``; no number may be missing."""
    numbers = {int(re.findall(r"[0-9]+", name.removesuffix(ENDING))[-1]): name for name in members}
    if len(numbers) != len(members) or sorted(numbers) != list(range(min(numbers), min(numbers) + len(members))):
        raise StorageError(f"{folder}: the numbers of {bounded(members)} leave a gap; a shard is missing")
    if min(numbers) > 1:
        raise StorageError(f"{folder}: the numbers of {bounded(members)} do not begin at 0 or 1")
    return tuple(numbers[number] for number in sorted(numbers))


def _indexed(folder: Path, index: str, name: str | None = None) -> WeightChoice:
    """Return the weights that an index names. Their shards are opened later, which finds those that are missing."""
    if name is None:
        name = _INDEX_ENDING.sub("", index) + ENDING
    return WeightChoice(name, tuple(sorted(set(read_index(folder / index).values()))), index)


def read_index(where: Path) -> dict[str, str]:
    """Return the weight map of an index: the file of every tensor.

    Raises:
        InvalidFileError: the index is not valid, or names a file that is not beside it.
        StorageError: it cannot be read.
    """
    try:
        data = read_regular(where)
    except OSError as error:
        raise storage_error("cannot read", where, error) from error
    return parse_weight_map(where, data)


def parse_weight_map(where: Path, data: bytes) -> dict[str, str]:
    """Return the weight map that the bytes of an index hold.

    Raises:
        InvalidFileError: the index is not valid, or names a file that is not beside it.
    """
    try:
        weight_map: Any = json.loads(data.decode("utf-8"))["weight_map"]
        wanted = {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidFileError(f"{where}: {instead_of_weights(data) or 'no valid weight_map'}") from error
    for file in set(wanted.values()):
        if file != os.path.basename(file) or file in ("", ".", "..") or "\0" in file or not is_file_name(file):
            raise InvalidFileError(f"{where}: {file!r} is not a file beside the index")
    return wanted


def is_file_name(name: str) -> bool:
    """Tell whether a file can have this name: it is Unicode, and not longer than file systems allow."""
    return is_text(name) and len(name.encode()) <= MAX_PART_BYTES


def is_text(name: str) -> bool:
    """Tell whether a name is Unicode: JSON can hold half of a surrogate pair, which no file has for a name."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def check_shards(folder: Path, choice: WeightChoice) -> None:
    """Check that the weight files are there, and not links that lead nowhere.

    Raises:
        StorageError: names those that are missing, and what lies there instead.
    """
    missing = [name for name in choice.files if not (folder / name).exists()]
    if not missing:
        return
    dangling = [name for name in missing if (folder / name).is_symlink()]
    listed = dangling or missing
    verb = "is" if len(listed) == 1 else "are"
    why = f"{verb} missing; the download or the save is incomplete"
    if dangling:
        why = f"{verb} {'a link' if len(dangling) == 1 else 'links'} to nothing; the download is incomplete"
    pickled = [name for name in file_names(folder) if UNREADABLE.search(name)]
    if pickled and len(missing) == len(choice.files):
        why += f". Beside it is {pickled[0]}, which cannot be read: convert it to safetensors"
    named = f"{choice.index} names {len(choice.files):,} files, and " if choice.index else ""
    raise StorageError(f"{folder}: {named}{bounded(listed)} {why}")
