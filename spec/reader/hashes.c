/* Hashes standard input for the test of the two hashes: for each length, u64, and bytes, 104 bytes: BLAKE3 in one piece
 * and in parts, XXH3-128 likewise, and XXH3-64, the most significant byte first, of 17 to 128 bytes, otherwise zeros.
 */
#include "blake3.h"
#include "xxh3.h"

#include <stdio.h>
#include <stdlib.h>

int main(void) {
    uint64_t length;
    while (fread(&length, sizeof length, 1, stdin) == 1) {
        uint8_t out[104] = {0}, *data = malloc((size_t)length + 1);
        if (data == NULL || fread(data, 1, (size_t)length, stdin) != length) return 1;
        size_t size = (size_t)length, third = size / 3, most = 2 * size / 3;
        blake3 hash;
        dlt_blake3_of(data, size, out);
        dlt_blake3_start(&hash);
        if (most > third) dlt_blake3_add_part(&hash, data, third);
        dlt_blake3_add(&hash, data + (most > third ? third : 0), most - (most > third ? third : 0));
        dlt_blake3_add(&hash, data + most, size - most);
        dlt_blake3_end(&hash, out + 32);
        xxh3_run run;
        dlt_xxh3_128(data, size, out + 64);
        dlt_xxh3_start(&run);
        for (size_t at = 0; at < size; at += 1500) dlt_xxh3_advance(&run, data, size, at);
        dlt_xxh3_end(&run, data, size, out + 80);
        uint64_t header = dlt_xxh3_64(data, size);
        for (int i = 0; i < 8; i++) out[96 + i] = (uint8_t)(header >> (56 - 8 * i));
        fwrite(out, 1, sizeof out, stdout);
        free(data);
    }
    return 0;
}
