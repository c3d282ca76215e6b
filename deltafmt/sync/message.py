"""Messages from a publisher to its subscribers, and their replies.

A message is a delta file of exact tensors: a *patch*, whose base is the state of the version before, or an *anchor*,
which needs no base. Its metadata say which version it gives. A reply is a small JSON text.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Final, Self

from blake3 import blake3

from deltafmt.delta import DeltaFile
from deltafmt.errors import InvalidFileError, UsageError
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.output import Bytes

# Keys of the metadata.
VERSION: Final = "sync.version"
STATE: Final = "sync.state"
PARENT: Final = "sync.parent"

# A version is written with 12 digits in names of files.
MAX_VERSION: Final = 10**12 - 1

_NUMBER = re.compile(r"0|[1-9][0-9]{0,11}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_REPLY = 1 << 16


@dataclass(frozen=True, slots=True)
class Message:
    """A patch or an anchor, ready to be sent.

    Attributes:
        version: the version that a subscriber has after it.
        state: the digest of that state, in hexadecimal.
        parent: the digest of the state that it is applied to; None for an anchor.
        data: the bytes, a delta file.
        content_id: of the file, in hexadecimal; that of a patch's parent is in its index (spec section 18).
    """

    version: int
    state: str
    parent: str | None
    data: bytes
    content_id: str = ""

    @property
    def kind(self) -> str:
        """``patch`` or ``anchor``."""
        return "anchor" if self.parent is None else "patch"

    @property
    def metadata(self) -> dict[str, str]:
        """What the file says of itself."""
        return {VERSION: str(self.version), STATE: self.state, **({PARENT: self.parent} if self.parent else {})}


Source = Message | Bytes | str | os.PathLike[str] | BinaryIO


@dataclass(frozen=True, slots=True)
class Reply:
    """What a subscriber says after a message.

    Attributes:
        subscriber: its name.
        version: the version that it has; None if it has none yet.
        state: the digest of its state, in hexadecimal; None without a version.
        error: why the message was not applied; None if it was. Nothing was changed then, and an anchor helps.
    """

    subscriber: str
    version: int | None
    state: str | None
    error: str | None = None

    def to_bytes(self) -> bytes:
        """Return the reply as JSON."""
        fields = {"error": self.error, "state": self.state, "subscriber": self.subscriber, "version": self.version}
        return json.dumps(fields, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: Bytes) -> Self:
        """Return a reply, after checking it.

        Raises:
            InvalidFileError: it is no reply.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise InvalidFileError(f"not a reply of a subscriber, nor its bytes, but a {type(data).__name__}")
        try:
            if len(data) > _MAX_REPLY:
                raise ValueError
            fields = json.loads(bytes(data))
            subscriber, version, state, error = (fields.pop(key) for key in ("subscriber", "version", "state", "error"))
            known = version is None and state is None
            known = known or (type(version) is int and 0 <= version <= MAX_VERSION and bool(_DIGEST.fullmatch(state)))
            if fields or not known or type(subscriber) is not str or type(error) not in (str, type(None)):
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InvalidFileError(f"not a reply of a subscriber: {bytes(data[:60])!r}") from None
        return cls(subscriber, version, state, error)


@dataclass(frozen=True, slots=True)
class Heading:
    """What the metadata of a message say."""

    version: int
    state: str
    parent: str | None


def open_message(source: Source, limits: Limits = DEFAULT_LIMITS) -> tuple[DeltaFile, Heading]:
    """Open a message, given as such, as bytes, as a path or as a file object, and read its heading.

    Raises:
        UsageError: it is none of these.
        InvalidFileError: it is no valid delta file, or its metadata are not those of a message.
        StorageError: reading failed.
    """
    if isinstance(source, Message):
        source = source.data
    if isinstance(source, bytes | bytearray | memoryview):
        file = io.BytesIO(source)
        file.name = "the message"
        source = file
    elif not isinstance(source, str | os.PathLike) and not hasattr(source, "seek"):
        kind = type(source).__name__
        raise UsageError(f"a {kind} is no message; give a message, its bytes, its path or a file object")
    delta = DeltaFile(source, limits=limits)
    try:
        return delta, _heading(delta.metadata, delta.container.name)
    except BaseException:
        delta.close()
        raise


def _heading(metadata: Mapping[str, str], name: str) -> Heading:
    if VERSION not in metadata:
        raise InvalidFileError(f"{name}: no message of a publisher: its metadata have no {VERSION}")
    version, state, parent = metadata[VERSION], metadata.get(STATE, ""), metadata.get(PARENT)
    if not _NUMBER.fullmatch(version):
        raise InvalidFileError(f"{name}: metadata: {VERSION} is {version!r}, not a number of a version")
    for key, value in ((STATE, state), (PARENT, state if parent is None else parent)):
        if not _DIGEST.fullmatch(value):
            raise InvalidFileError(f"{name}: metadata: {key} is {value!r}, not a digest")
    return Heading(int(version), state, parent)


def state_digest(fingerprints: Iterable[tuple[str, bytes]]) -> str:
    """Return the digest of a state, in hexadecimal: a BLAKE3 over names and fingerprints (spec section 7.5).

    Args:
        fingerprints: of every tensor, ties included, with its name.
    """
    hasher = blake3(b"deltafmt state v1\n")
    for name, digest in sorted(fingerprints):
        data = name.encode()
        hasher.update(len(data).to_bytes(8, "little") + data + digest)
    return hasher.hexdigest()


def as_reply(reply: Reply | Bytes) -> Reply:
    """Return a reply that may have come as bytes."""
    return reply if isinstance(reply, Reply) else Reply.from_bytes(reply)
