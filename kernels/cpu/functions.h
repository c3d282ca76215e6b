/* The functions of deltafmt._core that run loops, and the processor level whose loops they run. */
#ifndef DELTAFMT_FUNCTIONS_H
#define DELTAFMT_FUNCTIONS_H

#include "call.h"

extern const struct loops *loops;

/* F(name) for every function. */
#define LOOP_FUNCTIONS(F) \
F(subtract) F(add) F(seeded) F(uniform) F(draw) F(ascending) F(rank) F(unrank) F(pack_words) F(unpack_words) F(gather) F(quantize) F(scatter) F(nm_pack) F(nm_unpack) F(dequantize) F(add_outer) F(sparse_needed) F(sparse_place) F(sparse_tile) F(sparse_within) F(exact_split) F(exact_join) F(exact_ranks) F(exact_find) F(exact_differ) F(exact_filled) F(exact_take) F(exact_put) F(exact_gaps) F(plane_frame) F(may_repeat) F(count_bytes) F(exact_unrelated)

#define DECLARE(NAME) PyObject *NAME(struct call *call);
LOOP_FUNCTIONS(DECLARE)
#undef DECLARE

#endif
