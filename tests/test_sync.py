"""Weight sync: states follow bit for bit; what cannot be applied changes nothing, and the sender hears of it."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt.container.writer import ContainerWriter
from deltafmt.errors import BehindError, DeltafmtError, InvalidFileError, StorageError, UsageError, WrongBaseError
from deltafmt.exact import chunk as chunks
from deltafmt.exact.coding import EncodedChunk, ExactDecoder, assemble, encode_chunk
from deltafmt.format.constants import FEATURE_EXACT
from deltafmt.pipeline.entry_writer import EntryWriter
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.sync import Folder, Message, Publisher, Reply, Subscriber, on_device, read_message, write_message
from deltafmt.sync import states as states_module
from deltafmt.sync.message import open_message
from deltafmt.sync.staged import HostChange
from test_exact import drawn_units

State = dict[str, torch.Tensor]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(bits(one[name]) == bits(other[name]) for name in one)


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def model(seed: int = 0) -> State:
    """Return a small state: two matrices, a norm, a scalar, an empty tensor."""
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(200, 64).bfloat16(),
        "empty": torch.empty(0, 3),
        "head.weight": torch.randn(64, 200),
        "norm.weight": torch.ones(24).bfloat16(),
        "step": torch.tensor(7),
    }


def stepped(state: State, seed: int, share: float = 0.1) -> State:
    """Return a state of which some elements have moved."""
    torch.manual_seed(seed)
    new = copied(state)
    for tensor in new.values():
        if tensor.is_floating_point() and tensor.numel():
            tensor.add_((torch.rand(tensor.shape) < share).to(tensor.dtype) * tensor * 0.01)
    return new


def followed(states: list[State], live: State, **options: object) -> list[Message]:
    """Publish states to one subscriber with live tensors, which must then be equal to them."""
    publisher, subscriber = Publisher(**options), Subscriber(live, "one")
    messages = []
    for state in states:
        messages.append(publisher.publish(state))
        reply = subscriber.receive(messages[-1].data)
        assert reply.error is None
        assert publisher.receive(reply) is None
        assert equal(live, state)
    return messages


def test_a_subscriber_has_every_bit_of_every_version() -> None:
    states = [model()]
    for seed in range(1, 6):
        states.append(stepped(states[-1], seed))
    states.append(copied(states[-1]))  # nothing has changed
    live = {name: torch.zeros_like(tensor) for name, tensor in model().items()}
    messages = followed(states, live, anchor_every=4)
    assert [message.kind for message in messages] == ["anchor", *["patch"] * 3, "anchor", "patch", "patch"]
    assert [message.version for message in messages] == [1, 2, 3, 4, 5, 6, 7]
    assert messages[5].state == messages[6].state


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_bits_of_any_dtype_follow(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    names = data.draw(st.lists(st.sampled_from(sorted(TORCH_DTYPES)), min_size=1, max_size=4, unique=True))
    shapes = [tuple(data.draw(st.lists(st.integers(0, 9), max_size=4))) for _ in names]

    def drawn() -> State:
        made = {}
        for name, shape in zip(names, shapes, strict=True):
            dtype = TORCH_DTYPES[name]
            size = int(np.prod(shape)) * dtype.itemsize
            raw = torch.from_numpy(rng.integers(0, 2 if name == "BOOL" else 256, size, np.uint8))
            made[name] = raw.view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
        return made

    first = drawn()
    second = {name: tensor.clone() for name, tensor in first.items()}
    for tensor in second.values():
        if tensor.numel() and data.draw(st.booleans()):
            tensor.reshape(-1)[:1].view(torch.uint8)[0] ^= 1
    followed([first, second, drawn()], drawn(), threads=data.draw(st.sampled_from((1, 3))))


def test_stacks_of_experts_follow_into_any_layout() -> None:
    """Grouped experts were given NaN by a patch whose checksum had passed (slime 2209)."""
    torch.manual_seed(0)
    names = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")
    states = [{name: torch.randn(4, 16, 32).bfloat16() for name in names}]
    states += [stepped(states[0], 1), stepped(states[0], 2)]
    # The model keeps its experts transposed, and those of the other stack as slices of a larger tensor.
    live = {
        names[0]: torch.zeros(4, 32, 16, dtype=torch.bfloat16).transpose(1, 2),
        names[1]: torch.zeros(6, 16, 32, dtype=torch.bfloat16)[1:5],
    }
    followed(states, live)
    assert not live[names[0]].isnan().any()


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


def test_8_bit_floats_follow_with_their_scales_ue8m0() -> None:
    torch.manual_seed(0)
    scale = torch.tensor([[118, 120], [119, 255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    state = {"w.weight": torch.randn(64, 64).to(torch.float8_e4m3fn), "w.weight_scale_inv": scale}
    new = copied(state)
    new["w.weight"].view(torch.uint8)[3, 5] ^= 1
    new["w.weight_scale_inv"].view(torch.uint8)[0, 1] += 1
    live = {name: torch.zeros_like(tensor.view(torch.uint8)).view(tensor.dtype) for name, tensor in state.items()}
    messages = followed([state, new], live)
    with open_message(messages[1].data)[0] as delta:
        assert {entry.dtype for entry in delta.container.entries()} == {"F8_E4M3", "F8_E8M0"}


@pytest.mark.parametrize("here", ["tied", "apart"])
def test_tied_weights_follow(here: str) -> None:
    weight = torch.randn(20, 8).bfloat16()
    publisher = Publisher()
    live: State = {"embed": torch.zeros(20, 8, dtype=torch.bfloat16)}
    live["head"] = live["embed"] if here == "tied" else torch.zeros(20, 8, dtype=torch.bfloat16)
    subscriber = Subscriber(live)
    for seed in range(3):
        weight = stepped({"w": weight}, seed)["w"]
        message = publisher.publish({"embed": weight, "head": weight})
        with open_message(message.data)[0] as delta:
            assert delta["head"].action == "alias"
        assert publisher.receive(subscriber.receive(message.data)) is None
        assert bits(live["embed"]) == bits(live["head"]) == bits(weight)


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


def test_parameters_of_a_module_change_in_place() -> None:
    source, target = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
    pointer, publisher = target.weight.data_ptr(), Publisher()
    subscriber = Subscriber(dict(target.named_parameters()))
    for _ in range(3):
        with torch.no_grad():
            source.weight += 0.1
        publisher.receive(subscriber.receive(publisher.publish(source.state_dict()).data))
        assert equal(source.state_dict(), target.state_dict())
    assert target.weight.data_ptr() == pointer
    assert target.weight.requires_grad


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


def hostile(chunk: chunks.Chunk, state: State, parent: str | None) -> bytes:
    """Return a message whose seal and checksums are right, with a chunk of the caller's."""
    kept = states_module.KeptState(deltafmt.sync.live.live_tensors(state), "default", 1)
    file = io.BytesIO()
    container = ContainerWriter(file, features=FEATURE_EXACT)
    (tensor,) = kept.tensors.values()
    right = encode_chunk(tensor.units, tensor.units, states_module.unit_of(tensor.spec.dtype)).row
    row = right[:8] + len(chunk.data).to_bytes(4, "little") + chunk.form.to_bytes(4, "little")
    base = states_module.BaseRef(tensor.fingerprint, tensor.spec.dtype, tensor.spec.shape)
    pieces = assemble([EncodedChunk(chunk.data, row)])
    entry = EntryWriter(container).exact(tensor.spec, base, 1 << 20, pieces, tensor.fingerprint)
    container.finish([entry], metadata=Message(1, kept.digest(), parent, b"").metadata)
    return file.getvalue()


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


def test_a_state_is_plain_tensors() -> None:
    whole = torch.zeros(10)
    for state, line in (
        ({}, "has no tensors"),
        ({"a": 3}, "tensor 'a' is no tensor but int"),
        ({"a": whole.to_sparse()}, "has no bytes of its own"),
        ({"a": whole[:6], "b": whole[4:]}, 'tensors "a" and "b" share a part of their memory'),
        ({"a": whole[:1].expand(7)}, 'elements of tensor "a" share memory'),
        ({"": whole}, "has a name that no file can hold"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "has the dtype torch.complex128, which no file can hold"),
    ):
        with pytest.raises(UsageError, match=line):
            Publisher().publish(state)
        with pytest.raises(UsageError, match=line):
            Subscriber(state)


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


def test_a_state_that_changes_meanwhile_is_sent_as_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    state, publisher, live = model(), Publisher(), copied(model())
    subscriber = Subscriber(live, "one")
    publisher.receive(subscriber.receive(publisher.publish(state).data))
    encode = states_module.encode_chunk

    def changing(*args: object) -> EncodedChunk:
        state["head.weight"] += 1  # another thread goes on training
        return encode(*args)

    monkeypatch.setattr(states_module, "encode_chunk", changing)
    message = publisher.publish(state)
    monkeypatch.undo()
    assert subscriber.receive(message.data).error is None
    anchor = publisher.anchor()
    assert anchor.state == message.state
    again = {name: torch.zeros_like(tensor) for name, tensor in live.items()}
    Subscriber(again).apply(anchor.data)
    assert equal(again, live)
    publisher.receive(subscriber.reply())
    assert publisher.receive(subscriber.receive(publisher.publish(state).data)) is None
    assert equal(live, state)


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


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_folder_leads_everybody_to_the_newest_version(place: str, tmp_path: Path) -> None:
    if place == "memory":
        pytest.importorskip("fsspec")
    folder = Folder(tmp_path / "run" if place == "local" else f"memory://{tmp_path.name}/run")
    publisher, states, lives = Publisher(anchor_every=3, ahead=20), [model()], [copied(model()) for _ in range(3)]
    early, late, lost = (Subscriber(live, f"s{number}") for number, live in enumerate(lives))
    for seed in range(1, 9):
        states.append(stepped(states[-1], seed))
        folder.send(publisher.publish(states[-1]))
        folder.follow(early)
        if seed < 3:
            folder.follow(lost)
        assert folder.collect(publisher) == {}
    assert equal(lives[0], states[-1])
    folder.prune()
    assert folder.versions() == [(4, "anchor"), (5, "patch"), (6, "patch"), (7, "anchor"), (8, "patch")]
    assert [reply.version for reply in folder.follow(late)] == [7, 8]  # the newest anchor, and what comes behind it
    assert [reply.version for reply in folder.follow(lost)] == [7, 8]  # 3 is gone
    assert folder.follow(lost) == []
    assert all(equal(live, states[-1]) for live in lives)
    assert folder.collect(publisher) == {}


def test_a_folder_answers_a_subscriber_that_cannot_follow(tmp_path: Path) -> None:
    folder, live = Folder(tmp_path), copied(model())
    publisher, subscriber = Publisher(), Subscriber(live, "one")
    folder.send(publisher.publish(model()))
    folder.follow(subscriber)
    assert folder.collect(publisher) == {}
    new = stepped(model(), 1)
    folder.send(publisher.publish(new))
    patch = tmp_path / "000000000002.patch.deltafmt"
    patch.write_bytes(patch.read_bytes()[:-1])
    (reply,) = folder.follow(subscriber)
    assert "the file ends too early" in str(reply.error) or reply.error
    assert equal(live, model())
    assert list(folder.collect(publisher)) == ["one"]
    with pytest.raises(BehindError, match="cannot follow"):
        publisher.publish(new)
    assert [reply.error is None for reply in folder.follow(subscriber)] == [False, True]
    assert folder.collect(publisher) == {}
    assert equal(live, new)
    with pytest.raises(UsageError, match="a name in a folder"):
        folder.follow(Subscriber(live, "../x"))


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


def test_arguments_out_of_range_are_refused() -> None:
    for options in ({"anchor_every": 0}, {"ahead": -1}, {"version": -1}, {"level": "none"}, {"threads": 0}):
        with pytest.raises(UsageError):
            Publisher(**options)
    with pytest.raises(UsageError, match="there is no version yet"):
        Publisher().anchor()


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_a_device_decodes_what_the_host_decodes(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in sorted(TORCH_DTYPES) if name != "BOOL"]))
    unit = states_module.unit_of(name)
    if unit.width == 8:
        return
    values, prediction = drawn_units(data, unit, 1500)
    if (TORCH_DTYPES[name].itemsize * values.size) % unit.width or name == "C64":
        return
    level = data.draw(st.sampled_from(chunks.LEVELS))
    shape, size = (values.size,), 512
    spans = [(at, at + size) for at in range(0, values.size, size)]
    made = [encode_chunk(values[a:b], prediction[a:b], unit, level) for a, b in spans]
    decoder = ExactDecoder(memoryview(b"".join(assemble(made))), name, shape, size)
    tensor = torch.from_numpy(prediction.view(np.uint8).copy()).view(TORCH_DTYPES[name])
    (live,) = deltafmt.sync.live.live_tensors({"w": tensor}).values()
    change = on_device.change_of(decoder, live, has_base=True)
    assert (change is None) == np.array_equal(values, prediction)
    assert bits(tensor) == prediction.tobytes()  # nothing was touched
    if change is not None:
        change.make()
        assert bits(tensor) == values.tobytes()
        change.undo()
        assert bits(tensor) == prediction.tobytes()
        tensor.view(torch.uint8)[0] ^= 1
        if decoder.stored(0)[1] in (chunks.STORED, chunks.VALUES):
            return  # such a chunk needs no prediction
        with pytest.raises(InvalidFileError, match="what it restores is not what was packed"):
            on_device.change_of(decoder, live, has_base=True)


def test_the_device_path_follows_as_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "runs_on", lambda live: live.unit.width < 8)
    states = [model(), stepped(model(), 1), stepped(model(), 2, 0.9), stepped(model(), 3, 0)]
    live = {name: torch.zeros_like(tensor) for name, tensor in model().items()}
    live["head.weight"] = torch.zeros(200, 64).t()
    followed(states, live)
    for chunk, line in (
        (chunks.Chunk(chunks.SAME, b"x"), "1 bytes where 0 are needed"),
        (chunks.Chunk(chunks.STORED, b"x"), "1 bytes where 200 are needed"),
    ):
        state = {"w": torch.randn(100).bfloat16()}
        parent = states_module.KeptState(deltafmt.sync.live.live_tensors(state), "default", 1).digest()
        with pytest.raises(InvalidFileError, match=rf'tensors\["w"\]: chunk 0: {line}'):
            Subscriber(state).apply(hostile(chunk, state, parent))


def test_patches_are_a_chain_that_other_commands_apply(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    states = [model(), stepped(model(), 1), stepped(model(), 2)]
    (tmp_path / "base").mkdir()
    safetensors.save_file(states[0], tmp_path / "base" / "model.safetensors")
    publisher, files = Publisher(base=states[0]), []
    for state in states[1:]:
        message = publisher.publish(state)
        files.append(tmp_path / f"{message.version}.deltafmt")
        files[-1].write_bytes(message.data)
        assert message.content_id == deltafmt.verify(files[-1]).content_id
    deltafmt.apply(tmp_path / "base", files, tmp_path / "applied")
    deltafmt.squash(files, tmp_path / "both.deltafmt", base=tmp_path / "base")
    deltafmt.unpack(tmp_path / "base", tmp_path / "both.deltafmt", tmp_path / "unpacked")
    for folder in ("applied", "unpacked"):
        assert equal(safetensors.load_file(tmp_path / folder / "model.safetensors"), states[2])
    with pytest.raises(WrongBaseError, match=r"a link is missing|was made on what"):
        deltafmt.apply(tmp_path / "base", files[1:], tmp_path / "wrong")
