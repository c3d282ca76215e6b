"""The sender: turns successive states of a model into patches and anchors, and waits for whoever cannot follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch

from deltafmt.errors import BehindError, InvalidFileError, UsageError
from deltafmt.exact.chunk import LEVELS
from deltafmt.format.choices import check_choice
from deltafmt.output import Bytes
from deltafmt.pipeline.workers import thread_count
from deltafmt.sync.live import live_tensors
from deltafmt.sync.message import MAX_VERSION, Message, Reply, as_reply
from deltafmt.sync.states import KeptState

# Versions whose digests are remembered, to be compared with those of replies.
_REMEMBERED = 1000


@dataclass(slots=True)
class _Follower:
    """A subscriber as the publisher knows it: the last version that it has, its digest, and why it has no later one."""

    version: int
    state: str | None = None
    error: str | None = None


class Publisher:
    """Turn the states of a model that is being trained into messages, each a delta file.

    The first message is an anchor, which gives a whole state; the next ones are patches, which say what has changed.
    The publisher keeps a copy of the last state in host memory. It is not meant for several threads.

    Args:
        anchor_every: at every so manieth version the message is an anchor; None for the first version only.
        ahead: how many versions a subscriber may be behind when the next one is made.
        subscribers: names of subscribers that must follow from the start; others are known from their first reply.
        base: the state that all subscribers have already, such as the checkpoint that training starts from. The first
            message is then a patch.
        version: the version of ``base``; without ``base``, the first version is the next one.
        level: ``default``, or ``fast`` for larger messages in less time.
        threads: worker threads; one for each processor if None.

    Raises:
        UsageError: an argument is out of range, or ``base`` is no state.

    Example::

        publisher = Publisher(anchor_every=100)
        message = publisher.publish(model.state_dict())
        send(message.data)
        answer = publisher.receive(reply)      # what the subscriber sent back
        if answer is not None:                 # it could not follow: this anchor helps
            send(answer.data)
    """

    def __init__(
        self,
        *,
        anchor_every: int | None = 100,
        ahead: int = 0,
        subscribers: Iterable[str] = (),
        base: Mapping[str, torch.Tensor] | None = None,
        version: int = 0,
        level: str = "default",
        threads: int | None = None,
    ) -> None:
        anchor_every = None if anchor_every is None else _whole("anchor_every", anchor_every)
        ahead, version = _whole("ahead", ahead), _whole("version", version)
        names = _names(subscribers)
        if anchor_every is not None and anchor_every < 1:
            raise UsageError(f"an anchor at every {anchor_every} versions is not possible; give 1 or more, or None")
        if ahead < 0 or not 0 <= version < MAX_VERSION:
            raise UsageError(f"ahead {ahead} and version {version} must be 0 or more, and version below {MAX_VERSION}")
        check_choice("level", level, LEVELS)
        self.version = version
        self._anchor_every, self._ahead = anchor_every, ahead
        self._level, self._threads = level, thread_count(threads)
        self._start = version
        self._followers = {name: _Follower(version) for name in names}
        self._replies: dict[str, Reply] = {}
        self._dropped: dict[str, Reply] = {}
        self._kept: KeptState | None = None
        self._digests: dict[int, str] = {}
        self._before: str | None = None
        self._published = False
        self._anchored = version
        self._anchor: Message | None = None
        self._anchor_bytes: int | None = None
        if base is not None:
            self._kept = KeptState(live_tensors(base, "the base"), level, self._threads)
            self._remember(self._kept.digest())

    def publish(self, state: Mapping[str, torch.Tensor]) -> Message:
        """Return the message that gives the next version.

        It is an anchor if it is the first, if it is the turn of one, if tensors have come, gone or changed their shape
        since the last version, or if a patch would be no smaller. The state may lie on any device. It must not change
        during the call; if it does, subscribers get what was read.

        Args:
            state: tensors by name, such as ``model.state_dict()``.

        Raises:
            BehindError: a subscriber could not follow, or has not answered. Nothing was made.
            UsageError: the state holds something other than plain tensors.
        """
        self._check_followers()
        live = live_tensors(state)
        version, kept = self.version + 1, self._kept
        if version > MAX_VERSION:
            raise UsageError(f"there is no version after {MAX_VERSION}")
        # If anything fails from here on, the copy may be half new, and the next message is an anchor.
        self._kept = self._anchor = None
        turn = self._anchor_every is not None and version - self._anchored >= self._anchor_every
        if kept is None or not kept.fits(live):
            kept = KeptState(live, self._level, self._threads)
            message = kept.anchor(version)
        elif turn:
            kept.take(live)
            message = kept.anchor(version)
        else:
            message = kept.patch(live, version, self._before)
            limit = kept.nbytes if self._anchor_bytes is None else self._anchor_bytes
            if len(message.data) >= limit:
                message = kept.anchor(version)
        self._kept, self.version, self._before, self._published = kept, version, message.content_id, True
        self._remember(message.state)
        if message.kind == "anchor":
            self._anchored, self._anchor, self._anchor_bytes = version, message, len(message.data)
        return message

    def anchor(self) -> Message:
        """Return the last version as an anchor, for a subscriber that comes late or could not follow.

        Raises:
            UsageError: there is no version yet.
        """
        if self._kept is None:
            raise UsageError("there is no version yet, or the last publish failed; publish a state first")
        if self._anchor is None:
            self._anchor = self._kept.anchor(self.version)
        return self._anchor

    def receive(self, reply: Reply | Bytes) -> Message | None:
        """Take the reply of a subscriber, and return the anchor that it needs; None if it needs nothing.

        The last reply of a subscriber that was dropped since counts for nothing; with another one, the subscriber is
        back.

        Args:
            reply: a reply, or its bytes.

        Raises:
            InvalidFileError: the bytes are no reply, or it names the last version that there can be.
        """
        reply = as_reply(reply)
        version = self._start if reply.version is None else reply.version
        if version >= MAX_VERSION:
            raise InvalidFileError(
                f"subscriber {reply.subscriber!r} says that it has version {version}, after which there is none"
            )
        if self._kept is None:
            # A publisher that was started anew counts on from where the one before it came to.
            self.count_on(version)
            return None
        if self._dropped.get(reply.subscriber) == reply:
            return None
        self._dropped.pop(reply.subscriber, None)
        self._replies[reply.subscriber] = reply
        follower = _Follower(version, reply.state, self._fault(reply))
        self._followers[reply.subscriber] = follower
        if follower.error is None and reply.version is not None:
            return None
        if version > self.version or reply.version == self.version:
            # Only a later version replaces what the subscriber has, or what it cannot apply behind that.
            self.version, self._anchor, self._published = version + 1, None, True
            self._remember(self._kept.digest())
            self._before = self.anchor().content_id
        return self.anchor()

    def count_on(self, version: int) -> None:
        """Count on from a version that an earlier publisher has sent. A publisher that has published keeps its own.

        A ``base`` then counts as that version.

        Args:
            version: the version.
        """
        if version <= self.version or (self._published and self._kept is not None):
            return
        self.version = version
        if not self._published:
            self._start = self._anchored = version
            for name in self._followers.keys() - self._replies.keys():
                self._followers[name] = _Follower(version)
            if self._kept is not None:
                self._digests, self._anchor = {version: self._kept.digest()}, None

    def drop(self, subscriber: str) -> None:
        """Forget a subscriber, which will not come back.

        Raises:
            UsageError: there is none of this name.
        """
        if self._followers.pop(subscriber, None) is None:
            raise UsageError(f"there is no subscriber {subscriber!r}")
        if subscriber in self._replies:
            self._dropped[subscriber] = self._replies.pop(subscriber)

    def behind(self) -> dict[str, str]:
        """Return the subscribers for whom :meth:`publish` waits, and why."""
        found = {}
        last = self._digests.get(self.version)
        for name, follower in self._followers.items():
            if follower.error is not None:
                found[name] = follower.error
            elif last not in (None, follower.state) and follower.version < self.version - self._ahead:
                found[name] = f"it has version {follower.version}, and the last is version {self.version}"
        return found

    def _check_followers(self) -> None:
        for name, why in self.behind().items():
            raise BehindError(
                f"subscriber {name!r} cannot follow: {why}; send it what receive or anchor gives, or drop it"
            )

    def _fault(self, reply: Reply) -> str | None:
        """Return what is wrong with a subscriber's state."""
        if reply.error is not None:
            return reply.error
        if reply.version is None:
            return None
        if reply.version > self.version:
            return f"it has version {reply.version}, which this publisher has not made"
        if self._digests.get(reply.version, reply.state) != reply.state:
            return f"its version {reply.version} is not the one that was published"
        return None

    def _remember(self, digest: str) -> None:
        self._digests[self.version] = digest
        for old in sorted(self._digests)[:-_REMEMBERED]:
            del self._digests[old]


def _whole(what: str, number: Any) -> int:
    """Return a whole number of any type, such as NumPy's, as an int.

    Raises:
        UsageError: it is none.
    """
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise UsageError(f"{what} is {number!r}, and not a whole number")
    return int(number)


def _names(subscribers: Any) -> list[str]:
    """Return the names of subscribers as a list.

    Raises:
        UsageError: it is no list of texts.
    """
    if isinstance(subscribers, str):
        raise UsageError(f"subscribers {subscribers!r} is one name, and a list of them is needed")
    names: list[str] = list(subscribers) if isinstance(subscribers, Iterable) else [subscribers]
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"subscribers {subscribers!r} is no list of names")
    return names
