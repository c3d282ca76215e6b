"""Kill a subscriber of weights at random moments, and check that what it left is one version, and never a mixture.

    python fuzz/sync_kills.py               200 kills, about a minute
    python fuzz/sync_kills.py --kills 20

The subscriber follows a folder of messages and saves what it has after each version. Its tensors are a file that is
mapped into memory, so a kill leaves them as they are in that moment: a half of them may be new. They change slowly
here, so that many kills meet this half. The next subscriber must find it out: either it brings them to the newest
version, or it asks for an anchor. fuzz/README.md says what else is killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from deltafmt.sync import Folder, Publisher, Subscriber
from deltafmt.sync.staged import HostChange

SHAPES = {"embed": (300, 64), "layers.experts": (4, 64, 64), "layers.norm": (64,), "head": (64, 300)}
PAUSE = 0.004
State = dict[str, torch.Tensor]


def state_of(version: int) -> State:
    """Return the state of a version: a few elements differ from one to the next, and no two states are equal."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    for name, tensor in state.items():
        moved = torch.rand(tensor.shape, generator=generator.manual_seed(len(name))) < 0.03
        tensor.view(torch.int16).add_(moved * (version % 1000))
    return state


def mapped(file: Path) -> State:
    """Return tensors that lie in a file."""
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    whole = torch.from_file(str(file), shared=True, size=sum(sizes.values()), dtype=torch.bfloat16)
    parts = whole.split(list(sizes.values()))
    return {name: part.view(SHAPES[name]) for name, part in zip(sizes, parts, strict=True)}


def follow(folder: Path, work: Path, *, once: bool = False) -> None:
    """Follow the folder, as a process of its own does, and save every version."""
    make = HostChange.make

    def slowly(self: HostChange) -> None:
        make(self)
        time.sleep(PAUSE)

    HostChange.make = slowly  # type: ignore[method-assign]
    subscriber, saved = Subscriber(mapped(work / "live"), "one", threads=1), work / "saved.deltafmt"
    if saved.exists():
        subscriber.apply(saved)
    messages = Folder(folder)
    while True:
        replies = messages.follow(subscriber)
        if replies and replies[-1].error is None:
            subscriber.save(saved)
        if once:
            return
        time.sleep(PAUSE)


def forked(work: Callable[[], None]) -> int:
    """Run work in a process, and return its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def killed_after(seconds: float, work: Callable[[], None]) -> None:
    """Run work in a process, and kill it."""
    child = forked(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise SystemExit("the subscriber ended by itself")


def same(one: State, other: State) -> bool:
    """Tell whether two states are equal, bit for bit."""
    return all(torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in SHAPES)


def check(work: Path, folder: Folder, publisher: Publisher) -> str:
    """Check what a kill has left, and return what the live tensors were."""
    if (work / "saved.deltafmt").exists():
        saved = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in SHAPES.items()}
        version = Subscriber(saved).apply(work / "saved.deltafmt")
        assert same(saved, state_of(version)), f"what was saved is not version {version}"
    live = mapped(work / "live")
    found = next((version for version in range(publisher.version, -1, -1) if same(live, state_of(version))), None)
    # A subscriber that has nothing but the tensors takes the newest patch if they are the state before it.
    newest = folder.versions()[-1]
    if newest[1] == "patch":
        trial = {name: tensor.clone() for name, tensor in live.items()}
        subscriber = Subscriber(trial, "trial", threads=1)
        reply = subscriber.receive(folder.read(*newest))
        assert (reply.error is None) == (found == newest[0] - 1), (reply, found)
        assert same(trial, live if reply.error else state_of(newest[0])), "a patch was applied to another state"
    return "a mixture" if found is None else "one version"


def run(kills: int, seed: int, place: Path) -> Counter[str]:
    """Kill a subscriber so many times, and return how often its tensors were what."""
    chance, messages = random.Random(seed), place / "messages"
    size = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    (place / "live").write_bytes(bytes(2 * size))
    folder, publisher = Folder(messages), Publisher(anchor_every=7, ahead=1 << 30, threads=1)
    seen: Counter[str] = Counter()
    # The first follower comes to its end, and says how long one takes on this machine.
    folder.send(publisher.publish(state_of(1)))
    start = time.monotonic()
    os.waitpid(forked(lambda: follow(messages, place, once=True)), 0)
    usual = time.monotonic() - start
    for _ in range(kills):
        for _ in range(chance.randint(1, 3)):
            folder.send(publisher.publish(state_of(publisher.version + 1)))
        folder.prune()
        killed_after(chance.uniform(0, 2.5 * usual), lambda: follow(messages, place))
        seen[check(place, folder, publisher)] += 1
        folder.collect(publisher)
    live = mapped(place / "live")
    subscriber = Subscriber(live, "one")
    subscriber.apply(place / "saved.deltafmt")
    folder.follow(subscriber)
    assert same(live, state_of(publisher.version))
    assert folder.collect(publisher) == {}
    return seen


def main() -> None:
    """Run the kills that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process that forks must have no other threads
    with tempfile.TemporaryDirectory() as place:
        seen = run(options.kills, options.seed, Path(place))
    print(f"{options.kills} kills: the tensors were one version {seen['one version']} times, and a mixture")
    print(f"{seen['a mixture']} times, which was found out each time; what was saved was one version every time")


if __name__ == "__main__":
    main()
