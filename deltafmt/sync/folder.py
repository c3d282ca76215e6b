"""A folder, or a URL, through which messages and replies go.

A message is a file ``000000000012.patch.deltafmt`` or ``000000000012.anchor.deltafmt``; the last reply of a subscriber
is ``NAME.reply.json``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from deltafmt.errors import InvalidFileError, StorageError, UsageError
from deltafmt.sync.message import Message, Reply
from deltafmt.sync.publisher import Publisher
from deltafmt.sync.stores import LocalStore, Store, UrlStore
from deltafmt.sync.subscriber import Subscriber

_MESSAGE = re.compile(r"([0-9]{12})\.(anchor|patch)\.deltafmt")
_REPLY = ".reply.json"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


class Folder:
    """Messages of one publisher, and the replies of its subscribers, as files.

    Files appear whole. A publisher and its subscribers may be killed at any time, and be started anew.

    Args:
        place: a path, or a URL that fsspec knows, such as ``s3://bucket/run``. A local folder is made if it is missing.

    Raises:
        MissingExtraError: a URL is given and fsspec is missing.
        StorageError: the folder cannot be made.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        url = os.fsdecode(place)
        self._store: Store = UrlStore(url) if "://" in url else LocalStore(Path(url))

    def send(self, message: Message) -> None:
        """Write a message. One that is here already is left as it is.

        Raises:
            UsageError: another message of this version is here: the publisher has not counted on from it.
            StorageError: reading or writing failed.
        """
        name = _file_name(message.version, message.kind)
        if name not in self._store.names():
            self._store.write(name, message.data)
        elif self._store.read(name) != message.data:
            raise UsageError(
                f"{name} is here with other bytes, from another publisher; collect before the first publish, so that "
                "versions count on, or send to another folder"
            )

    def versions(self) -> list[tuple[int, str]]:
        """Return the versions that are here, in order, and the kind of each message.

        Raises:
            StorageError: listing failed.
        """
        return _versions(self._store.names())

    def read(self, version: int, kind: str) -> bytes:
        """Return a message, as :meth:`versions` names it.

        Raises:
            StorageError: reading failed.
        """
        return self._store.read(_file_name(version, kind))

    def collect(self, publisher: Publisher) -> dict[str, str]:
        """Hand all replies to a publisher, write the anchors that it answers with, and return who is still behind.

        A publisher that has published nothing counts on from the newest version that is here, whoever has sent it.

        Returns:
            What :meth:`Publisher.behind` gives: empty once the next version can be published.

        Raises:
            InvalidFileError: a reply is damaged.
            StorageError: reading or writing failed.
        """
        names = sorted(self._store.names())
        there = set(_versions(names))
        publisher.count_on(max((version for version, _ in there), default=0))
        for name in names:
            if not name.endswith(_REPLY):
                continue
            try:
                answer = publisher.receive(self._store.read(name))
            except InvalidFileError as error:
                raise error.located(name) from error
            # An anchor of this version may be there already, and the subscriber has not come to it yet.
            if answer is not None and (answer.version, answer.kind) not in there:
                self.send(answer)
                there.add((answer.version, answer.kind))
        return publisher.behind()

    def follow(self, subscriber: Subscriber) -> list[Reply]:
        """Apply the messages that a subscriber lacks, write its reply, and return what it said after each message.

        Without an unbroken run of patches, the subscriber goes on with the newest anchor. A patch that it cannot apply
        makes it look for a later anchor. Without one the call ends; the publisher answers when it collects. A message
        that is pruned meanwhile counts as one that was not there.

        Raises:
            UsageError: the subscriber's name cannot be that of a file.
            StorageError: reading or writing failed.
        """
        if not _NAME.fullmatch(subscriber.name):
            raise UsageError(f"subscriber {subscriber.name!r}: a name in a folder has letters, digits, and - _ . alone")
        replies: list[Reply] = []
        route = self._route(subscriber.version)
        while route:
            version, kind = route.pop(0)
            try:
                data = self.read(version, kind)
            except StorageError:
                if (version, kind) in self.versions():
                    raise
                route = self._route(subscriber.version)
                continue
            replies.append(subscriber.receive(data))
            if replies[-1].error is not None:
                # What follows was made on this message; only an anchor, of this version or a later one, needs it not.
                route = _from_anchor(self.versions(), version) if kind == "patch" else []
        if replies:
            self._store.write(subscriber.name + _REPLY, replies[-1].to_bytes())
        return replies

    def prune(self, keep_anchors: int = 2) -> None:
        """Remove the messages before the newest anchors. A subscriber that needed them goes on with an anchor.

        Args:
            keep_anchors: how many anchors stay, with what comes behind the oldest of them.

        Raises:
            UsageError: no anchor would stay.
            StorageError: removing failed.
        """
        if keep_anchors < 1:
            raise UsageError(f"{keep_anchors} anchors are too few: a subscriber that starts needs one")
        versions = self.versions()
        anchors = [version for version, kind in versions if kind == "anchor"]
        if len(anchors) > keep_anchors:
            for version, kind in versions:
                if version < anchors[-keep_anchors]:
                    self._store.remove(_file_name(version, kind))

    def _route(self, held: int | None) -> list[tuple[int, str]]:
        """Return the messages that lead from a version to the newest one, as far as their names tell."""
        ahead = [entry for entry in self.versions() if held is None or entry[0] > held]
        kinds = dict(sorted(ahead))  # of two messages of one version this is the patch
        if held is not None and list(kinds) == list(range(held + 1, held + 1 + len(kinds))):
            return list(kinds.items())
        return _from_anchor(ahead, 0) or list(kinds.items())


def _versions(names: Iterable[str]) -> list[tuple[int, str]]:
    """Return the versions of messages by the names of their files, in order, and the kind of each."""
    found = (_MESSAGE.fullmatch(name) for name in names)
    return sorted((int(match[1]), match[2]) for match in found if match)


def _from_anchor(messages: list[tuple[int, str]], least: int) -> list[tuple[int, str]]:
    """Return the newest anchor of a version or a later one, and the patches behind it; nothing without an anchor."""
    anchors = [version for version, kind in messages if kind == "anchor" and version >= least]
    if not anchors:
        return []
    return [(anchors[-1], "anchor"), *(entry for entry in messages if entry[0] > anchors[-1] and entry[1] == "patch")]


def _file_name(version: int, kind: str) -> str:
    return f"{version:012}.{kind}.deltafmt"
