"""One writer of entries: whoever writes a tensor, its entry is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import deltafmt
from conftest import Pair, Raw, normal, nudge
from deltafmt.checkpoint.folder import Checkpoint
from deltafmt.container.writer import ContainerWriter
from deltafmt.index.entries import BaseRef, TensorEntry
from deltafmt.methods import RTN, BitDelta, DeltaDQ, Method, Residual
from deltafmt.pipeline import sizes
from deltafmt.pipeline.digests import payload_digest
from deltafmt.pipeline.entry_writer import EntryWriter, packed_bytes
from deltafmt.pipeline.plan import make_plan
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import term_codec
from pairs import pair_of

METHODS: tuple[Method, ...] = (DeltaDQ(), DeltaDQ(3, 12, 5, "fixed", 2), RTN(3), BitDelta(), Residual(rank=2))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Give a pair with a tensor of every action, and one that has grown."""
    a = {f"layers.{i}": normal(i, (60 + 7 * i, 100)) for i in range(3)}
    b = {name: nudge(tensor, 10 + i) for i, (name, tensor) in enumerate(a.items())}
    b["layers.1"] = Raw("BF16", (80, 100), b["layers.1"].data + normal(5, (13, 100)).data)
    a["same"] = b["same"] = normal(6, (30, 40))
    b["tied"] = b["layers.0"]
    b["vector"] = normal(7, (50,))
    return pair_of(tmp_path_factory.mktemp("pair"), a, b)


class Nowhere:
    """A sink that keeps nothing."""

    def write(self, data: object) -> None:
        """Forget bytes."""


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.describe())
def test_sizes_writes_the_entries_that_pack_writes(tmp_path: Path, pair: Pair, method: Method) -> None:
    deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d", method=method, seed=3)
    container = ContainerWriter(Nowhere())
    with (
        Checkpoint(pair.base) as base,
        Checkpoint(pair.finetuned) as finetuned,
        deltafmt.open(tmp_path / "d") as opened,
    ):
        actions = set()
        for plan in make_plan(base, finetuned, method):
            entry = opened[plan.tensor.name]
            written = sizes._entry(EntryWriter(container), plan, 3, same=entry.action == "same")
            digest = None if entry.digest is None else sizes._DIGEST
            reference = None if entry.base is None else replace(entry.base, digest=sizes._DIGEST)
            assert written == replace(entry, digest=digest, base=reference)
            actions.add(entry.action)
    assert actions == {"add", "alias", "replace", "same"}


@pytest.mark.parametrize("profile", ["hot", "cold"])
def test_a_digest_is_that_of_the_digested_form(tmp_path: Path, pair: Pair, profile: str) -> None:
    method = DeltaDQ(4, 16, 4, "rank" if profile == "cold" else "fixed")
    deltafmt.pack(pair.base, pair.finetuned, tmp_path / "d", method=method, profile=profile)
    deltafmt.pack(pair.base, pair.finetuned, tmp_path / "fixed", method=replace(method, index="fixed"))
    with deltafmt.open(tmp_path / "d") as opened, deltafmt.open(tmp_path / "fixed") as fixed:
        for name in opened:
            assert opened[name].digest == fixed[name].digest
            if opened[name].digest is not None:
                assert payload_digest(opened, opened[name]) == opened[name].digest


def test_a_digest_that_is_known_is_not_computed() -> None:
    layout = RTN(3).layouts(40, 64)[0]
    codec = term_codec(layout, 40, 64)
    term = packed_bytes(codec, blank(layout, 40, 64))
    header = TensorEntry("w", "replace", "BF16", (43, 64))
    base = BaseRef(bytes(32), "BF16", (40, 64))
    found: list[TensorEntry] = []
    for digest in (None, bytes(range(32))):
        writer = EntryWriter(ContainerWriter(Nowhere()))
        new_rows = [np.ones(128, np.uint8).data] * 3
        found.append(writer.add(header, base, [term, term], new_rows, digest))
        found.append(writer.replace(header, b"\1" * 43 * 128, digest))
    assert [entry.digest for entry in found[2:]] == [bytes(range(32))] * 2
    assert found[0].digest != found[1].digest
    assert [replace(entry, digest=None) for entry in found[:2]] == [replace(entry, digest=None) for entry in found[2:]]
    assert [name for name, _ in found[0].refs()][-1] == "new_rows"
