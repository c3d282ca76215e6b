/* XXH3 with seed 0 and the default secret: a checksum, not a cryptographic hash. Written from the XXH3 description of
 * xxHash. */
#ifndef DELTAFMT_XXH3_H
#define DELTAFMT_XXH3_H

#include <stddef.h>
#include <stdint.h>

/* XXH3-64 of any bytes: of a delta file's header, and of a chunk of an exact tensor. */
uint64_t dlt_xxh3_64(const uint8_t *data, size_t length);

/* XXH3-128 of any bytes, in its canonical form: 16 bytes, the most significant first. */
void dlt_xxh3_128(const uint8_t *data, size_t length, uint8_t out[16]);

/* The same of bytes in memory, a part at a time, so that another hash can take each part while it is in the cache:
 * `advance` goes on up to a position, which may stand still, and `end` takes what is left. `data` and `length` are
 * those of the whole. */
typedef struct {
    uint64_t sum[8];
    size_t blocks; /* blocks of 1024 bytes that have been taken */
} xxh3_run;

void dlt_xxh3_start(xxh3_run *run);
void dlt_xxh3_advance(xxh3_run *run, const uint8_t *data, size_t length, size_t position);
void dlt_xxh3_end(xxh3_run *run, const uint8_t *data, size_t length, uint8_t out[16]);

#endif
