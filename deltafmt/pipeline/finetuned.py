"""The bytes of a fine-tuned tensor, from its base and its delta, a run of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from deltafmt.delta import BATCH_ELEMENTS, RunDecoder, row_ranges
from deltafmt.errors import Remedy, UsageError
from deltafmt.index.entries import TensorEntry
from deltafmt.output import Bytes
from deltafmt.pipeline.lora_entries import EntriesInBase
from deltafmt.terms.buffers import raw_bytes
from deltafmt.terms.floats import add


def needs_base(entry: TensorEntry) -> bool:
    """Tell whether a tensor's values take the base's."""
    return entry.base is not None


def finetuned_pieces(entries: EntriesInBase, name: str) -> Iterator[Bytes]:
    """Give the bytes of a fine-tuned tensor, as :func:`deltafmt.unpack` writes them.

    Args:
        entries: the delta's entries, and its base, whose bytes are known to be those that were packed against.
        name: the tensor's name in the base.

    Raises:
        UsageError: the tensor needs a base, and there is none.
    """
    entry, delta = entries.resolve(name), entries.delta
    if entry.base is not None:
        if not entries.has_base:
            raise UsageError(
                f'{entries.name}: tensor "{name}" has to be written whole, and a part of it is the base\'s',
                Remedy("base", None),
            )
        tensor = entries.base_tensor(entry)
        if not entry.terms:
            yield from tensor.pieces()
        else:
            decoder = RunDecoder(delta, entry)
            for start, stop in row_ranges(0, entry.delta_rows, decoder.width, decoder.step, BATCH_ELEMENTS):
                with tensor.row_range(start, stop) as rows:
                    merged = add(rows, tensor.dtype, decoder.rows(start, stop), entry.dtype)
                yield bytes(raw_bytes(merged))
    if entry.data is not None:
        yield delta.container.buffer(entry.data)
