/* All loops in one place, for baseline.c and x86_64_v3.c: each compiles them for one processor level.
 * Needs LEVEL, the level's name, and LOOPS, the name of its table. */

#include "floats.c"
#include "positions.c"
#include "words.c"
#include "scales.c"
#include "nm.c"
#include "lowbit.c"
#include "lowrank.c"
#include "sparse.c"
#include "exact.c"
#include "keys.c"
#include "ranks.c"
#include "few.c"
#include "states.c"
#include "huffman.c"
#include "plane_frames.c"
#include "repeats.c"
#include "samples.c"

const struct loops LOOPS = {
    LEVEL,      subtract, add,      seeded,    uniform,    draw,      positions_ok,  rank,         unrank,     pack_words,
    unpack_words, gather, quantize, scatter,   nm_pack,    nm_unpack, dequantize,    add_outer,    sparse_needed,
    sparse_place, sparse_tile, sparse_within, exact_split, exact_join, exact_ranks, exact_find,
    exact_differ, exact_filled, exact_take, exact_put, exact_gaps, plane_frame, may_repeat, count_bytes,
    exact_unrelated,
};
