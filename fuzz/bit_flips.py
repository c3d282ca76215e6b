"""Flip every bit of two delta files of about 20 KiB, one at a time; a reader must refuse each of the files."""

from __future__ import annotations

import functools
import io
import multiprocessing
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from make_corpus import layer, moved, weights, write_checkpoint

import deltafmt
from deltafmt.errors import InvalidFileError
from deltafmt.methods import RTN, DeltaDQ, Exact

SIZE = 20_480
FILES = {"config.json": b'{"model_type": "toy"}', "tokenizer/vocab.txt": bytes(range(256)) * 3}


def make_file(folder: Path) -> bytes:
    """Return a file of about 20 KiB that has all parts: two layouts, exact tensors, attachments, padding."""
    rng = np.random.default_rng(5)
    base, finetuned = layer(rng)
    base["wide.weight"] = weights(rng, 70, 96)
    finetuned["wide.weight"] = moved(rng, base["wide.weight"])
    finetuned["new.weight"] = weights(rng, 17, 33)
    sides = write_checkpoint(folder / "flip-base", base, {}), write_checkpoint(folder / "flip-new", finetuned, FILES)
    rules = [("wide.*", RTN(3))]
    deltafmt.pack(*sides, folder / "flip.deltafmt", method=DeltaDQ(4, 16, 4, index="fixed"), rules=rules, threads=1)
    return checked(folder / "flip.deltafmt")


def make_progressive_file(folder: Path) -> bytes:
    """Return a progressive file of about 20 KiB that has a parent: terms, their ends, exact parts, heads of files."""
    rng = np.random.default_rng(6)
    versions = [{"w": weights(rng, 40, 32), "v": weights(rng, 20, 16, dtype="F32")}]
    for _ in range(2):
        versions.append({name: moved(rng, tensor) for name, tensor in versions[-1].items()})
    base, middle, last = (
        write_checkpoint(folder / f"link-{number}", tensors, {}) for number, tensors in enumerate(versions)
    )
    parent, link = folder / "parent.deltafmt", folder / "link.deltafmt"
    deltafmt.pack(base, middle, parent, method=Exact(), threads=1)
    deltafmt.pack(middle, last, link, method=DeltaDQ(1, 4, 2), exact=True, parent=parent, threads=1)
    return checked(link)


def checked(path: Path) -> bytes:
    """Return the bytes of a file, whose size must be about the one that is meant."""
    data = path.read_bytes()
    if not SIZE * 3 // 4 <= len(data) <= SIZE * 5 // 4:
        raise SystemExit(f"the file has {len(data)} bytes, not about {SIZE}")
    return data


FILES_MADE: dict[str, Callable[[Path], bytes]] = {
    "a file": make_file,
    "a progressive link of a chain": make_progressive_file,
}


def flipped(data: bytes, bit: int) -> bytes:
    """Return the file with one bit flipped."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def missed(data: bytes, bits: list[int], reader: str | None = None) -> list[int]:
    """Return the bits whose flip is not refused.

    Args:
        data: the whole file.
        bits: the bits to flip.
        reader: a program that is run as ``reader verify FILE``, and refuses by an exit code of 1 to 127; None for
            ``deltafmt.verify``.
    """
    if reader is None:
        return [bit for bit in bits if not refused(flipped(data, bit))]
    found = []
    with tempfile.NamedTemporaryFile(suffix=".deltafmt") as file:
        for bit in bits:
            Path(file.name).write_bytes(flipped(data, bit))
            code = subprocess.run([reader, "verify", file.name], capture_output=True, check=False).returncode
            if not 0 < code < 128:
                found.append(bit)
    return found


def refused(data: bytes) -> bool:
    """Tell whether ``deltafmt.verify`` refuses a file; any other exception is an error."""
    try:
        deltafmt.verify(io.BytesIO(data))
    except InvalidFileError:
        return True
    return False


def run(folder: Path, sample: int, jobs: int, reader: str | None) -> int:
    """Flip one of so many bits, say what was found, and return the number of flips that were not refused."""
    return sum(flip(make(folder), what, sample, jobs, reader) for what, make in FILES_MADE.items())


def flip(data: bytes, what: str, sample: int, jobs: int, reader: str | None) -> int:
    """Do the same for one file."""
    start = time.monotonic()
    if refused(data):
        raise SystemExit("the file itself is refused")
    bits = list(range(0, 8 * len(data), sample))
    wrong = 0
    for name in (None, reader) if reader else (None,):
        parts = [bits[number :: 8 * jobs] for number in range(8 * jobs)]
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            found = sorted(
                bit for part in pool.map(functools.partial(missed, data, reader=name), parts) for bit in part
            )
        share = f"{len(bits) - len(found):,} of {len(bits):,} flips of {what} of {len(data):,} bytes are refused"
        print(f"bits: {name or 'deltafmt.verify'}: {share}, {time.monotonic() - start:.0f} s")
        for bit in found:
            print(f"  WRONG byte {bit // 8}, bit {bit % 8}")
        wrong += len(found)
    return wrong
