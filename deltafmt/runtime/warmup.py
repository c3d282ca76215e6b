"""Which kernel variants the deltas of some files can need, found by making their products without launching them.

What a launch is compiled for follows from the layouts of the terms, from the shapes of the matrices and of those that
share a launch with them, from the dtypes, and from how many tokens each delta has. The files give the layouts and the
shapes. Which matrices share a launch is known only once a model runs; here, all matrices of one module that have the
same columns may. Numbers of tokens are tried in powers of two up to those that the caller names.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import nn

from deltafmt.delta import DeltaFile, refuse_child, refuse_exact
from deltafmt.errors import UsageError
from deltafmt.index.entries import TensorEntry
from deltafmt.kernels import devices
from deltafmt.kernels.background_compile import warmed
from deltafmt.kernels.compiling import Compiled, compile_variants, load_variants, parse_target, target_of
from deltafmt.kernels.device_memory import DeviceMemory, PlacedBuffers
from deltafmt.kernels.kind import Conversion
from deltafmt.kernels.launching import launch_embeddings, launch_products
from deltafmt.kernels.operand import Operand, buffer_forms
from deltafmt.kernels.products import can_fuse, fused_linear
from deltafmt.kernels.record import MAX_PARTS
from deltafmt.kernels.registry import KERNELS, kernels_of
from deltafmt.kernels.segments import FixedSegments, Segments
from deltafmt.kernels.table import OperandTable
from deltafmt.kernels.variants import Variant, collecting
from deltafmt.runtime.dtypes import TORCH_DTYPES
from deltafmt.runtime.upload import prepare
from deltafmt.terms.layout import TermLayout

TOKENS = (1, 16, 2048)
# Deltas in a batch: how many programs a launch has depends on it a little.
SLOTS = (4, 16, 64)
# Slots of the tables of a model, of which compiled code takes any number to be in use.
ALL_SLOTS = (64, 256, 1024)
META = torch.device("meta")

_EMBEDDING = re.compile(r"emb|wte|wpe|shared", re.IGNORECASE)


class Part(NamedTuple):
    """One matrix that deltas change: its rows, columns and dtype, and the layouts and slots of a delta's terms."""

    rows: int
    columns: int
    dtype: torch.dtype
    terms: tuple[tuple[TermLayout, int], ...]


class Warmed(NamedTuple):
    """What a warm-up did.

    Attributes:
        target: what was compiled for, such as ``cuda:90``; empty if there is no GPU and no target was named.
        compiled: the number of variants that were compiled.
        cached: the number of those that Triton's cache had.
        seconds: that it took.
    """

    target: str
    compiled: int
    cached: int
    seconds: float


def warmup(
    paths: Iterable[str | os.PathLike[str]],
    *,
    tokens: Sequence[int] = TOKENS,
    target: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Warmed:
    """Compile the kernels that serving some delta files can need, so that no request has to wait for that.

    The results are kept in Triton's cache on disk (``TRITON_CACHE_DIR``, or ``~/.triton/cache``), where every later
    process of this user finds them. Kernels that the cache has are not compiled again.

    Args:
        paths: delta files. Files of the same layouts and shapes need the same kernels: one of them is enough.
        tokens: the numbers of tokens of a batch that are to be served, for example 16 for a decoding step of 16 rows
            and 2048 for prompts. Smaller numbers of tokens for a delta are served too.
        target: what to compile for, such as ``cuda:90``; by default the current CUDA device. With a target, no GPU is
            needed.
        workers: the number of processes that compile; by default one for each processor.
        progress: called with the number of finished variants and of all, as each is finished.

    Raises:
        UsageError: a number of tokens or the target is none, or Triton is not installed.
        StorageError, InvalidFileError: a file cannot be read.
        DeltafmtError: a kernel cannot be compiled.
    """
    check_tokens(tokens)
    if target is not None:
        parse_target(target)
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} processes compile nothing")
    entries = entries_of(paths)
    if target is None:
        if not torch.cuda.is_available():
            return Warmed("", 0, 0, 0.0)
        target = target_of(torch.device("cuda", torch.cuda.current_device()))
    if not devices.has_triton():
        raise UsageError("Triton, which compiles the kernels, is not installed; pip install 'deltafmt[gpu]' brings it")
    return compile_all(variants_of_entries(entries, tokens), target, workers, progress)


def warm_up(
    device: torch.device,
    files: Iterable[Iterable[TensorEntry]],
    served: torch.dtype | None,
    tokens: Sequence[int],
    progress: Callable[[int, int], None] | None,
) -> Warmed:
    """Compile and load what some deltas can need on a device, on which no product waits for a compilation from then on.

    Args:
        device: on the CPU, there is nothing to do.
        files: the entries of the tensors of each delta.
        served: the dtype in which the model computes; that of the tensors if not given.
        tokens: the numbers of tokens of a batch.
        progress: called with the number of finished variants and of all.
    """
    if not devices.usable_on(device):
        return Warmed("", 0, 0, 0.0)
    if cast("int | None", device.index) is None:
        device = torch.device("cuda", torch.cuda.current_device())
    variants = variants_of_entries(files, tokens, served)
    done = compile_all(variants, target_of(device), None, progress)
    load_variants(variants, device)
    warmed(device, variants)
    prepare(device)
    return done


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of a model's activations: that of the first of its parameters that kernels take, if any."""
    known = (torch.bfloat16, torch.float16, torch.float32)
    return next((parameter.dtype for parameter in model.parameters() if parameter.dtype in known), None)


def compile_all(
    variants: Sequence[Variant], target: str, workers: int | None, progress: Callable[[int, int], None] | None
) -> Warmed:
    """Compile variants and return what was done.

    Raises:
        DeltafmtError: a kernel cannot be compiled; the message names it.
    """
    start, done = time.monotonic(), 0

    def note(_: Compiled) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(variants))

    found = compile_variants(variants, target, workers, note)
    failed = next((one for one in found if one.error), None)
    if failed is not None:
        raise UsageError(f"{failed.variant.name} cannot be compiled for {target}: {failed.error}")
    cached = sum(one.cached for one in found)
    return Warmed(target, len(found) - cached, cached, time.monotonic() - start)


def check_tokens(tokens: Sequence[int]) -> None:
    """Refuse numbers of tokens that no batch has.

    Raises:
        UsageError: names the number.
    """
    for number in tokens:
        if not 1 <= number <= 1 << 20:
            raise UsageError(f"{number} tokens are not a number from 1 to {1 << 20}")


def entries_of(paths: Iterable[str | os.PathLike[str]]) -> list[list[TensorEntry]]:
    """Return the entries of the tensors of some files.

    Raises:
        StorageError, InvalidFileError: a file cannot be read.
    """
    found = []
    for path in paths:
        with DeltaFile(path) as file:
            found.append([file.resolve(name) for name in file])
            refuse_child(file.container)
            refuse_exact(file.container.name, found[-1])
    return found


def variants_of_entries(
    files: Iterable[Iterable[TensorEntry]], tokens: Sequence[int], served: torch.dtype | None = None
) -> list[Variant]:
    """Return the variants that serving some deltas can need, given the entries of their tensors; see :func:`needs`."""
    products: dict[tuple[Part, ...], None] = {}
    embeddings: dict[Part, None] = {}
    conversions: dict[tuple[TermLayout, int, int], None] = {}
    for entries in files:
        held = list(entries)
        found_products, found_embeddings = needs(held, served)
        products |= dict.fromkeys(found_products)
        embeddings |= dict.fromkeys(found_embeddings)
        for entry in held:
            for term in entry.terms:
                if term.layout.converted_buffers:
                    conversions[term.layout, entry.delta_rows, entry.columns] = None
    return variants_of(products, embeddings, conversions, tokens)


def needs(
    entries: Iterable[TensorEntry], served: torch.dtype | None = None
) -> tuple[list[tuple[Part, ...]], list[Part]]:
    """Return the groups of matrices that may share a launch, and the matrices that may be embeddings.

    Args:
        entries: of the tensors of a delta.
        served: the dtype in which the model computes; each tensor's own if not given.
    """
    by_module: dict[tuple[str, int, torch.dtype], list[Part]] = {}
    embeddings = []
    for entry in entries:
        if not entry.terms:
            continue
        dtype = served or TORCH_DTYPES[entry.dtype]
        terms = tuple((term.layout.plain(), term.slots) for term in entry.terms)
        part = Part(entry.delta_rows, entry.columns, dtype, terms)
        module = entry.name.rpartition(".")[0]
        by_module.setdefault((module.rpartition(".")[0], entry.columns, dtype), []).append(part)
        if _EMBEDDING.search(entry.name):
            embeddings.append(part)
    groups: dict[tuple[Part, ...], None] = {}
    for parts in by_module.values():
        for one in parts:
            groups[one,] = None
        # How many programs a launch has is all that matters of the rows: the fewest and the most of them stand for all.
        ordered = sorted(parts, key=lambda part: part.rows)
        for count in range(2, min(len(parts), MAX_PARTS) + 1):
            groups[tuple(ordered[:count])] = None
            groups[tuple(ordered[-count:])] = None
    return list(groups), embeddings


def variants_of(
    products: Iterable[tuple[Part, ...]],
    embeddings: Iterable[Part],
    conversions: Iterable[tuple[TermLayout, int, int]],
    tokens: Sequence[int],
) -> list[Variant]:
    """Return the variants of some groups of matrices, embeddings and conversions, and of the checksums."""
    batches = [(number, each) for number in sorted(set(tokens)) for each in _shares(number)]
    segments = {
        (number, each, slots): Segments.of(_slots(number, each, slots), slots, "cpu")
        for number, each in batches
        for slots in SLOTS
    }
    cpu = torch.device("cpu")
    fixed = [FixedSegments(number, slots, cpu) for number in sorted(set(tokens)) for slots in ALL_SLOTS]
    with collecting() as found:
        for parts in products:
            for slots in SLOTS:
                table = _table(parts, slots)
                for number, each in batches:
                    _collect_product(table, parts, number, segments[number, each, slots])
            table = _table(parts, 1)
            for one in fixed:
                if one.tokens <= table.token_limit:
                    _collect_product(table, parts, one.tokens, one)
            for number in tokens:
                _collect_fused(_table(parts, 1), parts, number)
        for part in embeddings:
            table = _table([part], SLOTS[0])
            output = torch.empty(1, part.columns, dtype=part.dtype, device=META)
            ids = torch.empty(1, dtype=torch.int64, device=META)
            launch_embeddings(output, ids, table, segments[batches[0][0], batches[0][1], SLOTS[0]])
        memory = torch.empty(256, dtype=torch.uint8, device=META)
        for layout, rows, columns in conversions:
            name = layout.converted_buffers[0]
            KERNELS[layout.kind].convert(memory, memory, [Conversion("", name, layout, rows, columns, 0, 0)])
        from deltafmt.kernels.xxh3 import kernel  # noqa: PLC0415 - imports Triton

        kernel.accumulators(memory.view(torch.int64), np.zeros(1, np.int64), np.full(1, 256, np.int64))
    return list(found)


def _slots(number: int, each: int, slots: int) -> list[int]:
    """Return the slots of a batch whose deltas have some tokens each; the base's where the slots are used up."""
    return [token // each if token // each < slots else -1 for token in range(number)]


def _shares(number: int) -> Iterator[int]:
    """Yield the tokens of a delta that are tried for a batch: powers of two, and the whole batch."""
    each = 1
    while each < number:
        yield each
        each *= 2
    yield number


def _operand(part: Part, layout: TermLayout, slots: int) -> Operand:
    forms = buffer_forms(layout, part.rows, part.columns, slots)
    memory = DeviceMemory(torch.empty(256, dtype=torch.uint8, device=META))
    buffers = PlacedBuffers(memory, forms, dict.fromkeys(forms, 0))
    return Operand(layout, part.rows, part.columns, buffers, slots=slots)


def _table(parts: Sequence[Part], slots: int) -> OperandTable:
    """Return a table whose first slot has an operand for every term of the parts."""
    table = OperandTable(slots, [part.rows for part in parts], parts[0].columns, META)
    table.put(0, [[_operand(part, *term) for term in part.terms] for part in parts])
    return table


def _tensors(parts: Sequence[Part], number: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    dtype = parts[0].dtype
    outputs = [torch.empty(number, part.rows, dtype=dtype, device=META) for part in parts]
    return outputs, torch.empty(number, parts[0].columns, dtype=dtype, device=META)


def _collect_product(table: OperandTable, parts: Sequence[Part], number: int, segments: Segments) -> None:
    """Make the product of a batch of several deltas."""
    outputs, x = _tensors(parts, number)
    launch_products(outputs, x, table, segments)


def _collect_fused(table: OperandTable, parts: Sequence[Part], number: int) -> None:
    """Make the product of a batch of one delta, if it is one with the base's, and the decoding of single matrices."""
    if can_fuse(table, 0, number):
        weights = [torch.empty(part.rows, part.columns, dtype=part.dtype, device=META) for part in parts]
        fused_linear(_tensors(parts, number)[1], weights, table, 0)
    for terms in table.operands(0):
        for operand in terms:
            kernels = kernels_of(operand.layout)
            if kernels.most_tokens(operand.layout) is None:
                kernels.decode(operand, 0, operand.rows)
