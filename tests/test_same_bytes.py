"""The same input gives the same bytes: threads, implementations, sinks, profiles, any pair."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import deltafmt
from conftest import (
    Pair,
    Raw,
    Tensors,
    normal,
    nudge,
    read_folder,
    run_cli,
    write_pair,
)
from deltafmt.errors import Remedy, UsageError, WrongBaseError
from deltafmt.methods import DeltaDQ
from implementations import IMPLEMENTATIONS, running
from pairs import DTYPES, check_round_trip, pack_pair, pair_of

# The same bytes


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Give a pair of many shapes, large enough for several runs of rows and two sections."""
    a: Tensors = {"big": normal(1, (3000, 500)), "grown": normal(2, (300, 100)), "f32": normal(3, (200, 130), "F32")}
    a["half"] = normal(4, (100, 64), "F16")
    b = {name: nudge(tensor, 10 + i) for i, (name, tensor) in enumerate(a.items())}
    b["grown"] = Raw("BF16", (333, 100), b["grown"].data + normal(5, (33, 100)).data)
    b["new"] = normal(6, (700, 300), "F32")
    for i in range(12):
        a[f"layers.{i}"] = normal(20 + i, (60 + i, 70 - i))
        b[f"layers.{i}"] = nudge(a[f"layers.{i}"], 40 + i, "F32" if i % 3 else None)
    return write_pair(tmp_path_factory.mktemp("varied"), a, b)


METHODS = {
    "default": DeltaDQ(),
    "paper": DeltaDQ(4, 16, 4, share=1, scale="minmax"),
    "two bits": DeltaDQ(2, 16, 2, share=8),
    "fixed": DeltaDQ(3, 12, 5, "fixed", 2, scale_group=24),
    "one bit": DeltaDQ(2, 8, 1, "fixed", 4, scale_dtype="F32"),
    "eight bits": DeltaDQ(8, 32, 8, share=2, rescale=False),
    "rank": DeltaDQ(5, 20, 3, "rank", 1),
}


def _profile(method: DeltaDQ) -> str:
    return "cold" if method.index == "rank" else "hot"


@pytest.mark.parametrize("name", METHODS)
def test_the_bytes_do_not_depend_on_threads_or_implementation(tmp_path: Path, varied: Pair, name: str) -> None:
    method = METHODS[name]
    file = tmp_path / "d.deltafmt"
    pack_pair(varied, file, method=method, profile=_profile(method))
    digests = {hashlib.sha256(file.read_bytes()).hexdigest()}
    for implementation in IMPLEMENTATIONS:
        for threads in (1, 2, 5):
            out = io.BytesIO()
            with running(implementation):
                deltafmt.pack(
                    varied.base, varied.finetuned, out, method=method, profile=_profile(method), threads=threads
                )
            digests.add(hashlib.sha256(out.getvalue()).hexdigest())
    assert len(digests) == 1
    # What each of them unpacks and verifies is what the numpy decoder says.
    for implementation in IMPLEMENTATIONS:
        with running(implementation):
            assert deltafmt.verify(file, varied.base, threads=2).tensors == len(varied.b)
            actions = check_round_trip(varied, file, tmp_path / implementation)
        assert actions["big"] == actions["grown"] == actions["f32"] == "add"


def test_a_process_without_the_core_writes_the_same_bytes(tmp_path: Path, small: Pair) -> None:
    pack_pair(small, tmp_path / "here.deltafmt")
    arguments = ("pack", small.base, small.finetuned, "-o", tmp_path / "there.deltafmt")
    done = run_cli(*arguments, env={"DELTAFMT_CORE": "0", "PYTHONHASHSEED": "7"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "there.deltafmt").read_bytes() == (tmp_path / "here.deltafmt").read_bytes()


def test_a_file_object_takes_the_same_bytes_in_order(tmp_path: Path, small: Pair) -> None:
    class Pipe(io.RawIOBase):
        """A sink that can do nothing but take bytes."""

        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += data
            return len(data)

    pack_pair(small, tmp_path / "d.deltafmt")
    sink = Pipe()
    result = deltafmt.pack(small.base, small.finetuned, sink)  # type: ignore[arg-type]
    assert bytes(sink.data) == (tmp_path / "d.deltafmt").read_bytes()
    assert (result.path, result.size) == (None, len(sink.data))
    with deltafmt.open(io.BytesIO(sink.data)) as stream, deltafmt.open(tmp_path / "d.deltafmt") as mapped:
        assert stream.content_id == mapped.content_id == result.content_id
        for name in mapped:
            for key, array in mapped.buffers(name).items():
                assert np.array_equal(stream.buffers(name)[key], array)


def test_a_file_object_that_takes_only_part_of_a_write_is_not_cut_short(small: Pair) -> None:
    """A raw file may write less than it was given, as a pipe or a socket does."""

    class Slow(io.RawIOBase):
        """A raw sink that takes at most 1000 bytes a call."""

        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            part = bytes(data[:1000])
            self.data += part
            return len(part)

    whole = io.BytesIO()
    deltafmt.pack(small.base, small.finetuned, whole)
    sink = Slow()
    try:
        deltafmt.pack(small.base, small.finetuned, sink)  # type: ignore[arg-type]
    except deltafmt.errors.StorageError:
        return
    assert bytes(sink.data) == whole.getvalue()


def test_the_result_describes_the_file(tmp_path: Path, small: Pair) -> None:
    seen: list[tuple[str, int]] = []
    out = tmp_path / "d.deltafmt"
    result = deltafmt.pack(small.base, small.finetuned, out, progress=lambda name, size: seen.append((name, size)))
    weights = (small.finetuned / "model.safetensors").stat().st_size
    assert (result.size, result.finetuned_bytes) == (out.stat().st_size, weights)
    assert result.ratio == weights / out.stat().st_size
    assert result.actions == {"add": 4, "replace": 1, "same": 2}
    assert dict(seen) == {name: len(tensor.data) for name, tensor in small.b.items()}
    assert len(seen) == len(small.b)


# Repacking


@pytest.mark.parametrize("name", METHODS)
def test_hot_to_cold_to_hot_is_the_same_file(tmp_path: Path, small: Pair, name: str) -> None:
    method = METHODS[name]
    first, cold, hot, colder = (tmp_path / f"{part}.deltafmt" for part in ("first", "cold", "hot", "colder"))
    first = pack_pair(small, first, method=method, profile=_profile(method))
    ids = {deltafmt.open(first).content_id}
    for source, out, profile in ((first, cold, "cold"), (cold, hot, "hot"), (hot, colder, "cold")):
        result = deltafmt.repack(source, out, profile=profile)
        assert (result.size, result.old_size) == (out.stat().st_size, source.stat().st_size)
        ids |= {result.content_id, deltafmt.verify(out, small.base).content_id}
    assert len(ids) == 1
    assert colder.read_bytes() == cold.read_bytes()
    if _profile(method) == "hot":
        assert hot.read_bytes() == first.read_bytes()
    with deltafmt.open(cold) as opened, deltafmt.open(hot) as other:
        entry = opened["model.embed.weight"]
        assert entry.terms[0].layout.index == ("seeded" if method.index == "seeded" else "rank")
        assert other["model.embed.weight"].terms[0].layout.index == ("seeded" if method.index == "seeded" else "fixed")
        for tensor in small.b:
            if opened[tensor].action != "replace":
                assert np.array_equal(opened.delta(tensor), other.delta(tensor))
    check_round_trip(small, cold, tmp_path / "out")


def test_packing_cold_is_repacking_to_cold(tmp_path: Path, small: Pair) -> None:
    cold = pack_pair(small, tmp_path / "cold.deltafmt", profile="cold")
    deltafmt.repack(pack_pair(small, tmp_path / "hot.deltafmt"), tmp_path / "repacked.deltafmt", profile="cold")
    assert cold.read_bytes() == (tmp_path / "repacked.deltafmt").read_bytes()
    assert cold.stat().st_size < (tmp_path / "hot.deltafmt").stat().st_size


def test_an_index_that_has_no_rank_stays_fixed_when_cold(tmp_path: Path, small: Pair) -> None:
    """C(100, 40) has more than 64 bits."""
    hot = pack_pair(small, tmp_path / "hot.deltafmt", method=DeltaDQ(40, 100, 4, "fixed"))
    deltafmt.repack(hot, tmp_path / "cold.deltafmt", profile="cold")
    deltafmt.repack(tmp_path / "cold.deltafmt", tmp_path / "again.deltafmt", profile="hot")
    with deltafmt.open(tmp_path / "cold.deltafmt") as opened:
        assert {layout.index for layout in opened.container.layouts} == {"fixed"}
    assert (tmp_path / "again.deltafmt").read_bytes() == hot.read_bytes()
    with pytest.raises(UsageError, match="rank"):
        DeltaDQ(40, 100, 4, "rank")


def test_a_rank_index_is_refused_in_a_hot_file(tmp_path: Path, small: Pair) -> None:
    with pytest.raises(UsageError, match="a hot file cannot have a rank index") as caught:
        pack_pair(small, tmp_path / "d.deltafmt", method=DeltaDQ(4, 16, 4, "rank"))
    assert caught.value.remedy == Remedy("profile", "cold")


# Anything


def _layouts() -> st.SearchStrategy[DeltaDQ]:
    @st.composite
    def build(draw: st.DrawFn) -> DeltaDQ:
        index = draw(st.sampled_from(("seeded", "fixed", "rank")))
        if index == "seeded":
            m = draw(st.sampled_from((2, 4, 8, 16, 32, 64, 128)))
        else:
            m = draw(st.integers(2, 60 if index == "rank" else 255))
        bits = draw(st.sampled_from((1, 2, 3, 4, 5, 6, 8)))
        n = draw(st.integers(1, m))
        return DeltaDQ(
            n,
            m,
            bits,
            index,
            draw(st.sampled_from((1, 2, 4, 8))),
            draw(st.sampled_from((None, "midrise") if bits == 1 else (None, "midtread", "midrise"))),
            draw(st.sampled_from((None, "minmax", "mse"))),
            draw(st.sampled_from((0, 1, 7, 32))),
            draw(st.sampled_from(("BF16", "F32"))),
            draw(st.booleans()) or n == m,  # where all is kept, there is no rescale to leave out
        )

    return build()


@st.composite
def _sides(draw: st.DrawFn) -> tuple[Tensors, Tensors]:
    """Draw up to five tensors, each with one of the fates that a tensor can have."""
    a: Tensors = {}
    b: Tensors = {}
    for number in range(draw(st.integers(1, 5))):
        name = f"t{number}"
        seed = draw(st.integers(0, 2**20))
        shape = tuple(draw(st.lists(st.integers(0, 37), max_size=3)))
        before, after = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
        fate = draw(st.sampled_from(("tuned", "tuned", "tuned", "same", "new", "gone", "grown", "reshaped", "tied")))
        old = normal(seed, shape, before)
        if fate != "new":
            a[name] = old
        if fate == "tuned":
            b[name] = nudge(old, seed + 1, after, draw(st.sampled_from((1e-6, 0.02, 50))))
        elif fate in ("same", "new"):
            b[name] = old
        elif fate == "grown" and shape:
            b[name] = normal(seed + 2, (draw(st.integers(0, 60)), *shape[1:]), after)
        elif fate in ("grown", "reshaped"):
            b[name] = normal(seed + 3, (*shape, 3)[-3:], after)
        elif fate == "tied" and "t0" in b:
            a[name], b[name] = a.get("t0", old), b["t0"]
    return a, b


@given(_sides(), _layouts(), st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_pair_survives_the_round_trip(sides: tuple[Tensors, Tensors], method: DeltaDQ, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = pair_of(folder, *sides)
        profile = _profile(method)
        delta = folder / "d.deltafmt"
        # Tensors that look like those of a broken save are asked for.
        odd = [n for n, t in pair.b.items() if not t.data or (n in pair.a and len(t.shape) == 1 < len(pair.a[n].shape))]
        options = {"method": method, "seed": seed, "profile": profile, "exclude": odd, "missing": "removed"}
        try:
            result = deltafmt.pack(pair.base, pair.finetuned, delta, **options)
        except WrongBaseError:
            # Where most of the fine-tune has no counterpart, refusing is right, and tested elsewhere.
            reject()
        again = io.BytesIO()
        deltafmt.pack(pair.base, pair.finetuned, again, **options, threads=3)
        assert delta.read_bytes() == again.getvalue()
        checked = deltafmt.verify(delta, pair.base)
        assert (checked.tensors, checked.content_id) == (len(pair.b), result.content_id)
        actions = check_round_trip(pair, delta, folder / "out")
        for tensor, action in actions.items():
            if tensor not in pair.a:
                assert action in ("replace", "alias")
            elif pair.a[tensor] == pair.b[tensor]:
                assert action in ("same", "alias")
            elif len(pair.b[tensor].shape) < 2:
                assert action == "replace"
        steps = ("hot", "cold", "hot") if profile == "cold" else ("cold", "hot")
        written = [delta]
        for number, step in enumerate(steps):
            written.append(folder / f"{number}.deltafmt")
            assert deltafmt.repack(written[-2], written[-1], profile=step).content_id == result.content_id
        assert written[-1].read_bytes() == written[-3].read_bytes()


def test_the_nano_pair_round_trips(tmp_path: Path, nano: Path) -> None:
    delta = tmp_path / "nano.deltafmt"
    result = deltafmt.pack(nano / "base", nano / "math", delta)
    assert result.actions["add"] > 10
    pair = Pair(nano / "base", nano / "math", read_folder(nano / "base"), read_folder(nano / "math"))
    check_round_trip(pair, delta, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((nano / "math" / "config.json").read_text())
    true, kept = 0.0, 0.0
    with deltafmt.open(delta) as opened:
        for name, tensor in pair.b.items():
            if opened[name].action == "add":
                step = tensor.floats() - pair.a[name].floats()
                true += float(np.sum(step**2))
                kept += float(np.sum(step * opened.delta(name).reshape(step.shape)))
    assert kept / true == pytest.approx(1, abs=0.05)  # dropout with rescale is unbiased


def test_real_models_round_trip(tmp_path: Path, models: Path) -> None:
    base, finetuned = models / "wordmath" / "base", models / "wordmath" / "math"
    delta = tmp_path / "d.deltafmt"
    deltafmt.pack(base, finetuned, delta)
    assert deltafmt.verify(delta, base).base_tensors
    check_round_trip(Pair(base, finetuned, read_folder(base), read_folder(finetuned)), delta, tmp_path / "out")
