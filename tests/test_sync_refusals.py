"""Weight sync: what cannot be applied changes nothing and is refused in one line."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")


import deltafmt
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import BehindError, DeltafmtError, InvalidFileError, UsageError
from deltafmt.exact import chunk as chunks
from deltafmt.sync import Publisher, Subscriber
from deltafmt.sync import states as states_module
from deltafmt.sync.staged import HostChange
from sync_states import State, bits, copied, equal, hostile, model, stepped


def test_a_patch_for_experts_that_lie_in_another_order_is_refused() -> None:
    """The same bytes in another order are found before one is written, whatever the message's own checksum says."""
    state = {"experts": torch.randn(4, 64, 64).bfloat16()}
    publisher, live = Publisher(), copied(state)
    subscriber = Subscriber(live, "one")
    subscriber.apply(publisher.publish(state).data)
    publisher.receive(subscriber.reply())
    live["experts"].copy_(state["experts"][[1, 0, 2, 3]])  # a loader that sorts experts anew
    before = copied(live)
    reply = subscriber.receive(publisher.publish(stepped(state, 3, 0.5)).data)
    assert reply.error is not None
    assert "what it restores is not what was packed" in reply.error
    assert equal(live, before)
    publisher.receive(reply)
    with pytest.raises(BehindError, match="what it restores is not what was packed"):
        publisher.publish(state)


def test_weights_that_are_tied_here_and_differ_there_are_refused() -> None:
    weight = torch.randn(20, 8)
    live: State = {"embed": torch.zeros(20, 8)}
    live["head"] = live["embed"]
    subscriber = Subscriber(live)
    subscriber.apply(Publisher().publish({"embed": weight, "head": weight.clone()}).data)
    assert bits(live["head"]) == bits(weight)
    with pytest.raises(InvalidFileError, match='"embed" and "head" are one in the model, and two in the message'):
        Subscriber(live).apply(Publisher().publish({"embed": weight, "head": weight + 1}).data)
    assert bits(live["head"]) == bits(weight)


def test_all_tensors_change_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure in the middle left a half of the tensors new (NeMo-RL 2444)."""
    state, new = model(), stepped(model(), 1, 0.5)
    publisher, live = Publisher(), copied(model())
    live["head.weight"] = torch.zeros(200, 64).t()  # one that is written as a whole
    subscriber = Subscriber(live, "one")
    publisher.receive(subscriber.receive(publisher.publish(state).data))
    message, make = publisher.publish(new), HostChange.make
    for fails_at in (1, 2):
        calls = iter(range(1, 9))

        def failing(self: HostChange, calls: Iterator[int] = calls, fails_at: int = fails_at) -> None:
            make(self)
            if next(calls) == fails_at:
                raise KeyboardInterrupt

        monkeypatch.setattr(HostChange, "make", failing)
        with pytest.raises(KeyboardInterrupt):
            subscriber.apply(message.data)
        assert equal(live, state)
        assert subscriber.version is None
    monkeypatch.undo()
    assert subscriber.apply(message.data) == 2  # the state is found out anew
    assert equal(live, new)


def other_shape(state: State) -> None:
    state["head.weight"] = torch.randn(200, 64)


def other_dtype(state: State) -> None:
    state["embed.weight"] = state["embed.weight"].half()


def lacking(state: State) -> None:
    del state["step"]


def having_more(state: State) -> None:
    state["more"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (other_shape, r'"head.weight" is F32 \[200, 64\] in the message, and F32 \[64, 200\] in the model'),
        (other_dtype, r'"embed.weight" is F16 \[200, 64\] in the message, and BF16 \[200, 64\] in the model'),
        (lacking, 'the message lacks the tensor "step"'),
        (having_more, 'the message has the tensor "more", which the model lacks'),
    ],
)
def test_a_message_for_other_tensors_is_refused(change: Callable[[State], None], line: str) -> None:
    live, other = copied(model()), model()
    change(other)
    publisher = Publisher()
    publisher.publish(model())
    message = publisher.publish(other)
    assert message.kind == "anchor"  # the tensors are not those of the version before
    with pytest.raises(InvalidFileError, match=line):
        Subscriber(live).apply(message.data)
    assert equal(live, model())


def test_hostile_positions_are_refused_before_anything_is_touched() -> None:
    state = {"w": torch.randn(100).bfloat16()}
    parent = states_module.KeptState(deltafmt.sync.live.live_tensors(state), "default", 1).digest()
    word = np.array([1, 1, 1], "<u4").tobytes()
    planes = np.array([1, 0], "<u4").tobytes() + b"\x05"
    for data, line in (
        (word + b"\x64" + planes, "the gaps do not give 1 places among 100 units"),  # behind the tensor
        (np.array([2, 1, 1], "<u4").tobytes() + b"\x01" + planes, "2 places in 1 gaps"),
        (word + b"\x05" + planes, "what it restores is not what was packed"),  # a place, but another value
        (word + b"\x05", "cannot hold the lengths of 2 planes"),
    ):
        live = copied(state)
        with pytest.raises(InvalidFileError, match=rf'^the message: tensors\["w"\]: chunk 0: .*{line}'):
            Subscriber(live).apply(hostile(chunks.Chunk(chunks.SPARSE, data), state, parent))
        assert equal(live, state)
    live = copied(state)
    Subscriber(live).apply(hostile(chunks.Chunk(chunks.SAME, b""), state, parent))
    with pytest.raises(InvalidFileError, match='"w" was made on a tensor that a anchor does not have'):
        Subscriber(live).apply(hostile(chunks.Chunk(chunks.SAME, b""), state, None))


def test_files_that_are_no_messages_are_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "other.deltafmt"
    subscriber = Subscriber(model())
    container = ContainerWriter(buffer := io.BytesIO())
    container.finish([], metadata={"sync.version": "1", "sync.state": "f" * 63})
    for data, line in (
        (b"", "the file is empty"),
        (b"x" * 5000, "not a deltafmt file"),
        (buffer.getvalue(), "metadata: sync.state is 'f+', not a digest"),
    ):
        file.write_bytes(data)
        for source in (file, data):
            with pytest.raises(DeltafmtError, match=line):
                subscriber.apply(source)
    for data in (b"", b"[]", b'{"subscriber": "a"}', b"\xff", b"[" * 60000):
        with pytest.raises(InvalidFileError, match="not a reply of a subscriber"):
            Publisher().receive(data)


def test_what_is_given_in_the_place_of_a_message() -> None:
    message, live = Publisher().publish(model(1)), copied(model())
    other: Any
    for other in (None, 5, np.frombuffer(message.data, np.uint8)):
        reply = Subscriber(live).receive(other)
        assert f"a {type(other).__name__} is no message; give a message, its bytes" in str(reply.error)
        with pytest.raises(InvalidFileError, match="not a reply of a subscriber"):
            Publisher().receive(other)
    assert Subscriber(live).receive(b"").error == "the message: the file is empty"
    assert Subscriber(live).receive(message).error is None  # the message itself is one
    assert equal(live, model(1))


def test_a_state_is_plain_tensors() -> None:
    whole = torch.zeros(10)
    for state, line in (
        ({}, "has no tensors"),
        ({"a": 3}, "tensor 'a' is no tensor but int"),
        ({"a": whole.to_sparse()}, "has no bytes of its own"),
        ({"a": whole[:6], "b": whole[4:]}, 'tensors "a" and "b" share a part of their memory'),
        ({"a": whole[:1].expand(7)}, 'elements of tensor "a" share memory'),
        ({"": whole}, "has a name that no file can hold"),
        ({"\ud800": whole}, "has a name that no file can hold"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "has the dtype torch.complex128, which no file can hold"),
    ):
        with pytest.raises(UsageError, match=line):
            Publisher().publish(state)
        with pytest.raises(UsageError, match=line):
            Subscriber(state)


def test_arguments_out_of_range_are_refused() -> None:
    for options in (
        {"anchor_every": 0},
        {"anchor_every": "5"},
        {"anchor_every": 2.5},
        {"ahead": -1},
        {"ahead": None},
        {"version": -1},
        {"level": "none"},
        {"threads": 0},
        {"version": True},
        {"subscribers": "worker"},
        {"subscribers": b"abc"},
        {"subscribers": None},
        {"subscribers": [3]},
    ):
        with pytest.raises(UsageError):
            Publisher(**options)
    numbered: Any = Publisher(version=np.int64(3), ahead=np.int32(1), subscribers=(name for name in ("a", "b")))
    message = numbered.publish(model())
    assert (type(message.version), message.version, sorted(numbered.behind())) == (int, 4, [])
    name: Any = 3
    with pytest.raises(UsageError, match="a subscriber's name is a text, and 3 is none"):
        Subscriber(model(), name)
    with pytest.raises(UsageError, match="there is no version yet"):
        Publisher().anchor()


def test_parameters_that_have_moved_are_not_followed_in_silence() -> None:
    """The subscriber changed the memory that the model had left, and said that the model was up to date."""
    model, weight = torch.nn.Linear(8, 8, bias=False), torch.randn(8, 8)
    subscriber, publisher = Subscriber(dict(model.named_parameters()), "one"), Publisher()
    subscriber.apply(publisher.publish({"weight": weight}).data)
    model.weight.data = model.weight.data.clone()
    message = publisher.publish({"weight": weight + 1})
    for refused in (lambda: subscriber.apply(message.data), lambda: subscriber.save("nothing")):
        with pytest.raises(UsageError, match=r'tensor "weight" of the model has other memory .* make a new subscriber'):
            refused()
    assert torch.equal(model.weight, weight)
    Subscriber(dict(model.named_parameters()), "one").apply(message.data)
    assert torch.equal(model.weight, weight + 1)


def test_a_tied_parameter_that_has_moved_alone() -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Linear(4, 4, bias=False), "head": torch.nn.Linear(4, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    live = {"embed": model["embed"].weight, "head": torch.nn.Parameter(model["embed"].weight.data)}
    subscriber = Subscriber(live)
    live["head"].data = live["head"].data.clone()
    weight = torch.randn(4, 4)
    with pytest.raises(UsageError, match="has other memory"):
        subscriber.apply(Publisher().publish({"embed": weight, "head": weight}).data)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_state() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    for state, words in (
        (torch.nn.Linear(2, 2), "the state is a Linear; give tensors by name"),
        ({"a": torch.zeros(2), 3: torch.zeros(2)}, "tensor 3 has a name that no file can hold"),
        ({"a": nested}, "tensor 'a' is nested"),
    ):
        with pytest.raises(UsageError, match=words):
            Publisher().publish(state)
