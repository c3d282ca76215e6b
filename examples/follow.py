"""One process trains a small model, another follows its parameters, and each of them is killed once.

Run it with ``python examples/follow.py``, or ``python examples/follow.py 30`` for 30 steps in the place of 200.
Messages go through a folder; ``docs/how-to/follow.md`` explains it. The model is trained in float32 by AdamW, and
followed in bfloat16. Both processes write down a digest of the parameters of each version, and the digests are
compared at the end.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from deltafmt.sync import Folder, Publisher, Subscriber

STEPS = 200
PAUSE = 0.01


def make_model() -> nn.Module:
    """Return a small language model."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(256, 64), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Linear(64, 256))


def digest(state: dict[str, torch.Tensor]) -> str:
    """Return the SHA-256 of parameters, as bfloat16."""
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(state[name].detach().bfloat16().view(torch.int16).numpy().tobytes())
    return sha.hexdigest()


def note(file: Path, version: int, parameters: str) -> None:
    """Write down which parameters a version has."""
    with open(file, "a", encoding="utf-8") as notes:
        notes.write(f"{version} {parameters}\n")


def train(place: Path, steps: int) -> None:
    """Train, and publish the parameters after every step; a process that starts anew goes on from its checkpoint."""
    model, checkpoint = make_model(), place / "checkpoint.pt"
    optimizer, first = torch.optim.AdamW(model.parameters(), lr=3e-4), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    folder, publisher = Folder(place / "messages"), Publisher(anchor_every=20, subscribers=["follower"])
    folder.collect(publisher)  # what subscribers have already, if this process was started anew
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(256, (8, 32), generator=generator)
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens * 7 % 256).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        while folder.collect(publisher):  # nobody is left behind
            time.sleep(PAUSE)
        state = {name: parameter.bfloat16() for name, parameter in model.state_dict().items()}
        message = publisher.publish(state)
        note(place / "trained.txt", message.version, digest(state))
        folder.send(message)
        folder.prune()
        if step % 10 == 9:
            partial = checkpoint.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, partial)
            partial.replace(checkpoint)
    while folder.collect(publisher):
        time.sleep(PAUSE)
    (place / "end").write_text(str(publisher.version))


def follow(place: Path) -> None:
    """Follow the parameters until the training has ended."""
    model = make_model().bfloat16()
    folder, subscriber = Folder(place / "messages"), Subscriber(model.state_dict(), "follower")
    while not (place / "end").exists() or subscriber.version != int((place / "end").read_text()):
        for reply in folder.follow(subscriber):
            if reply.error is not None:
                print(f"not applied: {reply.error}")
        if subscriber.version is not None:
            note(place / "followed.txt", subscriber.version, digest(model.state_dict()))
        time.sleep(PAUSE)


def wait_for(place: Path, version: int) -> None:
    """Wait until the follower has a version."""
    while not (place / "followed.txt").exists() or not any(
        int(line.split()[0]) >= version for line in (place / "followed.txt").read_text().splitlines()
    ):
        time.sleep(PAUSE)


def run(place: Path, steps: int) -> None:
    """Let one process follow the other, kill each once, and compare what they had."""
    processes = multiprocessing.get_context("fork")
    trainer = processes.Process(target=train, args=(place, steps))
    follower = processes.Process(target=follow, args=(place,))
    trainer.start()
    follower.start()
    wait_for(place, steps // 3)
    follower.kill()
    follower.join()
    print("the follower was killed, and starts anew")
    follower = processes.Process(target=follow, args=(place,))
    follower.start()
    wait_for(place, 2 * steps // 3)
    trainer.kill()
    trainer.join()
    print("the trainer was killed, and starts anew")
    trainer = processes.Process(target=train, args=(place, steps))
    trainer.start()
    for process in (trainer, follower):
        process.join()
        if process.exitcode:
            raise SystemExit("a process failed")
    trained = dict(line.split() for line in (place / "trained.txt").read_text().splitlines())
    followed = dict(line.split() for line in (place / "followed.txt").read_text().splitlines())
    equal = sum(trained[version] == parameters for version, parameters in followed.items())
    print(
        f"{len(trained)} versions were published, {len(followed)} were seen by the follower, {equal} of them are equal"
    )
    if equal != len(followed) or max(map(int, followed)) != max(map(int, trained)):
        raise SystemExit("the parameters differ")


def main() -> None:
    """Run the example."""
    torch.set_num_threads(1)  # a process that forks has no other threads
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)


if __name__ == "__main__":
    main()
