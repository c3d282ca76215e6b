"""Fuzz the reader: for any bytes, it may raise only InvalidFileError, and it must take little time and memory.

    python fuzz/fuzz_reader.py NEW_INPUTS fuzz/corpus -max_total_time=60

The input is a whole delta file, so a finding can be handed to ``deltafmt verify`` as it is. See fuzz/README.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["deltafmt"]):
    import deltafmt
    from deltafmt import core
    from deltafmt.container.content import content_id
    from deltafmt.delta import DeltaFile, RunDecoder, codec_of
    from deltafmt.errors import InvalidFileError
    from deltafmt.format.limits import Limits
    from deltafmt.index.entries import TensorEntry
    from deltafmt.pipeline import summary
    from deltafmt.pipeline.digests import payload_digest
    from deltafmt.pipeline.exact_tensors import ExactTensor
    from deltafmt.pipeline.restored_files import read_files
    from deltafmt.pipeline.verify import check_coverage, check_served_part

import mutate
import numpy as np
from blake3 import blake3
from budget import bounded_time, limit_memory

# What the product is told to give for a file, so that most inputs are quick; the harness leaves out nothing by itself.
LIMITS = Limits(max_memory=1 << 26, max_elements=1 << 20, max_output=1 << 24)
LARGEST_RESTORED = 1 << 20  # bytes of exact tensors that are restored twice


def test_one_input(data: bytes) -> None:
    """Read every part of a file in every way that the library offers."""
    with bounded_time(), contextlib.suppress(InvalidFileError), deltafmt.open(io.BytesIO(data), limits=LIMITS) as delta:
        entries = list(delta.container.entries())
        json.dumps(summary.summary_obj(delta.container))
        for entry in entries:
            summary.describe_entry(entry)
            read_tensor(delta, entry)
        for name in delta.container.attachments:
            delta.attachment(name)
        verify(delta, entries)


def read_tensor(delta: DeltaFile, entry: TensorEntry) -> None:
    """Read one tensor's buffers and decode it; a file may fail here and still have other tensors to read."""
    with contextlib.suppress(InvalidFileError):
        for array in delta.buffers(entry.name).values():
            array.sum()
        if entry.exact is not None:
            restore(ExactTensor(delta, entry, None))
        if entry.exact is not None and entry.terms and within(delta, entry):
            predict(delta, entry)
        if delta.resolve(entry.name).action not in ("replace", "exact"):
            dense = delta.delta(entry.name)
            if dense.shape != entry.shape:
                raise AssertionError(f"{entry.name}: shape {dense.shape} where {entry.shape} was promised")


def restore(exact: ExactTensor) -> None:
    """Check and restore an exact tensor as if its base were zeros, with numpy and with the compiled loops."""
    with contextlib.suppress(InvalidFileError):
        exact.check()
    for number in range(len(exact) if exact.decoded <= LARGEST_RESTORED else 0):
        found: list[object] = []
        for implementation in (contextlib.nullcontext, core.reference_only):
            with implementation():
                try:
                    offset, units = exact.restore(number)
                    found.append((offset, units.tobytes()))
                except InvalidFileError as error:
                    found.append(str(error))
        if found[0] != found[1]:
            raise AssertionError(f"chunk {number}: the decoders differ: {found}")


def predict(delta: DeltaFile, entry: TensorEntry) -> None:
    """Find the entries of a tensor with an exact part, with numpy and with the compiled loops."""
    decoder = RunDecoder(delta, entry)
    for start, stop in decoder.ranges():
        found: list[object] = []
        for implementation in (contextlib.nullcontext, core.reference_only):
            with implementation():
                try:
                    found.append(decoder.marked(start, stop, entry.columns).tobytes())
                except InvalidFileError as error:
                    found.append(str(error))
        if found[0] != found[1]:
            raise AssertionError(f"{entry.name}, rows {start} to {stop}: the decoders differ: {found}")


def verify(delta: DeltaFile, entries: list[TensorEntry]) -> None:
    """Run the checks of ``deltafmt verify``, and compare the two decoders."""
    container = delta.container
    for number in range(len(container.sections)):
        container.touch(number, force=True)
    for entry in entries:
        if entry.terms and within(delta, entry):
            with contextlib.suppress(InvalidFileError):
                compare_decoders(RunDecoder(delta, entry), entry.columns)
            compare_checks(delta, entry)
        check(delta, entry)
    check_coverage(container, entries)
    for entry in entries:
        if entry.digest is not None and payload_digest(delta, entry) != entry.digest:
            raise InvalidFileError("another digest")
    for attachment in container.attachments.values():
        if blake3(container.buffer(attachment.data)).digest() != attachment.digest:
            raise InvalidFileError("another digest")
    read_files(delta, entries)
    check_served_part(container, entries)
    rest = container.removed, container.attachments, container.metadata, container.scaled_key()
    if content_id(entries, *rest, container.files, container.parent) != container.content_id:
        raise InvalidFileError("another content id")
    tree = summary.cost_tree(container)
    negative = [node.label for node in tree.children if node.size < 0 and node.label != "zstd saves"]
    if sum(node.size for node in tree.children) != container.size or negative:
        raise AssertionError(f"costs of a valid file do not add up: {tree.to_obj()}")


def within(delta: DeltaFile, entry: TensorEntry) -> bool:
    """Tell whether the limits allow to decode a tensor."""
    with contextlib.suppress(InvalidFileError):
        delta.check_work([entry], 0)
        return True
    return False


def check(delta: DeltaFile, entry: TensorEntry) -> None:
    """Check every term without its matrix, however large that is; the limits have no say in this."""
    for term in entry.terms:
        codec_of(entry, term).check(delta.term_views(entry, term))


def compare_decoders(decoder: RunDecoder, columns: int) -> None:
    """Decode, check and add to a base with numpy and with the compiled loops; they must give or refuse the same."""
    for start, stop in decoder.ranges():
        base = np.zeros((stop - start, columns), np.uint16)
        compiled = decoded(decoder, start, stop, base)
        with core.reference_only():
            reference = decoded(decoder, start, stop, base)
        if not all(map(np.array_equal, reference, compiled)):
            raise AssertionError(f"rows {start} to {stop}: the decoders differ: {reference}, {compiled}")


def compare_checks(delta: DeltaFile, entry: TensorEntry) -> None:
    """Check the terms without their matrices, and by decoding them; both must refuse the same."""
    with contextlib.suppress(InvalidFileError):
        for term in entry.terms:
            codec, packed = codec_of(entry, term), delta.term_views(entry, term)
            found = []
            for check in (codec.check, lambda packed: codec.decode(packed, 0, codec.shape[0], check_form=True)):  # noqa: B023
                try:
                    check(packed)
                    found.append(None)
                except InvalidFileError as error:
                    found.append(str(error))
            if (found[0] is None) != (found[1] is None):
                raise AssertionError(f"{entry.name}: the checks differ: {found}")


def decoded(decoder: RunDecoder, start: int, stop: int, base: np.ndarray) -> list[np.ndarray | str]:
    """Return rows of a delta, checked, and the same added to a BF16 base; in place of each its error."""
    found: list[np.ndarray | str] = []
    for work in (
        lambda: decoder.rows(start, stop, check=True).view(np.uint32),
        lambda: decoder.add(start, stop, base, "BF16", "BF16"),
    ):
        try:
            found.append(work())
        except InvalidFileError as error:
            found.append(str(error))
    return found


def main() -> None:
    """Run libFuzzer with this process's arguments."""
    arguments = list(sys.argv)
    if not any(argument.startswith("-max_len") for argument in arguments):
        arguments.append(f"-max_len={mutate.MAX_LENGTH}")
    warm_up(Path(__file__).parent / "corpus")
    np.seterr(all="ignore")  # scales may be any bits before they are checked
    limit_memory()
    atheris.Setup(
        arguments,
        test_one_input,
        custom_mutator=lambda data, size, seed: mutate.mutate(data, random.Random(seed), size, atheris.Mutate),
        custom_crossover=lambda data, other, size, seed: mutate.cross(data, other, random.Random(seed), size),
    )
    atheris.Fuzz()


def warm_up(corpus: Path) -> None:
    """Read the seed inputs, so that all is imported before the fuzzer measures time and memory."""
    for path in sorted(corpus.glob("*.deltafmt")):
        test_one_input(path.read_bytes())


if __name__ == "__main__":
    main()
