/* BLAKE3 (hash mode, 32 bytes), in one thread. Written from the paper "BLAKE3: one function, fast everywhere". */
#ifndef DELTAFMT_BLAKE3_H
#define DELTAFMT_BLAKE3_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint8_t chunk[1024];   /* the last chunk, which is compressed once it is known whether another follows */
    size_t filled;         /* bytes of it */
    uint64_t chunks;       /* whole chunks before it */
    uint32_t stack[54][8]; /* chaining values of whole subtrees, the largest first */
    int depth;
} blake3;

void dlt_blake3_start(blake3 *hash);
void dlt_blake3_add(blake3 *hash, const void *data, size_t length);
/* The same for bytes that others will follow: no part of them is kept back as the input's last chunk, so it is quicker.
 */
void dlt_blake3_add_part(blake3 *hash, const void *data, size_t length);
void dlt_blake3_end(const blake3 *hash, uint8_t out[32]);

/* All of it at once. */
void dlt_blake3_of(const void *data, size_t length, uint8_t out[32]);

#endif
