"""Deltas attached to a model: the base is in memory once, and each row of a batch names the fine-tune that it uses.

Any ``torch.nn.Module`` will do that is built of linear, embedding and other innermost modules. The model keeps its
class, its modules, its parameters and its state dict: forward hooks add the deltas to the modules' outputs, and
:meth:`Deltas.close` removes the hooks.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence

import torch
from torch import nn

from deltafmt.errors import NoRoomError, UsageError
from deltafmt.runtime import following
from deltafmt.runtime.binding import Rename
from deltafmt.runtime.calls import Calls
from deltafmt.runtime.changes import Watch
from deltafmt.runtime.delta_holds import Attached, Held, Pool, refuse_sums
from deltafmt.runtime.delta_store import DeltaStore, read_attached
from deltafmt.runtime.device_delta import DeviceDelta
from deltafmt.runtime.examine import Examined, Examiner
from deltafmt.runtime.merge import Merge
from deltafmt.runtime.model_batch import device_of
from deltafmt.runtime.residency import Residency
from deltafmt.runtime.row_places import Forms
from deltafmt.runtime.rows import BASE_NAME, Names, read_names
from deltafmt.runtime.scope import Block, Scope
from deltafmt.runtime.served_modules import ServedModules
from deltafmt.runtime.uncalled_reads import Reads
from deltafmt.runtime.warmup import TOKENS, Warmed, check_tokens, dtype_of, warm_up

# How long a call that has found a changed model waits for the calls of other threads.
_QUIET_SECONDS = 10.0


class Deltas:
    """The deltas of one model.

    Args:
        model: the base, on its device; it must not be moved while deltas are attached.
        device: the device of the deltas; the device of the model's parameters if not given.
        budget: the bytes of deltas that the device may hold; None for no limit.
        host_budget: the bytes of copies in host memory; a delta comes back from a copy quicker than from its file.
        verify_base: compare the model's parameters with the fingerprints of every delta's base.
        ignore: patterns; tensors whose names match one of them are left out.
        rename: a function from a tensor's name in a file to its name in the model; needed only for names that are not
            found by themselves.
        fuse: let linear modules that receive the same input share one launch.

    Attributes:
        residency: the deltas on the device.
        unchecked: the names of base tensors that could not be compared, by delta name; see :class:`BaseCheck`.
        ignored: the names of changed tensors that were left out, by delta name.

    Raises:
        UsageError: the model lies on several devices, and ``device`` is not given.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        budget: int | None = None,
        host_budget: int = 0,
        verify_base: bool = True,
        ignore: Sequence[str] = (),
        rename: Rename | None = None,
        fuse: bool = True,
    ) -> None:
        self.unchecked: dict[str, list[str]] = {}
        self.ignored: dict[str, list[str]] = {}
        self._model = model
        device = device_of(model) if device is None else torch.device(device)
        self._verify_base = verify_base
        self.scope = Scope()
        # Keys of versions that were freed, or will be. No other version gets one: a thread whose use of the old version
        # has ended may be about to free it by its key, although another thread has done so.
        self._replaced: set[str] = set()
        self.served = ServedModules(model, device, self.scope.active, self.scope.alone, fuse=fuse)
        self._examiner = Examiner(
            model, device, self.served.computes, verify_base=verify_base, ignore=ignore, rename=rename
        )
        self._store = DeltaStore(device, self.served.release)
        self.residency: Residency[DeviceDelta, DeviceDelta] = Residency(self._store, budget, host_budget)
        self._pool = Pool(self.residency, self.served, device, self._forget, self._check_closely)
        self._lock = threading.RLock()
        self._current: dict[str, Attached] = {}
        self._versions: dict[str, Attached] = {}
        self._merge: Merge | None = None
        self._merged: str | None = None
        self._watch = Watch(model)
        self.reads = self.scope.watched = Reads(model, self.served, self.scope.touches, self._watch)
        self.forms = Forms()
        self._watch.stamp(())
        self._calls = Calls(model, self)
        following.install()

    @property
    def names(self) -> list[str]:
        """The names of the deltas, in the order in which they were added."""
        return list(self._current)

    @property
    def merged(self) -> str | None:
        """The name of the delta that is merged into the base's weights."""
        return self._merged

    @property
    def saved_bytes(self) -> int:
        """Bytes of the base's original values, which are kept in host memory while a delta is merged."""
        return 0 if self._merge is None else self._merge.saved_bytes

    def add(self, name: str, path: str | os.PathLike[str]) -> None:
        """Attach a delta. The index of its file is read and the base is checked; the delta is loaded on first use.

        Raises:
            UsageError: the name is taken, the delta alone exceeds the budget, or a tensor has no place in the model.
            WrongBaseError: the model is not the delta's base; names the delta and the first tensor that differs.
            UnsupportedError: a tensor has a term of a kind that cannot be served.
            StorageError, InvalidFileError: the file cannot be read.
        """
        if not name or name == BASE_NAME:
            raise UsageError(f'a delta cannot have the name "{name}"')
        with self._lock:
            if name in self._current:
                raise UsageError(f'there is a delta "{name}" already; replace puts another file in its place')
        version, found = self._examine(name, path, "another is added")
        with self._lock:
            if name in self._current:
                raise UsageError(f'there is a delta "{name}" already; replace puts another file in its place')
            self._register(version, found)
            self._show(version, found)

    def replace(self, name: str, path: str | os.PathLike[str]) -> None:
        """Put another file in the place of a delta, while it is served.

        The new delta is examined, and loaded if the budget has room for both, before anything changes. Calls and blocks
        that have begun go on with the old one, which is freed when the last of them ends; those that begin later get
        the new one. If this raises an error, the old delta stays.

        Raises:
            UsageError: there is no such delta; otherwise as :meth:`add`.
        """
        self.known(name)
        version, found = self._examine(name, path, "another is replaced")
        with self._lock:
            self._register(version, found)
        try:
            with contextlib.suppress(NoRoomError):
                self.residency.acquire([version.key]).release()
            with self._lock:
                before = self.known(name)
                self._show(version, found)
        except BaseException:
            self._retire(version)
            raise
        self._retire(before)

    def _retire(self, version: Attached) -> None:
        self._replaced.add(version.key)
        self._pool.retire(version.key)

    def remove(self, name: str) -> None:
        """Detach one delta and free its memory.

        Raises:
            UsageError: the delta is unknown or in use.
        """
        version = self.known(name)
        try:
            self.residency.remove(version.key)
        except UsageError as error:
            raise UsageError(f'delta "{name}" is in use') from error
        with self._lock:
            self._current.pop(name, None)
            self.unchecked.pop(name, None)
            self.ignored.pop(name, None)
        self._forget(version.key)

    def prefetch(self, name: str) -> bool:
        """Start to load a delta and return at once; return False if the deltas in use leave no room for it.

        Raises:
            UsageError: the delta is unknown.
        """
        return self.residency.prefetch(self.known(name).key)

    def warmup(self, tokens: Sequence[int] = TOKENS, *, progress: Callable[[int, int], None] | None = None) -> Warmed:
        """Compile and load the kernels that the deltas can need, and pin the memory that loads pass through.

        Requests then wait for none of it, nor do those of deltas that are added later, if their layouts are the same.
        From then on, no request compiles anything on this device: where a kernel is missing all the same, the deltas
        are decoded in torch, which is slower, while it is compiled in another process. On the CPU there is nothing to
        do.

        Args:
            tokens: the numbers of tokens of a batch that are to be served: of a decoding step, and of prompts.
            progress: called with the number of finished variants and of all, as each is finished.

        Raises:
            UsageError: a number of tokens is none, or a kernel cannot be compiled.
        """
        check_tokens(tokens)
        with self._lock:
            files = [version.file.entries.values() for version in self._versions.values()]
        return warm_up(self._store.device, files, dtype_of(self._model), tokens, progress)

    def unused(self) -> list[str]:
        """Return the names of modules that deltas change but that no call has used while such a delta was served.

        A module is used when it is called, or when the model reads its weight in another way. The first call of a model
        warns of the modules that it did not use.
        """
        return self.served.unused()

    def use(self, names: Names, *, wait: float = 0) -> Block:
        """Return a block, which serves deltas within ``with``, without gradients.

        The block holds for the code inside it, and for the threads and the work that are started there until it ends.

        Args:
            names: None or "base" for the base alone, a name, or names with weights: ``{"math": 0.7, "law": 0.3}``
                is 0.7 times the one delta and 0.3 times the other. One of these is for all rows of the batch; a list
                has one for each row. While a model generates several rows for each name (beams), they stand side by
                side.
            wait: seconds to wait for other threads to give deltas back, if the budget has no room.

        Raises:
            UsageError: a name is unknown, no names are given, a delta is merged, or the deltas together exceed the
                budget. All errors are raised when the block is entered.
            NoRoomError: the deltas in use leave no room.
            StorageError, InvalidFileError: a delta's file cannot be read, or has changed.
        """
        return Block(self.scope, functools.partial(self.hold, names, wait))

    def merge(self, name: str) -> None:
        """Add a delta to the base's weights in place; every parameter gets the values that unpacking would write.

        The original values of the changed elements are kept in host memory, so that :meth:`unmerge` restores every
        bit.

        Raises:
            UsageError: deltas are in use or merged, or a tensor cannot be merged; the message names it.
        """
        # The lock is not held while waiting: the thread that loads deltas takes it to empty slots.
        with self._lock:
            self.refuse_merged("another is merged")
            self._check_idle("merge")
            self._check_closely()
            self._merged = name
        lease = None
        try:
            version = self.known(name)
            lease = self.residency.acquire([version.key])
            self._merge = Merge(name, lease, version.found.binding)
            self._merge.apply()
        except BaseException:
            self._merge = self._merged = None
            if lease is not None:
                lease.release()
            raise

    def unmerge(self) -> None:
        """Restore the base's weights, bit for bit.

        Raises:
            UsageError: nothing is merged, or the weights were changed since; then nothing is restored.
        """
        if self._merge is None:
            raise UsageError("no delta is merged")
        self._merge.undo()
        self._merge = self._merged = None
        with self._lock:
            self._stamp()

    def close(self) -> None:
        """Remove every hook and free every delta.

        Raises:
            UsageError: deltas are in use or merged.
        """
        with self._lock:
            self._check_idle("detach")
            self.refuse_merged("deltas are detached")
            self._calls.close()
            self._watch.close()
            self.served.close()
            self._examiner.close()
        self.residency.close()

    def check_model(self, *, closely: bool) -> None:
        """Follow a model that has changed since deltas were attached, or refuse it.

        Args:
            closely: look at every parameter, not only at what torch has told of.

        Raises:
            UsageError, WrongBaseError: the model is no longer the deltas' base.
        """
        if self._watch.changed(closely=closely) or (closely and self.served.disturbed()):
            self._follow()

    def _is_base(self) -> bool:
        return not self._watch.changed(closely=True)

    def _check_closely(self) -> None:
        self.check_model(closely=True)

    def vocabulary(self) -> int | None:
        """Return the rows of the model's output head, if it has one."""
        return self._examiner.vocabulary()

    def _follow(self) -> None:
        """Attach the deltas anew to a model that has changed: what is still their base is served as before.

        Raises:
            UsageError: other threads compute with the model all the time; they would compute with the base meanwhile.
        """
        with self.scope.quiet(_QUIET_SECONDS) as alone, self._lock:
            if self._watch.changed(closely=True) or self.served.disturbed():
                if not alone:
                    raise UsageError(
                        "the model was changed, or a hook put on it, while other threads are in calls of it, which did "
                        f"not end within {_QUIET_SECONDS:g} s; try again, and change a model between its calls"
                    )
                self._follow_locked()

    def _follow_locked(self) -> None:
        files = {key: (self._store.files[key], version.name) for key, version in self._versions.items()}
        found = self._examiner.examine_again(files, self._watch)
        for key, one in found.items():
            version = self._versions[key]
            version.found = one
            if self._current.get(version.name) is version:
                self._show(version, one)
        self.served.rebuild(
            {key: one.binding for key, one in found.items()},
            [bound for one in found.values() for bound in one.changed_modules()],
        )
        self.reads.forget()
        self.forms.forget()
        self._stamp()
        self.scope.forget_selections()

    def _stamp(self) -> None:
        self._watch.stamp(version.found.binding for version in self._versions.values())

    def _examine(self, name: str, path: str | os.PathLike[str], what: str) -> tuple[Attached, Examined]:
        self.refuse_merged(what)
        source = read_attached(os.fspath(path))
        self._check_closely()
        found = self._examiner.examine(source, name)
        return Attached(name, source.placing(found.needed, found.held()), found), found

    def _register(self, version: Attached, found: Examined) -> None:
        """Make a version known to the residency and to the modules that it changes."""
        keys = itertools.chain([version.name], (f"{version.name} ({number})" for number in itertools.count(2)))
        version.key = key = next(key for key in keys if key not in self._store.files and key not in self._replaced)
        self._store.files[key] = version.file
        try:
            self.residency.add(key)
        except UsageError:
            del self._store.files[key]
            raise
        self._versions[key] = version
        self.served.prepare(found.changed_modules())
        self.reads.forget()
        self.forms.forget()
        self._watch.add(found.binding)

    def _show(self, version: Attached, found: Examined) -> None:
        self._current[version.name] = version
        self.unchecked[version.name] = found.unchecked if self._verify_base else []
        self.ignored[version.name] = found.binding.ignored

    def _forget(self, key: str) -> None:
        """Drop what is known of a version that was freed."""
        with self._lock:
            self._store.files.pop(key, None)
            self._versions.pop(key, None)

    def known(self, name: str) -> Attached:
        """Return the version of a delta that calls get which begin now."""
        if name not in self._current:
            raise UsageError(f'there is no delta "{name}"; known: {", ".join(self._current) or "none"}')
        return self._current[name]

    def hold(self, names: Names, wait: float = 0) -> Held:
        """Return deltas, which stay on the device until they are released; the errors are those of :meth:`use`."""
        rows = read_names(names)
        with self._lock:
            self.refuse_merged("deltas are served")
            self._pool.begin()
        try:
            while True:
                with self._lock:
                    attached = {name: self.known(name) for name in rows.names}
                refuse_sums(rows, attached)
                try:
                    return self._pool.hold(rows, attached, wait, self._is_base)
                except UsageError:
                    # A version that was replaced in the meantime is gone; there is another.
                    if all(self._current.get(name) is version for name, version in attached.items()):
                        raise
        except BaseException:
            self._pool.end()
            raise

    def refuse_merged(self, what: str) -> None:
        """Refuse what cannot be done while a delta is merged."""
        if self._merged is not None:
            raise UsageError(f'delta "{self._merged}" is merged into the base; unmerge it before {what}')

    @property
    def _open(self) -> int:
        """The number of blocks and calls that hold deltas."""
        return self._pool.holds

    def _check_idle(self, what: str) -> None:
        if self._open:
            raise UsageError(f"cannot {what} while deltas are in use")
