"""What is attached is what is verified: a delta whose bytes are whole and mean nothing is not served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import deltafmt
from containers import edited
from deltafmt.errors import InvalidFileError
from deltafmt.index.entries import TensorEntry
from deltafmt.kernels.operand import BUFFER_DTYPES, Operand, buffer_forms
from deltafmt.methods import SVD, DeltaDQ, Magnitude
from deltafmt.runtime import checks
from deltafmt.runtime.checks import check_terms
from deltafmt.runtime.delta_holds import Attached
from deltafmt.runtime.delta_store import read_attached
from deltafmt.runtime.device_delta import DeviceTensor
from deltafmt.terms import words
from deltafmt.terms.buffers import blank, views
from deltafmt.terms.codec import TermCodec
from deltafmt.terms.codecs import fitted, term_codec
from deltafmt.transformers import attach
from strategies import examples, fitting, generators, layouts, shapes
from term_kinds import CASES
from tiny_models import Tiny, close, ids, logits, made_once

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own

Packed = dict[str, NDArray[np.generic]]


@st.composite
def terms(draw: st.DrawFn) -> tuple[TermCodec[Any, Any], Packed]:
    """Give the codec and the canonical buffers of a term that kernels read."""
    rows, columns = draw(shapes(70, 300))
    kind = draw(st.sampled_from(sorted(CASES)))
    drawn = layouts(draw(st.sampled_from(("seeded", "fixed")))) if kind == "nm" else CASES[kind].layouts
    layout = fitting(draw(drawn), rows, columns)
    rng, seed = draw(generators()), draw(st.integers(0, 2**32 - 1))
    arrays = CASES[kind].arrays(rng, layout, rows, columns, seed)
    layout, slots = fitted(layout, arrays, columns)
    codec = term_codec(layout, rows, columns, seed if layout.seeded else 0, slots)
    packed = blank(layout, rows, columns, slots)
    codec.encode(arrays, packed, 0)
    return codec, packed


def on_device(codec: TermCodec[Any, Any], packed: Packed) -> Operand:
    """Return an operand of the same bytes, on the CPU."""
    buffers = {}
    for name, form in buffer_forms(codec.layout, *codec.shape, codec.slots).items():
        raw = torch.frombuffer(bytearray(packed[name].tobytes() or b"\0" * 8), dtype=torch.uint8)
        size = packed[name].nbytes
        buffers[name] = raw[:size].view(BUFFER_DTYPES[form.dtype]).view(form.shape)
    return Operand(codec.layout, *codec.shape, buffers, codec.seed, codec.slots)


def is_refused(work: Callable[..., Any], *arguments: Any) -> bool:
    try:
        work(*arguments)
    except InvalidFileError:
        return True
    return False


@examples(150)
@given(st.data(), terms(), generators(), st.booleans())
def test_the_device_refuses_what_reading_refuses(
    data: st.DataObject, term: tuple[TermCodec[Any, Any], Packed], rng: np.random.Generator, small: bool
) -> None:
    """It refuses all that decoding refuses, and nothing that a verifier accepts."""
    codec, packed = term
    for _ in range(data.draw(st.integers(0, 3))):
        raw = packed[data.draw(st.sampled_from(sorted(packed)))].reshape(-1).view(np.uint8)
        if raw.size:
            raw[data.draw(st.integers(0, raw.size - 1))] ^= np.uint8(rng.choice([1, 2, 16, 128, 255]))
    read = views(codec.layout, *codec.shape, {key: memoryview(a.tobytes()) for key, a in packed.items()}, codec.slots)
    tensor = DeviceTensor(TensorEntry("w", "add", "BF16", codec.shape), (on_device(codec, read),))
    with pytest.MonkeyPatch.context() as patched:
        if small:
            patched.setattr(checks, "BLOCK_ELEMENTS", 50)
            patched.setattr(checks, "RUN_SLOTS", 5)
        found = is_refused(check_terms, "d", {"w": tensor})
    if is_refused(codec.decode, read, 0, codec.shape[0]):
        assert found
    elif found:
        assert is_refused(codec.check, read)


def damaged(path: Path, out: Path, change: Callable[[str, Any, bytearray], bool]) -> str:
    """Copy a hot file with one buffer changed and its checksums mended; return the changed tensor's name."""
    data = bytearray(path.read_bytes())
    with deltafmt.open(path) as delta:
        sections = delta.container.sections
        for name in delta:
            entry = delta[name]
            for buffer, ref in entry.refs() if entry.target is None else []:
                start = sections[ref.section].offset + ref.offset
                part = bytearray(data[start : start + ref.length])
                if entry.terms and change(buffer, entry, part):
                    data[start : start + ref.length] = part
                    section = sections[ref.section]
                    found = xxhash.xxh3_128_digest(data[section.offset : section.offset + section.length])

                    def mend(index: Any, number: int = ref.section, found: bytes = found) -> None:
                        index["sections"][number]["checksum"] = found

                    out.write_bytes(edited(bytes(data), mend))
                    return name
    raise AssertionError("no buffer was changed")


def put(buffer: str, at: int, values: bytes) -> Callable[[str, Any, bytearray], bool]:
    """Return a change of some bytes of the first buffer of this name."""

    def change(name: str, _: Any, part: bytearray) -> bool:
        if name.rpartition(".")[2] != buffer or at + len(values) > len(part):
            return False
        part[at : at + len(values)] = values
        return True

    return change


def long_gaps(name: str, entry: Any, part: bytearray) -> bool:
    """Make every gap the longest that is no filler's."""
    if name != "gaps":
        return False
    term = entry.terms[0]
    gaps = np.full((32, term.slots), term.layout.filler - 1, np.uint16)
    part[:] = words.pack(gaps, term.layout.gap_bits).tobytes()
    return True


FAULTS: dict[str, tuple[Any, Callable[[str, Any, bytearray], bool], str]] = {
    "a scale of NaN": (DeltaDQ(4, 16, 4), put("scales", 0, b"\xc0\x7f"), "a scale is negative or not finite"),
    "a negative scale": (DeltaDQ(4, 16, 4), put("scales", 2, b"\x80\xbf"), "a scale is negative or not finite"),
    "descending positions": (
        DeltaDQ(3, 8, 3, index="fixed"),
        put("index", 0, b"\xff\xff\xff\xff" * 32),
        "positions do not ascend",
    ),
    "an infinite factor": (SVD(rank=4, bits=None), put("u", 0, b"\x80\x7f"), "a value is not finite"),
    "descending starts": (Magnitude(density=0.2), put("starts", 4, b"\xff\xff\0\0"), "the starts of the blocks"),
    "an entry beyond": (Magnitude(density=0.2), long_gaps, "an entry lies beyond its block"),
}


@pytest.fixture
def tiny(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Tiny:
    return made_once(request, tmp_path_factory)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_delta_that_means_nothing_is_not_served(tiny: Tiny, tmp_path: Path, fault: str) -> None:
    method, change, match = FAULTS[fault]
    good, bad = tmp_path / "good.deltafmt", tmp_path / "bad.deltafmt"
    deltafmt.pack(tiny.base, tiny.deltas["one"].parent / "one", good, method=method)
    name = damaged(good, bad, change)
    with pytest.raises(InvalidFileError):
        deltafmt.verify(bad)
    model = attach(tiny.load(), {"good": good, "bad": bad})
    tokens = ids(2, 5)
    with model.delta("good"):
        expected = logits(model, tokens)
    for _ in range(2):
        with pytest.raises(InvalidFileError, match=match) as caught, model.delta("bad"):
            logits(model, tokens)
        assert f'tensors["{name}"]' in str(caught.value)
        # Others go on.
        with model.delta("good"):
            assert close(logits(model, tokens), expected)


def test_a_file_that_claims_the_content_id_of_another_is_another_delta(packed: Path, tmp_path: Path) -> None:
    # Requests of one delta share keys and values that it computed.
    forged = tmp_path / "forged.deltafmt"
    forged.write_bytes(edited(packed.read_bytes(), lambda index: index["metadata"].update(zzz="another")))
    files = [read_attached(str(path)) for path in (packed, packed, forged)]
    assert len({file.content_id for file in files}) == 1
    first, same, other = (Attached("a", file, cast("Any", None)).identity for file in files)
    assert first == same != other
