"""Bytes and speed of weight sync on real AdamW steps, beside other formats' encodings of the same steps.

    python benchmarks/sync.py MODELS [--lr 1.5e-6] [--steps 8] [--copies 8]

``MODELS`` holds ``wordmath/``, a Llama of 14.6 million parameters. It is trained on its word problems, in float32 by
AdamW, and each step is published in bfloat16. The other encodings are made here as their projects describe them, and
have what they need to be applied, without names and checksums. For the speeds, every tensor is repeated so many times,
because those of larger models are larger. GB are 10**9 bytes of parameters. A changed element is one whose bfloat16
bits have changed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import zstandard
from common import WORKER_THREADS, Figure, report
from numpy.typing import NDArray

from deltafmt.sync import Publisher, Subscriber

State = dict[str, torch.Tensor]
Bits = NDArray[np.uint16]


def steps(models: Path, rate: float, count: int) -> Iterator[State]:
    """Give the parameters in bfloat16: before the training, and after each step of AdamW."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    root = models / "wordmath"
    tokenizer = Tokenizer.from_file(str(root / "tokenizer.json"))
    problems = [json.loads(line) for line in (root / "eval.jsonl").read_text("utf-8").splitlines()]
    model = AutoModelForCausalLM.from_pretrained(root / "math", dtype=torch.float32, trust_remote_code=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(count + 1):
        yield {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
        if step == count:
            return
        chosen = [problems[i] for i in torch.randint(len(problems), (8,), generator=generator).tolist()]
        texts = [[0, *tokenizer.encode(one["question"] + one["answer"]).ids, 1] for one in chosen]
        width = max(map(len, texts))
        ids = torch.tensor([text + [2] * (width - len(text)) for text in texts])
        loss = model(input_ids=ids, labels=ids.masked_fill(ids == 2, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def bits(tensor: torch.Tensor) -> Bits:
    """Return the bits of a bfloat16 tensor."""
    return tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)


def packed(data: bytes) -> int:
    """Return the bytes that zstd makes of data at level 1."""
    return len(zstandard.ZstdCompressor(level=1).compress(data))


def gaps_of(places: NDArray[np.int64], dtype: type[np.unsignedinteger]) -> bytes:
    """Return gaps between places; a gap that a field cannot hold is bridged by fields of the highest value."""
    top = np.iinfo(dtype).max
    gaps = np.diff(places, prepend=-1) - 1
    ends = np.cumsum(gaps // top + 1)
    fields = np.full(int(ends[-1]) if ends.size else 0, top, dtype)
    fields[ends - 1] = gaps % top
    return fields.tobytes()


def trl(before: Bits, after: Bits) -> int:
    """TRL: the flat index of each changed element as int32, and its value."""
    return 6 * int(np.count_nonzero(before != after))


def slime(before: Bits, after: Bits) -> int:
    """slime, sparse: gaps as u16, and values."""
    places = np.flatnonzero(before != after)
    return len(gaps_of(places, np.uint16)) + 2 * places.size


def slime_zstd(before: Bits, after: Bits) -> int:
    """The same, compressed."""
    places = np.flatnonzero(before != after)
    return packed(gaps_of(places, np.uint16) + after[places].tobytes()) if places.size else 0


def pulse(before: Bits, after: Bits) -> int:
    """PULSE-like: gaps as u8, values verbatim, each compressed."""
    places = np.flatnonzero(before != after)
    return packed(gaps_of(places, np.uint8)) + packed(after[places].tobytes()) if places.size else 0


def xor(before: Bits, after: Bits) -> int:
    """XOR with the version before, the whole tensor, compressed: checkpoint-shaped version folders."""
    return packed((before ^ after).tobytes())


PEERS: dict[str, Callable[[Bits, Bits], int]] = {
    "TRL: int32 index, bf16 value": trl,
    "slime: u16 gaps, bf16 value": slime,
    "slime: the same, zstd -1": slime_zstd,
    "PULSE-like: u8 gaps, bf16 values, zstd -1": pulse,
    "XOR with the version before, zstd -1": xor,
}


def sizes(states: list[State]) -> list[Figure]:
    """Return bytes a changed element: of all messages and of all peers' encodings, over all steps."""
    publisher = Publisher(base=states[0], anchor_every=None)
    sent, peers, changed, total = 0, dict.fromkeys(PEERS, 0), 0, 0
    live = {name: tensor.clone() for name, tensor in states[0].items()}
    subscriber = Subscriber(live)
    for before, after in itertools.pairwise(states):
        message = publisher.publish(after)
        assert message.kind == "patch"
        sent += len(message.data)
        publisher.receive(subscriber.receive(message.data))
        for name, tensor in after.items():
            assert torch.equal(live[name].view(torch.int16), tensor.view(torch.int16))
            old, new = bits(before[name]), bits(tensor)
            changed += int(np.count_nonzero(old != new))
            total += new.size
            for peer, encoded in PEERS.items():
                peers[peer] += encoded(old, new)
    return [
        Figure("elements changed", 100 * changed / total, "%"),
        Figure("deltafmt, the whole message", sent / changed, "bytes", 1.2, at_most=True),
        *(Figure(peer, size / changed, "bytes") for peer, size in peers.items()),
    ]


def speeds(states: list[State], copies: int, threads: int) -> list[Figure]:
    """Return the speeds of making patches and of applying them."""
    # Tensors of the size that larger models have.
    many = [{name: torch.cat([tensor] * copies) for name, tensor in state.items()} for state in states]
    size = sum(tensor.nbytes for tensor in many[0].values())
    publisher = Publisher(base=many[0], anchor_every=None, threads=threads)
    subscriber = Subscriber({name: tensor.clone() for name, tensor in many[0].items()}, threads=threads)
    made, applied, made_cpu, applied_cpu = [], [], [], []
    for state in many[1:]:
        clocks = [(time.perf_counter(), time.process_time())]
        message = publisher.publish(state)
        clocks.append((time.perf_counter(), time.process_time()))
        reply = subscriber.receive(message.data)
        clocks.append((time.perf_counter(), time.process_time()))
        assert publisher.receive(reply) is None
        made.append(clocks[1][0] - clocks[0][0])
        applied.append(clocks[2][0] - clocks[1][0])
        made_cpu.append(clocks[1][1] - clocks[0][1])
        applied_cpu.append(clocks[2][1] - clocks[1][1])
    target, gb = {True: (1, 2), False: (None, None)}[threads > 1], size / 1e9
    return [
        Figure(f"made, {threads} threads", gb / min(made), "GB/s", target[0]),
        Figure(f"applied, {threads} threads", gb / min(applied), "GB/s", target[1]),
        Figure(f"made, {threads} threads, a CPU second", gb / statistics.median(made_cpu), "GB"),
        Figure(f"applied, {threads} threads, a CPU second", gb / statistics.median(applied_cpu), "GB"),
    ]


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="the folder that holds wordmath/")
    parser.add_argument("--lr", type=float, default=1.5e-6, help="the learning rate, which decides how much changes")
    parser.add_argument("--warm", type=int, default=3, help="steps before the first that is measured")
    parser.add_argument("--steps", type=int, default=6, help="steps that are measured")
    parser.add_argument("--copies", type=int, default=8, help="copies of the parameters for the speeds")
    options = parser.parse_args()
    states = list(steps(options.models, options.lr, options.warm + options.steps))[options.warm :]
    figures = sizes(states)
    figures += speeds(states, options.copies, WORKER_THREADS)
    report("sync", figures, threads=WORKER_THREADS, measured=time.strftime("%Y-%m-%d"), lr=options.lr)


if __name__ == "__main__":
    main()
