"""Products with packed deltas on a GPU, for the tokens of many deltas at once; shipped as ``deltafmt.kernels``.

What is computed, for token t with slot s (its delta) and each part p (q, k and v are three parts of one product)::

    y[p][t, :] += x[t, :] @ D[s][p].T         sums in float32, rounded once a launch

    x      (tokens, columns)                  activations: BF16, F16 or F32
    slots  (tokens,), int32                   each token's slot; -1: the base alone, whose tokens no program touches
    D      (rows of the part, columns)        a sum of packed terms; never made dense by the kernels for few tokens
    y[p]   (tokens, rows of the part)         the base's output, changed in place

One launch multiplies the terms of one layout, for all slots, and for up to three parts. Its grid is two-dimensional:
``program_id(1)`` is a token tile (up to TOKENS tokens of one slot), ``program_id(0)`` a block of rows of one part, the
blocks of part 0 first. A program reads the token tile, then the record of (slot, part), which holds the addresses of
the term's buffers, then words of these buffers and elements of x. It alone adds to its rows of its tokens, so nothing
is atomic.

A product, file by file (KIND is ``nm``, ``lowbit``, ``lowrank`` or ``sparse``):

- ``products.py``: what models call. It launches kernels, and decodes the deltas that no kernel takes.
- ``launching.py``: which kernels a product needs. ``recorded_launches.py`` repeats launches without
  Triton, ``background_compile.py`` and ``compiling.py`` compile kernels in the background.
- ``segments.py``: the tokens sorted by slot and cut into token tiles, on the device.
- ``table.py``, ``record.py``, ``record_memory.py``: the operand table, whose records hold the addresses of the buffers.
  ``operand.py`` is one term; ``device_memory.py`` the allocation that its buffers lie in; ``operand_records.py`` the
  records of all operands of an allocation.
- ``KIND/kind.py``: what a kind can do, and its record. ``KIND/launch.py``: grid and constants. The kernels:
  ``KIND/kernel.py``, for ``nm`` ``gather.py``, ``elements.py``, ``dense.py`` and ``fused.py``.
- ``device_functions.py``, ``coded_words.py``: what kernels share.
- ``KIND/decode.py``: the dense delta in torch, where no kernel runs. ``KIND/naive.py``: the reference of the tests.

Names in kernels: ``p_`` an address, ``m_`` a predicate of a load or store, ``o_`` offsets, ``i_`` a number in a loop,
capitals for constants of the compilation. ``docs/kernels.md`` explains the design, and ``docs/architecture.md`` the way
from a model's call to here.
"""
