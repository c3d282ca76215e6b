"""The requests of a manager of continuous batching: which delta each of them uses, and when it may begin.

A request waits in the manager's queue until its delta is on the device. From then on it holds the delta, in the
version that it began with, until its last output is delivered.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from deltafmt.errors import DeltafmtError, NoRoomError, UsageError
from deltafmt.runtime.delta_holds import Attached, Held, refuse_sums
from deltafmt.runtime.residency import Residency
from deltafmt.runtime.rows import Names, Row, Rows

_CHILD = "__child#"  # what transformers puts between the id of a request and the number of one of its samples


class Source(Protocol):
    """The deltas that requests hold, of one model."""

    residency: Residency[Any, Any]

    @property
    def merged(self) -> str | None:
        """The name of the merged delta."""

    def known(self, name: str) -> Attached:
        """Return a delta's version."""

    def refuse_merged(self, what: str) -> None:
        """Refuse to serve while a delta is merged."""

    def prefetch(self, name: str) -> bool:
        """Start to load a delta."""

    def hold(self, names: Names, wait: float = 0) -> Held:
        """Return deltas on the device."""


@dataclass(slots=True, eq=False)
class Request:
    """A request of a manager.

    Attributes:
        row: what the request uses; None if it named nothing outside of all blocks, which is the model as it is.
        hold: its deltas on the device, from when it begins.
        prefetched: True once its deltas were asked for in the background.
        begun: True once the scheduler has it.
    """

    row: Row | None
    hold: Held | None = None
    prefetched: bool = False
    begun: bool = False


def check_row(server: Source, row: Row) -> None:
    """Refuse a request that names unknown deltas, or any while one is merged.

    Raises:
        UsageError: names the delta.
    """
    server.refuse_merged("deltas are served")
    refuse_sums(Rows((row,), each=False), {name: server.known(name) for name, _ in row.terms})


class Requests:
    """The requests that a manager has not finished, by id.

    Args:
        server: the deltas of the model.
        closed: a function that tells whether the deltas were detached.
        samples: the number of outputs of each request.

    Attributes:
        unsettled: True if requests may have ended of which no output tells: cancelled ones, and several samples.
    """

    def __init__(self, server: Source, closed: Callable[[], bool], samples: int) -> None:
        self._server = server
        self._closed = closed
        self._samples = samples
        self._lock = threading.Lock()
        self._found: dict[str, Request] = {}
        self.unsettled = False

    def add(self, request_id: str, request: Request) -> None:
        """Note a request that is put into the queue.

        Raises:
            UsageError: there is one of this id already.
        """
        with self._lock:
            if request_id in self._found:
                raise UsageError(f'there is a request "{request_id}" already; wait for its end or choose another id')
            self._found[request_id] = request

    def of(self, request_id: str) -> Request | None:
        """Return a request, or that of which it is a further sample; None if it has ended."""
        found = self._found.get(request_id)
        return found if found is not None else self._found.get(request_id.rpartition(_CHILD)[0])

    def idle(self) -> bool:
        """Tell whether no request has begun."""
        with self._lock:
            return not any(request.begun for request in self._found.values())

    def admit(self, request: Request) -> bool:
        """Bring a request's deltas to the device; return False if they are on their way, or if there is no room yet.

        The caller runs the other requests meanwhile. If there are none, it waits.

        Raises:
            DeltafmtError: the deltas cannot be served.
        """
        if request.hold is not None:
            return True
        if request.row is None:
            # Holding the base keeps others from merging a delta into it, while the request's keys and values are used.
            request.hold = None if self._closed() or self._server.merged is not None else self._server.hold(None)
            return True
        names = [name for name, _ in request.row.terms]
        keys = {name: self._server.known(name).key for name in names}
        if not self.idle():
            resident = set(self._server.residency.resident())
            missing = [name for name in names if keys[name] not in resident]
            if missing and not request.prefetched:
                request.prefetched = all(self._server.prefetch(name) for name in missing)
                return False
            if any(self._server.residency.loading(keys[name]) for name in missing):
                return False
        try:
            request.hold = self._server.hold(dict(request.row.terms) or None)
        except NoRoomError:
            request.prefetched = False
            return False
        return True

    def finished(self, request_id: str) -> None:
        """Release what a request holds whose last output is about to be delivered."""
        with self._lock:
            if self._samples > 1:
                self.unsettled = True
                return
            request = self._found.pop(request_id, None)
        if request is not None:
            release(request)

    def settle(self, live: Iterable[str]) -> None:
        """Release what requests hold that have begun and are not among the scheduler's any more."""
        self.unsettled = False
        roots = set(live)
        roots |= {one.rpartition(_CHILD)[0] for one in roots}
        with self._lock:
            ended = [name for name, request in self._found.items() if request.begun and name not in roots]
            requests = [self._found.pop(name) for name in ended]
        for request in requests:
            release(request)

    def forget(self, request_id: str) -> None:
        """Release what a request holds that never began."""
        with self._lock:
            request = self._found.pop(request_id, None)
        if request is not None:
            release(request)


def release(request: Request) -> None:
    """Release what a request holds."""
    hold, request.hold = request.hold, None
    if hold is not None:
        hold.release()


class Intake(queue.Queue[Any]):
    """The input queue of a manager: a request leaves it when its deltas are on the device.

    Args:
        requests: the manager's requests.
        take: a function that returns the request that the calling thread is about to put.
        fail: a function that delivers a request's failure.
        maxsize: the number of requests that may wait; 0 for any number.

    Attributes:
        failing: True while the manager fails the requests that wait; deltas are not loaded then.
    """

    def __init__(
        self, requests: Requests, take: Callable[[], Request], fail: Callable[[Any, Exception], None], maxsize: int
    ) -> None:
        super().__init__(maxsize)
        self.failing = False
        self._requests = requests
        self._take = take
        self._fail = fail

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add a request's state.

        Raises:
            UsageError: there is a request of this id already.
            queue.Full: no room in time.
        """
        self._requests.add(item.request_id, self._take())
        try:
            super().put(item, block, timeout)
        except BaseException:
            self._requests.forget(item.request_id)
            raise

    def get_nowait(self) -> Any:
        """Return the first request's state if the request may begin; called by the generation thread.

        Raises:
            queue.Empty: no request may begin now.
        """
        while True:
            with self.mutex:
                if not self.queue:
                    raise queue.Empty
                state = self.queue[0]
            request = self._requests.of(state.request_id)
            error: Exception | None = None
            if request is not None and not self.failing:
                try:
                    if not self._requests.admit(request):
                        raise queue.Empty
                except (DeltafmtError, RuntimeError) as caught:  # torch's, such as a full device
                    error = caught
            with self.mutex:
                withdrawn = not self.queue or self.queue[0] is not state
                if not withdrawn:
                    self.queue.popleft()
                    self.not_full.notify()
                    if request is not None:
                        request.begun = True
            if withdrawn:
                if request is not None:
                    release(request)
            elif error is None:
                return state
            else:
                self._fail(state, error)
                self._requests.forget(state.request_id)

    def withdraw(self, request_id: str) -> bool:
        """Take a request back that has not begun; return False if it has."""
        with self.mutex:
            found = [state.request_id for state in self.queue]
            if request_id not in found:
                return False
            del self.queue[found.index(request_id)]
            self.not_full.notify()
        self._requests.forget(request_id)
        return True
