"""The terms of a tensor whose change is not of low rank, by a method, as ``pack`` makes them (DoRA's, for example)."""

from __future__ import annotations

from deltafmt.checkpoint.safetensors_file import Tensor
from deltafmt.errors import UsageError
from deltafmt.format import constants as c
from deltafmt.methods.base import DeltaRows, Method
from deltafmt.pipeline.entry_writer import TermBytes, packed_bytes
from deltafmt.pipeline.lora_merge import Merged
from deltafmt.pipeline.plan import tensor_seed
from deltafmt.terms.buffers import blank
from deltafmt.terms.codecs import fitted, term_codec


def method_terms(base: Tensor, merged: Merged, method: Method) -> list[TermBytes]:
    """Return the terms that a method makes of a tensor's change; none if it is better stored whole.

    The whole matrix is in memory meanwhile.

    Args:
        base: the base's tensor.
        merged: the tensor with its change.
        method: the method.

    Raises:
        NonFiniteError: the change has NaN or infinity.
        UsageError: the method cannot have the tensor; names it.
    """
    same_form = merged.shape == base.shape and merged.dtype in c.DELTA_DTYPES and base.dtype in c.DELTA_DTYPES
    if not same_form or len(base.shape) < 2:
        return []
    rows, columns, seed = base.rows, base.columns, tensor_seed(0, base.name)
    try:
        planned = method.layouts(rows, columns)
        with base.row_range(0, rows) as old:
            given = DeltaRows(merged.raw(0, rows), merged.dtype, old, base.dtype, 0, base.name)
            compressed = method.compress(given, seed)
    except UsageError as error:
        raise error.located(f'tensor "{base.name}"') from error
    terms = []
    for layout, arrays in zip(planned, compressed, strict=True):
        found, slots = fitted(layout, arrays, columns) if method.whole else (layout, 0)
        codec = term_codec(found, rows, columns, seed if found.seeded else 0, slots)
        packed = blank(found, *codec.shape, slots)
        codec.encode(arrays, packed, 0)
        terms.append((packed_bytes(codec, packed), sum(array.nbytes for array in packed.values())))
    return [term for term, _ in terms] if sum(nbytes for _, nbytes in terms) < base.nbytes else []
