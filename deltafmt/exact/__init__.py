"""Exact tensors: every bit of a fine-tuned tensor, coded relative to the base's (spec/deltafmt-v1.md, section 17).

From a tensor to bytes, for a BF16 weight and the base's weight in its place:

1. ``units.py``: both are read as integers, units of 2 bytes: the bits 0x3F81 and 0x3F80.
2. ``prediction.py``: the base's units are the prediction of the fine-tune's; an exact part predicts base plus delta.
3. ``differences.py``: bits are put in the order of the floats' values, and subtracted; here that gives 1. A chunk's
   differences are sorted by the prediction's exponent, which the decoder knows too, and cut into planes: all low
   bytes, then all high bytes.
4. ``few.py``: if only a few units of a chunk differ, the places and differences of these alone.
5. ``plane_frames.py``: a zstd frame of each plane, for which ``states.py`` has codes; zstd's own compressor makes a
   frame as well if ``repeats.py`` says that a plane may repeat. ``frames.py`` reads frames, with zstd. ``chunk.py``
   takes the smallest form of a chunk of 2^20 units.
6. ``coding.py``: the chunks of a tensor, and a table with the checksum and the length of each.

Decoding goes the same way back. Each chunk needs only its own part of the base.
"""
