"""The deltas that one block or call holds on the device, and the selections that it makes of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from deltafmt.errors import UsageError
from deltafmt.runtime.computed_by import ComputedBy
from deltafmt.runtime.delta_store import AttachedFile
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.examine import Examined
from deltafmt.runtime.leases import Lease
from deltafmt.runtime.packed import select
from deltafmt.runtime.residency import Residency
from deltafmt.runtime.rows import Row, Rows
from deltafmt.runtime.selection import BASE, Selection
from deltafmt.runtime.served_modules import ServedModules

_KEPT = 4


@dataclass(slots=True, eq=False)
class Attached:
    """One version of an attached delta.

    Attributes:
        name: the delta's name.
        file: the version's file.
        found: what its examination found.
        key: the version's own name in the residency; it differs from ``name`` where a delta was replaced.
    """

    name: str
    file: AttachedFile
    found: Examined
    key: str = ""

    @property
    def identity(self) -> bytes:
        """The seal of the version's file, which was computed when it was opened; a content id is only a claim."""
        return self.file.opened.container.seal


class Pool:
    """What all holds of a model share: the deltas on the device, and the count of the holds.

    Args:
        residency: the deltas on the device.
        served: the model's modules, which give a delta its slot.
        device: of the deltas.
        forget: called with the key of a version that was freed after it had been replaced.
        check: refuses a model that has changed and is no longer the deltas' base.

    Attributes:
        holds: the number of holds that were not released yet.
    """

    def __init__(
        self,
        residency: Residency[DeviceDelta, DeviceDelta],
        served: ServedModules,
        device: torch.device,
        forget: Callable[[str], None],
        check: Callable[[], None],
    ) -> None:
        self.residency = residency
        self.served = served
        self.device = device
        self.check = check
        self._forget = forget
        self._lock = threading.Lock()
        self.holds = 0
        self._retired: set[str] = set()

    def begin(self) -> None:
        """Count a hold that is about to be made."""
        with self._lock:
            self.holds += 1

    def end(self) -> None:
        """Count a hold less, and free the deltas that nothing else waited for."""
        with self._lock:
            self.holds -= 1
            retired = list(self._retired)
        for key in retired:
            self._free(key)

    def hold(self, rows: Rows, attached: Mapping[str, Attached], wait: float, is_base: Callable[[], bool]) -> Held:
        """Return the deltas of some rows, on the device.

        Args:
            rows: what each row uses.
            attached: the version of each delta, by name.
            wait: seconds to wait for room.
            is_base: a function that tells whether the model is still the deltas' base. If it is not, new slots wait for
                the next call, which refuses the model.

        Raises:
            UsageError, NoRoomError, StorageError, InvalidFileError: see :meth:`Residency.acquire`.
        """
        lease = self.residency.acquire([attached[name].key for name in rows.names], wait)
        held = Held(self, rows, attached, lease)
        try:
            if rows.names and (self.served.has(held.versions()) or is_base()):
                held.assign()
        except BaseException:
            lease.release()
            raise
        return held

    def retire(self, key: str) -> None:
        """Free a version of a delta as soon as nothing uses it."""
        with self._lock:
            self._retired.add(key)
        self._free(key)

    def _free(self, key: str) -> None:
        try:
            self.residency.remove(key)
        except UsageError:
            if self.residency.knows(key):
                return  # in use; the end of that use frees it
        with self._lock:
            self._retired.discard(key)
        self._forget(key)


class Held:
    """The deltas of one block.

    Args:
        pool: what all holds share.
        rows: what each row uses.
        attached: the version of each delta, by name.
        lease: keeps them on the device.

    Attributes:
        pool: what all holds share.
        identity: the file and weight of each delta, row by row: what other deltas computed is none of theirs.
        keys: the version of each delta, row by row.
        computed_by: the mark of caches that these deltas fill.
        text: the names as a message gives them.
        serves: True if a row has a delta.
        rows: the number of names; 0 if one name is for all rows.
    """

    def __init__(
        self,
        pool: Pool,
        rows: Rows,
        attached: Mapping[str, Attached],
        lease: Lease[DeviceDelta],
    ) -> None:
        self.rows = len(rows.rows) if rows.each else 0
        self.text = str(rows)
        self.serves = any(row.terms for row in rows.rows)
        identity = tuple(tuple((attached[n].identity, weight) for n, weight in row.terms) for row in rows.rows)
        self.identity: Hashable = identity
        self.computed_by = ComputedBy.of(identity, self.text)
        self.keys: object = tuple(tuple((attached[n].key, weight) for n, weight in row.terms) for row in rows.rows)
        self.pool = pool
        self._named = rows
        self._attached = attached
        self._lease = lease
        self._slots: dict[str, int] = {}

    def versions(self) -> set[str]:
        """Return the versions of the deltas."""
        return {self._attached[name].key for name in self._named.names}

    def assign(self) -> None:
        """Give each delta its slot in the operand tables."""
        for name in self._named.names:
            version = self._attached[name]
            delta = self._lease.values[version.key]
            self._slots[name] = self.pool.served.assign(version.key, delta, version.found.binding)

    def selection(self) -> Selection:
        """Return a new selection of these deltas.

        Raises:
            UsageError, WrongBaseError: the model is no longer the deltas' base.
        """
        if self.serves:
            self.pool.check()
        self.assign()
        mixes: dict[Row, int] = {}
        slots = []
        for row in self._named.rows:
            if not row.terms:
                slots.append(BASE)
            elif row.alone is not None:
                slots.append(self._slots[row.alone])
            else:
                slots.append(mixes.setdefault(row, BASE - 1 - len(mixes)))
        parts = {slot: tuple((self._slots[n], weight) for n, weight in row.terms) for row, slot in mixes.items()}
        return Selection(slots, self.pool.served.count, self.pool.device, each=self._named.each, mixes=parts)

    def terms(self) -> tuple[tuple[int, float], ...]:
        """Return the slots and weights of the first row; none for the base."""
        if any(name not in self._slots for name in self._named.names):
            self.assign()
        return tuple((self._slots[name], weight) for name, weight in self._named.rows[0].terms)

    def check_loss(self, base: int | None) -> None:
        """Refuse a loss that the model would compute with the base's vocabulary over logits of another width.

        Args:
            base: the rows of the base's output head; None if it has none.

        Raises:
            UsageError: the logits are wider or narrower than the base's.
        """
        found = [self._attached[name] for name in self._named.names]
        changed = [one for one in found if one.found.vocabulary is not None]
        if base is None or not changed:
            return
        whole = any(self._attached[name].found.vocabulary is None for row in self._named.rows for name, _ in row.terms)
        whole = whole or any(not row.terms for row in self._named.rows)
        width = max([one.found.vocabulary or 0 for one in changed] + [base] * whole)
        if width != base:
            one = next(one for one in changed if one.found.vocabulary == width)
            raise UsageError(
                f'the loss over labels takes the vocabulary of {base} tokens of the base, and delta "{one.name}" has '
                f"{width}; leave out labels= and compute the loss from the logits"
            )

    def again(self) -> Held:
        """Return a second hold of the same deltas; they are on the device, so nothing waits."""
        self.pool.begin()
        lease = self.pool.residency.acquire(self._lease.values)
        return Held(self.pool, self._named, self._attached, lease)

    def part(self, row: int) -> Held:
        """Return a hold of what one row uses, of the same versions; they are on the device, so nothing waits."""
        rows = Rows((self._named.rows[row],), each=False)
        self.pool.begin()
        lease = self.pool.residency.acquire([self._attached[name].key for name in rows.names])
        return Held(self.pool, rows, self._attached, lease)

    def release(self) -> None:
        """Release the deltas."""
        self._lease.release()
        self.pool.end()


class PackedSelections:
    """The selections of packed batches; the last ones are kept, for steps in which nobody came or went."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Selection] = {}

    def of(self, holds: Sequence[Held | None], lengths: Sequence[int], epoch: int) -> Selection | None:
        """Return the selection of a batch; None if all its tokens are the base's.

        Args:
            holds: what each request uses; None for the base.
            lengths: each request's number of tokens.
            epoch: how often the contents of slots were made anew.
        """
        pool = next((hold.pool for hold in holds if hold is not None and hold.serves), None)
        if pool is None:
            return None
        terms = [() if hold is None else hold.terms() for hold in holds]
        found = [None if hold is None else hold.identity for hold in holds]
        key = (tuple(terms), tuple(found), tuple(lengths), pool.served.count, epoch)
        if key not in self._kept:
            if len(self._kept) == _KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = select(terms, lengths, pool.served.count, pool.device)
        return self._kept[key]


def refuse_sums(rows: Rows, attached: Mapping[str, Attached]) -> None:
    """Refuse weights for a delta whose vocabulary is not the base's: the other deltas have no values for its tokens.

    Raises:
        UsageError: names the delta and the tensor.
    """
    for row in rows.rows:
        for name, _ in row.terms if row.alone is None else ():
            if (tensor := attached[name].found.grown) is not None:
                raise UsageError(
                    f'delta "{name}" changes the number of rows of tensor "{tensor}", and cannot be given a weight'
                )
