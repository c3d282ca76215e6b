"""A moment of the harnesses of ``fuzz/fuzz_inputs.py``, without atheris: seeds, and some hundred mutations of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import inputs
import mutate
import numpy as np
import pytest
from budget import bounded_time


@pytest.fixture(autouse=True)
def cleaned() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield
    inputs.folder.remove()


@pytest.mark.parametrize("name", inputs.TARGETS)
def test_whatever_is_read_ends_in_an_error_of_deltafmt(name: str) -> None:
    target = inputs.TARGETS[name]
    seeds = target.seeds()
    with bounded_time(60):
        for data in seeds:
            target.read(data)
        for seed in range(150):
            rng = random.Random(seed)
            data = rng.choice(seeds)
            for _ in range(rng.choice((1, 1, 2, 3))):
                data = target.mutate(data, rng, lambda held, largest, rng=rng: mutate.mutate_bytes(held, largest, rng))
            target.read(data)


def test_a_file_name_that_no_file_can_have_is_refused() -> None:
    for name in ("x" * 300, "é" * 200, "../w.safetensors", "a\0b", "\ud800"):
        inputs.read_weight_map(json.dumps({"weight_map": {"w": name}}).encode())


def test_a_folder_that_reads_more_than_it_should_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks themselves: of a file that is read outside, and of an adapter that is refused and leaves a file."""
    seeds = inputs.weight_map_seeds()
    monkeypatch.setattr(inputs.Checkpoint, "identity", lambda _: [("/etc/passwd", 0, 0)])
    with pytest.raises(AssertionError, match="/etc/passwd was read"):
        inputs.read_weight_map(seeds[0])

    def refuse(base: object, adapter: object, out: object, **_: object) -> None:
        out.write_bytes(b"half")
        raise inputs.InvalidFileError("refused")

    monkeypatch.setattr(inputs.deltafmt, "import_lora", refuse)
    with pytest.raises(AssertionError, match="left a file"):
        inputs.read_adapter(inputs.adapter_seeds()[0])


def test_time_is_counted() -> None:
    with pytest.raises(AssertionError, match="of the processor"), bounded_time(0.0):
        sum(range(100_000))
