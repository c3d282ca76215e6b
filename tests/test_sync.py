"""Weight sync: a subscriber has every bit of the state that is published, whatever its dtypes and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

import deltafmt
from deltafmt.errors import InvalidFileError, WrongBaseError
from deltafmt.exact import chunk as chunks
from deltafmt.exact.coding import EncodedChunk, ExactDecoder, assemble, encode_chunk
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.sync import Publisher, Subscriber, on_device
from deltafmt.sync import states as states_module
from deltafmt.sync.message import open_message
from sync_states import State, bits, copied, equal, followed, hostile, model, stepped
from test_exact import drawn_units


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


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy whose elements lie one byte behind multiples of their size."""
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    there = torch.frombuffer(memory, dtype=tensor.dtype, offset=1).reshape(tensor.shape)
    assert there.data_ptr() % tensor.element_size()
    return there.copy_(tensor)


@pytest.mark.parametrize("level", ["default", "fast"])
@pytest.mark.parametrize("share", [0.002, 0.6])
def test_tensors_at_odd_addresses_follow_and_are_followed(level: str, share: float) -> None:
    """Compiled loops refused them behind the subscriber's back: it sent no reply."""
    names = ("embed.weight", "head.weight", "norm.weight")
    start = {name: model()[name] for name in names}
    new = stepped(start, 1, share)
    live = {name: unaligned(tensor) for name, tensor in start.items()}
    plain, odd = Publisher(base=start, level=level), Publisher(base=live, level=level)
    message = plain.publish(new)
    assert odd.publish({name: unaligned(tensor) for name, tensor in new.items()}).data == message.data
    subscriber = Subscriber(live, "one")
    assert subscriber.receive(message.data).error is None
    assert equal(live, new)
    other = Subscriber({name: unaligned(tensor) for name, tensor in start.items()}, "two")
    assert other.apply(odd.anchor().data) == 1


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


def test_a_state_that_changes_meanwhile_is_sent_as_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    state, publisher, live = model(), Publisher(), copied(model())
    subscriber = Subscriber(live, "one")
    publisher.receive(subscriber.receive(publisher.publish(state).data))
    encode = states_module.encode_chunk

    def changing(*args: Any, **given: Any) -> EncodedChunk:
        state["head.weight"] += 1  # another thread goes on training
        return encode(*args, **given)

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
