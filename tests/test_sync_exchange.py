"""Weight sync: publisher and subscriber talk, also through streams, and neither runs ahead of the other."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")


from deltafmt.errors import BehindError, InvalidFileError, StorageError, UsageError, WrongBaseError
from deltafmt.sync import Folder, Publisher, Reply, Subscriber, read_message, write_message
from deltafmt.sync import states as states_module
from sync_states import State, copied, equal, model, stepped


def test_a_failed_apply_stops_the_sender() -> None:
    """Errors of the receiver were swallowed while the sender went on (slime 2104)."""
    states = [model()]
    for seed in range(1, 4):
        states.append(stepped(states[-1], seed))
    publisher, live = Publisher(ahead=5), copied(model())
    subscriber = Subscriber(live, "worker-3")
    assert publisher.receive(subscriber.receive(publisher.publish(states[0]).data)) is None
    damaged = bytearray(publisher.publish(states[1]).data)
    damaged[4096] ^= 1
    reply = Reply.from_bytes(subscriber.receive(damaged).to_bytes())
    assert reply.version == 1
    assert "is damaged" in str(reply.error)
    assert equal(live, states[0])
    anchor = publisher.receive(reply)
    with pytest.raises(
        BehindError, match=r"^subscriber 'worker-3' cannot follow: .* is damaged.*; send it what receive"
    ):
        publisher.publish(states[2])
    assert publisher.version == 2
    assert anchor is not None
    assert anchor.kind == "anchor"
    assert publisher.receive(subscriber.receive(anchor.data).to_bytes()) is None
    assert equal(live, states[1])
    assert publisher.receive(subscriber.receive(publisher.publish(states[2]).data)) is None
    assert equal(live, states[2])


def test_a_silent_subscriber_stops_the_sender_until_it_is_dropped() -> None:
    publisher = Publisher(ahead=1, subscribers=["a", "b"])
    subscribers = {name: Subscriber(copied(model()), name) for name in "ab"}
    for seed in range(2):
        message = publisher.publish(stepped(model(), seed))
        publisher.receive(subscribers["a"].receive(message.data))
    assert publisher.behind() == {"b": "it has version 0, and the last is version 2"}
    with pytest.raises(BehindError, match="'b' cannot follow: it has version 0, and the last is version 2"):
        publisher.publish(model())
    publisher.drop("b")
    assert publisher.publish(model()).version == 3
    with pytest.raises(UsageError, match="there is no subscriber 'b'"):
        publisher.drop("b")


def test_a_pruned_chain_is_not_replayed_on_another_version() -> None:
    """Patches whose first links had been pruned were applied to version 0 (SkyRL 1902)."""
    states = [model()]
    for seed in range(1, 5):
        states.append(stepped(states[-1], seed))
    publisher = Publisher(base=states[0])
    messages = [publisher.publish(state) for state in states[1:]]
    assert {message.kind for message in messages} == {"patch"}
    for start in (1, 2, 3):
        live = copied(states[0])
        subscriber = Subscriber(live, "one")
        with pytest.raises(WrongBaseError, match=f"version {start + 1} is a patch, and the tensors are not the state"):
            subscriber.apply(messages[start].data)
        assert equal(live, states[0])
    for message in messages:  # the whole chain leads there
        subscriber.apply(message.data)
    assert equal(live, states[-1])


def test_a_missing_version_is_a_gap() -> None:
    states = [model(), stepped(model(), 1), stepped(model(), 2)]
    publisher, live = Publisher(), copied(model(9))
    messages = [publisher.publish(state) for state in states]
    subscriber = Subscriber(live, "one")
    subscriber.apply(messages[0].data)
    reply = subscriber.receive(messages[2].data)
    line = "version 3 was made on another state than version 1, which is here; a version is missing"
    assert line in str(reply.error)
    assert equal(live, states[0])
    anchor = publisher.receive(reply)
    assert anchor is not None
    assert subscriber.apply(anchor.data) == 3
    assert equal(live, states[2])
    assert subscriber.apply(anchor.data) == 3  # once more: nothing to do
    with pytest.raises(UsageError, match="it gives version 2, and version 3 is here"):
        subscriber.apply(messages[1].data)


def test_a_failed_publish_is_followed_by_an_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    publisher, live = Publisher(), copied(model())
    subscriber = Subscriber(live, "one")
    publisher.receive(subscriber.receive(publisher.publish(model()).data))

    def fail(*args: object) -> None:
        raise MemoryError

    new = stepped(model(), 1)
    monkeypatch.setattr(states_module, "assemble", fail)
    with pytest.raises(MemoryError):
        publisher.publish(new)
    with pytest.raises(UsageError, match="the last publish failed"):
        publisher.anchor()
    monkeypatch.undo()
    message = publisher.publish(new)
    assert (message.kind, message.version) == ("anchor", 2)
    assert subscriber.receive(message.data).error is None
    assert equal(live, new)


def test_patches_that_do_not_pay_become_anchors() -> None:
    rng = np.random.default_rng(0)

    def noise() -> State:
        return {"w": torch.from_numpy(rng.integers(0, 256, 40000, np.uint8)).view(torch.bfloat16)}

    publisher = Publisher(anchor_every=None)
    first = noise()
    assert publisher.publish(first).kind == "anchor"
    assert publisher.publish(first).kind == "patch"
    assert publisher.publish(noise()).kind == "anchor"


def test_a_publisher_that_was_started_anew_counts_on() -> None:
    live = copied(model())
    subscriber = Subscriber(live, "one")
    old = Publisher()
    for seed in range(4):
        old.receive(subscriber.receive(old.publish(stepped(model(), seed)).data))
    publisher, state = Publisher(), stepped(model(), 8)
    reply = subscriber.receive(publisher.publish(state).data)
    assert "it gives version 1, and version 4 is here" in str(reply.error)
    anchor = publisher.receive(reply)
    assert anchor is not None
    assert subscriber.apply(anchor.data) == 5
    assert equal(live, state)
    assert publisher.receive(subscriber.reply()) is None
    assert publisher.publish(state).version == 6
    fresh = Publisher()
    assert fresh.receive(subscriber.reply()) is None
    assert fresh.publish(state).version == 6


def test_a_subscriber_says_if_it_has_another_state_of_that_version() -> None:
    publisher = Publisher()
    publisher.publish(model())
    anchor = publisher.receive(Reply("one", 1, "a" * 64))
    assert anchor is not None
    assert publisher.behind() == {"one": "its version 1 is not the one that was published"}
    assert anchor.version == 2  # what it has is replaced by a later version alone


def test_versions_of_another_publisher_of_the_same_number_are_replaced() -> None:
    """The anchor once had the version that the subscriber had, which refused it for ever."""
    live, mine, other = copied(model()), Publisher(), Publisher()
    subscriber, second = Subscriber(live, "one"), Subscriber(copied(model()), "two")
    subscriber.apply(other.publish(stepped(model(), 1)).data)
    state = stepped(model(), 2)
    mine.receive(second.receive(mine.publish(state).data))
    anchor = mine.receive(subscriber.reply())
    assert anchor is not None
    assert mine.receive(subscriber.receive(anchor.data)) is None
    assert equal(live, state)
    assert mine.behind() == {}  # the other one has this state, by an earlier number
    patch = mine.publish(stepped(state, 3, 0.001))
    for each in (subscriber, second):
        assert mine.receive(each.receive(patch.data)) is None
    assert subscriber.version == second.version == 3
    with pytest.raises(InvalidFileError, match="version 999999999999, after which there is none"):
        mine.receive(Reply("three", 10**12 - 1, "a" * 64))


def test_what_is_saved_is_applied_at_the_next_start(tmp_path: Path) -> None:
    live, publisher = copied(model()), Publisher()
    subscriber = Subscriber(live, "one")
    with pytest.raises(UsageError, match="there is no version to be saved"):
        subscriber.save(tmp_path / "state.deltafmt")
    publisher.receive(subscriber.receive(publisher.publish(stepped(model(), 1)).data))
    subscriber.save(tmp_path / "state.deltafmt")
    again = {name: torch.zeros_like(tensor) for name, tensor in live.items()}
    restarted = Subscriber(again, "one")
    assert restarted.apply(tmp_path / "state.deltafmt") == 1
    assert equal(again, live)
    assert restarted.apply(publisher.publish(stepped(model(), 2)).data) == 2  # it goes on with patches
    again["head.weight"][0, 0] += 1
    with pytest.raises(UsageError, match="the tensors are not version 2 any more"):
        restarted.save(tmp_path / "state.deltafmt")
    with pytest.raises(StorageError, match="cannot write"):
        subscriber.save(tmp_path / "nowhere" / "state.deltafmt")


def test_a_subscriber_that_fails_behind_the_last_version_gets_a_later_anchor() -> None:
    """An anchor of the version that it has was passed over in a folder, and publish waited for ever."""
    live, publisher, subscriber = copied(model()), Publisher(), Subscriber(copied(model()), "two")
    state = stepped(model(), 1)
    publisher.receive(subscriber.receive(publisher.publish(state).data))
    first = Subscriber(live, "one")
    first.apply(publisher.anchor().data)
    failed = Reply("one", 1, publisher.anchor().state, "a message of somebody else")
    anchor = publisher.receive(failed)
    assert anchor is not None
    assert anchor.version == 2
    again = publisher.receive(failed)
    assert again is not None
    assert again.version == 2  # the same reply, once more
    assert publisher.receive(first.receive(anchor.data)) is None
    patch = publisher.publish(stepped(state, 2, 0.001))
    for each in (first, subscriber):
        assert publisher.receive(each.receive(patch.data)) is None


def test_a_socket_carries_messages_and_replies() -> None:
    one, other = socket.socketpair()
    live, publisher = copied(model()), Publisher()
    subscriber, state = Subscriber(live, "one"), stepped(model(), 1)
    with one, other, one.makefile("rwb") as here, other.makefile("rwb") as there:
        write_message(here, publisher.publish(state).data)
        data = read_message(there)
        assert data is not None
        write_message(there, subscriber.receive(data).to_bytes())
        reply = read_message(here)
        assert reply is not None
        assert publisher.receive(reply) is None
    assert equal(live, state)


def test_a_pipe_without_a_buffer_takes_a_message_in_parts() -> None:
    """The rest was lost, and what came next was read as its end."""

    class Pipe(io.RawIOBase):
        def __init__(self, most: int | None) -> None:
            self.most, self.got = most, b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any, /) -> int | None:
            if self.most is None:
                return None
            self.got += bytes(data[: self.most])
            return min(len(data), self.most)

    pipe = Pipe(3)
    for data in (b"abcdefghij", b"", memoryview(np.arange(5, dtype=np.int32))):
        write_message(pipe, data)
    stream = io.BytesIO(pipe.got)
    assert [read_message(stream) for _ in range(4)] == [
        b"abcdefghij",
        b"",
        np.arange(5, dtype=np.int32).tobytes(),
        None,
    ]
    with pytest.raises(StorageError, match=r"^cannot write a message: the stream takes nothing"):
        write_message(Pipe(None), b"abc")


def test_a_stream_that_ends_early_is_no_message() -> None:
    write_message(file := io.BytesIO(), b"abc")
    whole = file.getvalue()
    assert read_message(io.BytesIO(whole)) == b"abc"
    assert read_message(io.BytesIO()) is None
    for data in (whole[:5], whole[:-1], b"\xff" * 8):
        with pytest.raises(InvalidFileError, match="the stream ends inside of a message"):
            read_message(io.BytesIO(data))
    with pytest.raises(InvalidFileError, match="a message of 3 bytes is longer than 2"):
        read_message(io.BytesIO(whole), max_bytes=2)
    file.close()
    for use in (lambda: read_message(file), lambda: write_message(file, b"abc")):
        with pytest.raises(StorageError, match="a message: i/o operation on closed file"):
            use()
    text: Any = io.StringIO("abcdefgh")
    with pytest.raises(StorageError, match="the stream gives text"):
        read_message(text)
    with pytest.raises(StorageError, match="embedded null byte"):
        Folder("a\0b")
