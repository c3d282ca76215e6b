"""What ``deltafmt.convert`` is told of versions, checked against what the files and folders say of theirs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deltafmt.errors import InvalidFileError, Remedy, UsageError, WrongBaseError
from deltafmt.foreign.patch import DELTAFMT, TRL, VERSION_FOLDER, Versions
from deltafmt.output import storage_error
from deltafmt.regular_file import read_regular

# What a delta file says of the patch that it was converted from.
METADATA_FORMAT: Final = "convert.format"
METADATA_VERSION: Final = "convert.version"
METADATA_BASE_VERSION: Final = "convert.base_version"
# What a message of a publisher says (deltafmt.sync).
_SYNC_VERSION = "sync.version"

# SGLang's engines look for version 3 in weight_v000003, and note in this file which version a checkpoint has.
_FOLDER_NAME = re.compile(r"weight_v([0-9]{6,12})")
_APPLIED = Path(".weight_sync") / "state.json"

_NUMBER = re.compile(r"[0-9]{1,12}")
_WORD = re.compile(r"[!-~]{1,200}")


def versions_of(metadata: Mapping[str, str]) -> Versions:
    """Return the versions that a delta file lies between, as far as its metadata say."""
    if METADATA_VERSION in metadata:
        return Versions(metadata[METADATA_VERSION], metadata.get(METADATA_BASE_VERSION))
    return Versions(metadata.get(_SYNC_VERSION))


def metadata_of(format_: str, versions: Versions) -> dict[str, str]:
    """Return what a delta file's metadata say of the patch that it was made from."""
    found = {METADATA_FORMAT: format_, METADATA_VERSION: versions.version, METADATA_BASE_VERSION: versions.base}
    return {key: value for key, value in found.items() if value is not None}


def chosen_versions(version: str | None, base_version: str | None, told: Versions, out: Path, to: str) -> Versions:
    """Return the versions that an output says.

    Args:
        version, base_version: what the caller says; it comes first.
        told: what the source says; it comes next, and the name of a folder ``weight_v000003`` after it.
        out: the output.
        to: its format.

    Raises:
        UsageError: a version is needed and not known, or two of them contradict each other.
    """
    for name, value in (("version", version), ("base version", base_version)):
        if value is not None and not _WORD.fullmatch(value):
            raise UsageError(f"{name} {value!r} is not one word of at most 200 plain characters")
        if value is not None and to == DELTAFMT:
            raise UsageError(f"{name} {value!r}: a delta file has none; its base and its parent say where it belongs")
    if to == DELTAFMT:
        return told
    named = _FOLDER_NAME.fullmatch(out.name) if to == VERSION_FOLDER else None
    found = version or told.version or (named[1] if named else None)
    base = base_version or (told.base if found == told.version else None)
    if found is None:
        if to == VERSION_FOLDER:
            text = f"which version {out} is, is not known: the source says none, and neither does a name weight_v000001"
            raise UsageError(text, Remedy("version", None))
        return Versions(None, base)
    if base is None and _NUMBER.fullmatch(found) and int(found) > 0:
        base = str(int(found) - 1)
    if base is None and to == VERSION_FOLDER:
        raise UsageError(f"which version comes before {found!r} is not known", Remedy("base_version", None))
    numbers = [int(each) for each in (found, base) if each is not None and _NUMBER.fullmatch(each)]
    if to == TRL and len(numbers) < (1 if base is None else 2):
        raise UsageError(f"version {found!r} on {base!r}: TRL's versions are numbers")
    if found == base or (len(numbers) == 2 and numbers[0] <= numbers[1]):
        raise UsageError(f"version {found} cannot be made on version {base}")
    if named and (not numbers or int(named[1]) != int(found) if _NUMBER.fullmatch(found) else True):
        raise UsageError(f"a folder named {out.name} holds version {int(named[1])}, and this is version {found}")
    digits = 6 if to == VERSION_FOLDER else 1
    return Versions(_written(found, digits), None if base is None else _written(base, digits))


def _written(version: str, digits: int) -> str:
    return f"{int(version):0{digits}d}" if _NUMBER.fullmatch(version) else version


def check_base_version(source: Path, told: Versions, has: str | None, where: object) -> None:
    """Refuse a base that says that it is another version than the one that a patch was made on.

    Args:
        source: the patch.
        told: its versions.
        has: the version that the base is known to be, or None.
        where: what knows it.

    Raises:
        WrongBaseError: they differ.
    """
    if has is None or told.base is None or _written(has, 1) == _written(told.base, 1):
        return
    raise WrongBaseError(f"wrong base version: {source} was made on version {told.base}, and {where} is version {has}")


def applied_version(base: Path) -> str | None:
    """Return the version that an engine of SGLang has noted in a checkpoint that it patches; None if there is no note.

    Raises:
        InvalidFileError: the note is not valid.
        StorageError: it cannot be read.
    """
    where = base / _APPLIED
    try:
        version = json.loads(read_regular(where))["version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error("cannot read", where, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidFileError(f"{where}: it names no version") from error
    if not isinstance(version, str | int) or not _NUMBER.fullmatch(str(version)):
        raise InvalidFileError(f"{where}: {version!r} is not a version")
    return str(version)
