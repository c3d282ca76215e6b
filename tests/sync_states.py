"""States of a small model, what changes them, and messages of wrong content."""

from __future__ import annotations

import io
from collections.abc import Mapping

import pytest

torch = pytest.importorskip("torch")


import deltafmt
from deltafmt.container.writer import ContainerWriter
from deltafmt.exact import chunk as chunks
from deltafmt.exact.coding import EncodedChunk, assemble, encode_chunk
from deltafmt.format.constants import FEATURE_EXACT
from deltafmt.pipeline.entry_writer import EntryWriter
from deltafmt.sync import Message, Publisher, Subscriber
from deltafmt.sync import states as states_module

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
