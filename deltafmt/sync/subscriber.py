"""The receiver: applies messages to the live tensors of a model, to all of them or to none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from deltafmt.delta import DeltaFile
from deltafmt.errors import DeltafmtError, InvalidFileError, UsageError, WrongBaseError
from deltafmt.exact.coding import ExactDecoder
from deltafmt.exact.few import differing
from deltafmt.exact.scratch import scratch
from deltafmt.exact.units import Units
from deltafmt.format.limits import DEFAULT_LIMITS, Limits
from deltafmt.index.entries import TensorEntry
from deltafmt.output import write_durably
from deltafmt.pipeline.workers import thread_count, worker_pool
from deltafmt.sync import on_device
from deltafmt.sync.live import LiveTensor, check_in_place, live_tensors
from deltafmt.sync.message import Heading, Message, Reply, Source, open_message, state_digest
from deltafmt.sync.staged import Change, HostChange, WholeChange, make_all
from deltafmt.sync.states import KeptState, fingerprints


class Subscriber:
    """Follow a publisher: apply its messages to live tensors, in place.

    A message is decoded, and what it gives is checked, before any tensor is touched. Then all tensors change, or none.
    Whoever computes with the tensors meanwhile may see a part of the change: call this between two steps.

    Args:
        state: the live tensors by name, such as ``model.state_dict()``; names, dtypes and shapes are the publisher's.
            Only parameters themselves, as of ``dict(model.named_parameters())``, show a later move of the model.
        name: by which the publisher knows this subscriber.
        threads: worker threads; one for each processor if None.
        limits: how much memory and output a message may ask for.

    Raises:
        UsageError: the state holds something other than plain tensors.

    Attributes:
        name: as given.
        version: the version that the tensors have; None before the first message.

    Example::

        subscriber = Subscriber(model.state_dict(), "worker-3")
        for data in messages:
            send_back(subscriber.receive(data).to_bytes())
    """

    def __init__(
        self,
        state: Mapping[str, torch.Tensor],
        name: str = "subscriber",
        *,
        threads: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        if not isinstance(name, str):
            raise UsageError(f"a subscriber's name is a text, and {name!r} is none")
        self.name = name
        self.version: int | None = None
        self._digest: str | None = None
        self._live = live_tensors(state, "the model")
        self._by_name = {name: live for live in self._live.values() for name in (live.name, *live.tied)}
        self._threads, self._limits = thread_count(threads), limits

    def receive(self, message: Source) -> Reply:
        """Apply a message, and return the reply that the publisher must get.

        The reply says why a message was not applied. The publisher then makes no further version, and answers it with
        an anchor.

        Args:
            message: a message, its bytes, its path, or a file object.
        """
        try:
            self.apply(message)
        except DeltafmtError as error:
            return Reply(self.name, self.version, self._digest, str(error))
        return self.reply()

    def reply(self) -> Reply:
        """Return the reply that says which version the tensors have. Without a version, it asks for an anchor."""
        return Reply(self.name, self.version, self._digest)

    def apply(self, message: Source) -> int:
        """Apply a message, and return its version. A message that was applied already changes nothing.

        Raises:
            WrongBaseError: the message was made on another state than this one; an anchor helps.
            InvalidFileError: the message is damaged, or is for other tensors.
            UsageError: the message is older than the version that the tensors have, or parameters that were given have
                other memory now.
            StorageError: reading failed.
        """
        check_in_place(self._live.values())
        delta, heading = open_message(message, self._limits)
        with delta:
            if heading.version == self.version and heading.state == self._digest:
                return heading.version
            where = delta.container.name
            if self.version is not None and heading.version <= self.version:
                raise UsageError(f"{where}: it gives version {heading.version}, and version {self.version} is here")
            self._check_parent(heading, where)
            targets = self._targets(delta, heading)
            _check_state(delta, heading)
            changes = self._staged(delta, targets)
            try:
                make_all(changes)
            except BaseException:
                # What was written is undone, but who knows: the next message finds out what the tensors hold.
                self.version = self._digest = None
                raise
        self.version, self._digest = heading.version, heading.state
        return heading.version

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tensors to a file that :meth:`apply` takes, for a later start. A file of this name is replaced.

        The file is the old one or the new one, whatever happens.

        Raises:
            UsageError: there is no version yet, or somebody has written to the tensors.
            StorageError: writing failed.
        """
        if self.version is None:
            raise UsageError("there is no version to be saved; apply a message first")
        check_in_place(self._live.values())
        message: Message = KeptState(self._live, "fast", self._threads).anchor(self.version)
        if message.state != self._digest:
            raise UsageError(f"the tensors are not version {self.version} any more: somebody has written to them")
        write_durably(Path(path), message.data)

    def _check_parent(self, heading: Heading, where: str) -> None:
        """Refuse a patch that was made on another state than this one."""
        if heading.parent is None:
            return
        if self._digest is None:
            if state_digest(fingerprints(self._live)) != heading.parent:
                raise WrongBaseError(
                    f"{where}: version {heading.version} is a patch, and the tensors are not the state that it was "
                    "made on; an anchor is needed"
                )
        elif heading.parent != self._digest:
            raise WrongBaseError(
                f"{where}: version {heading.version} was made on another state than version {self.version}, which is "
                "here; a version is missing, and an anchor is needed"
            )

    def _targets(self, delta: DeltaFile, heading: Heading) -> list[tuple[TensorEntry, LiveTensor]]:
        """Return what each live tensor is made of, after comparing names, dtypes and shapes."""
        where, kind = delta.container.name, "patch" if heading.parent else "anchor"
        here, there = set(self._by_name), set(delta)
        if here != there:
            lost, new = sorted(there - here), sorted(here - there)
            what = f'has the tensor "{lost[0]}", which the model lacks' if lost else f'lacks the tensor "{new[0]}"'
            raise InvalidFileError(f"{where}: the message {what}")
        found: dict[int, TensorEntry] = {}
        for name, live in self._by_name.items():
            entry = delta.resolve(name)
            if (entry.dtype, entry.shape) != (live.dtype, live.shape):
                raise InvalidFileError(
                    f'{where}: tensor "{name}" is {entry.dtype} {list(entry.shape)} in the message, and {live.dtype} '
                    f"{list(live.shape)} in the model"
                )
            if entry.action != "exact" or entry.exact is None:
                raise InvalidFileError(f'{where}: tensor "{name}" is not exact, as those of a message are')
            if entry.base is not None and (
                heading.parent is None or (entry.base.dtype, entry.base.shape) != (entry.dtype, entry.shape)
            ):
                raise InvalidFileError(f'{where}: tensor "{name}" was made on a tensor that a {kind} does not have')
            other = found.setdefault(id(live), entry)
            if other.exact is not None and other.exact.digest != entry.exact.digest:
                raise InvalidFileError(
                    f'{where}: tensors "{other.name}" and "{entry.name}" are one in the model, and two in the message'
                )
        total = sum(entry.nbytes for entry in found.values())
        self._limits.check_output(total, delta.container.size, total, f"{where}: applying gives")
        return [(found[id(live)], live) for live in self._live.values()]

    def _staged(self, delta: DeltaFile, targets: Sequence[tuple[TensorEntry, LiveTensor]]) -> list[Change]:
        """Return the changes that a message makes, all of which were checked."""
        with worker_pool(self._threads, "sync") as pool:
            work = [(live, self._submit(pool, delta, entry, live)) for entry, live in targets]
            changes: list[Change] = []
            for live, futures in work:
                parts = [future.result() for future in futures]
                if live.is_direct or on_device.runs_on(live):
                    changes += (change for change in parts if not isinstance(change, np.ndarray | None))
                elif parts:
                    new = np.concatenate([part for part in parts if isinstance(part, np.ndarray)])
                    if not np.array_equal(new, live.units()):
                        changes.append(WholeChange(live, new))
            return changes

    def _submit(
        self, pool: ThreadPoolExecutor, delta: DeltaFile, entry: TensorEntry, live: LiveTensor
    ) -> list[Future[Change | Units | None]]:
        """Let workers decode a tensor: changes, or the units of each chunk where they lie in another order."""
        assert entry.exact is not None
        where, has_base = f'{delta.container.name}: tensors["{entry.name}"]', entry.base is not None
        with _located(where):
            decoder = ExactDecoder(delta.container.buffer(entry.exact.data), live.dtype, live.shape, entry.exact.chunk)
        self._limits.check_memory(decoder.memory, delta.container.size, f"{where}: a chunk takes")

        stream = on_device.stream_of(live)  # the caller's: a worker would have another, and perhaps another device

        def whole() -> Change | None:
            with _located(where), torch.inference_mode(), stream:
                return on_device.change_of(decoder, live, has_base=has_base)

        if on_device.runs_on(live):
            return [pool.submit(whole)]
        units = live.units()

        def chunk(number: int) -> HostChange | Units | None:
            first, end = decoder.span(number)
            here = units[first:end]
            # Whole units are wanted only of a tensor whose bytes lie in another order.
            room = (
                scratch("units", here.nbytes)[: here.nbytes].view(here.dtype) if live.is_direct and has_base else None
            )
            with _located(where):
                whole, places, new = decoder.changes(number, here if has_base else np.zeros_like(here), room=room)
            if not live.is_direct:
                return whole
            if not has_base or places is None:
                places = differing(whole, here)
                new = whole if places is None else whole[places]
            return None if places is not None and not places.size else HostChange(here, places, new)

        return [pool.submit(chunk, number) for number in range(len(decoder))]


def _check_state(delta: DeltaFile, heading: Heading) -> None:
    """Check that the tensors of a message are those of the state that it names."""
    digests = []
    for name in delta:
        exact = delta.resolve(name).exact
        assert exact is not None
        digests.append((name, exact.digest))
    if state_digest(digests) != heading.state:
        raise InvalidFileError(f"{delta.container.name}: its tensors are not those of the state that it names")


@contextlib.contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except InvalidFileError as error:
        raise error.located(where) from error
