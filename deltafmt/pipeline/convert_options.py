"""What ``deltafmt.convert`` is told of versions, checked against what the files and folders say of theirs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError, Remedy, UsageError, WrongBaseError
from deltafmt.foreign.patch import DELTAFMT, TRL, VERSION_FOLDER
from deltafmt.foreign.versions import NUMBER, WORD, Versions, is_later, number, one_before, read_versions
from deltafmt.output import storage_error
from deltafmt.regular_file import read_regular

# What a delta file says of the patch that it was converted from.
METADATA_FORMAT: Final = "convert.format"
METADATA_VERSION: Final = "convert.version"
METADATA_BASE_VERSION: Final = "convert.base_version"
# What a message of a publisher says (deltafmt.sync).
_SYNC_VERSION = "sync.version"
_SYNC_PARENT = "sync.parent"

# SGLang's engines look for version 3 in weight_v000003, and note in this file which version a checkpoint has.
_FOLDER_NAME = re.compile(r"weight_v([0-9]{6,12})")
APPLIED = Path(".weight_sync") / "state.json"


def versions_of(delta: DeltaFile) -> Versions:
    """Return the versions that a delta file lies between, as far as its metadata say.

    Raises:
        InvalidFileError: they are none, or contradict each other.
    """
    metadata, name = delta.metadata, delta.container.name
    if METADATA_VERSION in metadata:
        return read_versions(name, metadata[METADATA_VERSION], metadata.get(METADATA_BASE_VERSION))
    # A patch of a publisher is made on the version before; an anchor is a whole state, which any version may precede.
    version = metadata.get(_SYNC_VERSION)
    return read_versions(name, version, one_before(version) if _SYNC_PARENT in metadata else None)


def metadata_of_chain(first: DeltaFile, last: DeltaFile) -> dict[str, str]:
    """Return what the metadata of one delta file say that does what a chain of them does.

    All but the versions is what the last link says. The version is the last one's, and that of the base the first
    one's. If the two links count in different ways, they say no version together. It is no message of a publisher.
    """
    found = {key: value for key, value in last.metadata.items() if not key.startswith(("convert.", "sync."))}
    versions = Versions(versions_of(last).version, versions_of(first).base)
    alike = all((key in first.metadata) == (key in last.metadata) for key in (METADATA_VERSION, _SYNC_VERSION))
    if versions.version is None or not alike or not is_later(versions):
        return found
    return found | metadata_of(last.metadata.get(METADATA_FORMAT), versions)


def metadata_of(format_: str | None, versions: Versions) -> dict[str, str]:
    """Return what a delta file's metadata say of the patch that it was made from."""
    found = {METADATA_FORMAT: format_, METADATA_VERSION: versions.version, METADATA_BASE_VERSION: versions.base}
    return {key: value for key, value in found.items() if value is not None}


def chosen_versions(version: str | None, base_version: str | None, told: Versions, out: Path, to: str) -> Versions:
    """Return the versions that an output says.

    Args:
        version, base_version: what the caller says; it comes first.
        told: what the source says, and of the base what is known elsewhere; it comes next, and the name of a folder
            ``weight_v000003`` after it.
        out: the output.
        to: its format.

    Raises:
        UsageError: a version is needed and not known, or two of them contradict each other.
    """
    for name, value in (("version", version), ("base version", base_version)):
        if value is not None and not WORD.fullmatch(value):
            raise UsageError(f"{name} {value!r} is not one word of at most 200 plain characters")
        if value is not None and to == DELTAFMT:
            raise UsageError(f"{name} {value!r}: a delta file has none; its base and its parent say where it belongs")
    if to == DELTAFMT:
        return told
    named = _FOLDER_NAME.fullmatch(out.name) if to == VERSION_FOLDER else None
    found = version or told.version or (named[1] if named else None)
    base = base_version or told.base
    if found is None:
        if to == VERSION_FOLDER:
            text = f"which version {out} is, is not known: the source says none, and neither does a name weight_v000001"
            raise UsageError(text, Remedy("version", None))
        return Versions(None, base)
    if base is None and told.version is None:
        base = one_before(found)
    # Nothing comes before the first version, and a patch of TRL can say so.
    if base is None and (to == VERSION_FOLDER or (told.version is not None and number(found) != 0)):
        raise UsageError(f"which version comes before {found!r} is not known", Remedy("base_version", None))
    if to == TRL and not all(NUMBER.fullmatch(each) for each in (found, base) if each is not None):
        raise UsageError(f"version {found!r} on {base!r}: TRL's versions are numbers")
    if not is_later(Versions(found, base)):
        raise UsageError(f"version {found} cannot be made on version {base}")
    if named and int(named[1]) != number(found):
        raise UsageError(f"a folder named {out.name} holds version {int(named[1])}, and this is version {found}")
    digits = 6 if to == VERSION_FOLDER else 1
    return Versions(_written(found, digits), None if base is None else _written(base, digits))


def _written(version: str, digits: int) -> str:
    return f"{int(version):0{digits}d}" if NUMBER.fullmatch(version) else version


def check_base_version(source: Path, told: Versions, has: str | None, where: object) -> None:
    """Refuse a base that says that it is another version than the one that a patch was made on.

    Args:
        source: the patch.
        told: its versions.
        has: the version that the base is known to be, or None.
        where: what knows it.

    Raises:
        WrongBaseError: they differ; or the patch says no base, and the two versions do not follow each other.
    """
    if has is None:
        return
    after, before = number(told.version), number(has)
    if told.base is None and after is not None and before is not None and before != after - 1:
        raise WrongBaseError(f"wrong base version: {source} gives version {after}, and {where} is version {before}")
    if told.base is None or _written(has, 1) == _written(told.base, 1):
        return
    raise WrongBaseError(f"wrong base version: {source} was made on version {told.base}, and {where} is version {has}")


def applied_version(base: Path) -> str | None:
    """Return the version that an engine of SGLang has noted in a checkpoint that it patches; None if there is no note.

    Raises:
        InvalidFileError: the note is not valid.
        StorageError: it cannot be read.
    """
    where = base / APPLIED
    try:
        version = json.loads(read_regular(where))["version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise storage_error("cannot read", where, error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidFileError(f"{where}: it names no version") from error
    if not isinstance(version, str | int) or not NUMBER.fullmatch(str(version)):
        raise InvalidFileError(f"{where}: {version!r} is not a version")
    return str(version)
