/* Times the reader for benchmarks/reader.py: timing FILE REPEATS prints one JSON object. Times are of the processor,
 * the least of all repeats, in seconds: on a busy machine a clock on the wall would measure the others. */
#define _POSIX_C_SOURCE 200809L
#include "blake3.h"
#include "deltafmt.h"
#include "xxh3.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { OPEN, VALIDATE, VERIFY, HASH, MAPPED, CHECKSUM, FIGURES };
static const char *const names[FIGURES] = {"open", "validate", "verify", "blake3", "blake3_mapped", "xxh3"};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int main(int count, char **arguments) {
    dlt_error error = {DLT_MISUSE, "usage: timing FILE REPEATS"};
    double least[FIGURES], start;
    uint64_t size = 0;
    uint8_t *bytes = NULL, digest[32];
    FILE *stream = count == 3 ? fopen(arguments[1], "rb") : NULL;
    if (stream == NULL) return fprintf(stderr, "%s\n", error.message), 2;
    for (int i = 0; i < FIGURES; i++) least[i] = 1e9;
    for (int repeat = 0; repeat < atoi(arguments[2]); repeat++) {
        double taken[FIGURES];
        dlt_file *file;
        start = now();
        if (dlt_open(arguments[1], NULL, &file, &error)) return fprintf(stderr, "%s\n", error.message), 3;
        taken[OPEN] = now() - start, start = now();
        dlt_status status = dlt_validate(file, &error);
        taken[VALIDATE] = now() - start, start = now();
        if (!status) status = dlt_verify(file, &error);
        taken[VERIFY] = now() - start;
        if (status) return fprintf(stderr, "%s\n", error.message), 3;
        size = dlt_about(file).size;
        dlt_close(file);
        if (bytes == NULL) {
            bytes = malloc((size_t)size);
            if (bytes == NULL || fread(bytes, 1, (size_t)size, stream) != size) return 5;
        }
        start = now(), dlt_blake3_of(bytes, (size_t)size, digest), taken[HASH] = now() - start;
        int fd = open(arguments[1], O_RDONLY);
        start = now();
        void *mapped = mmap(NULL, (size_t)size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (mapped == MAP_FAILED) return 5;
        dlt_blake3_of(mapped, (size_t)size, digest), taken[MAPPED] = now() - start;
        munmap(mapped, (size_t)size), close(fd);
        start = now(), dlt_xxh3_128(bytes, (size_t)size, digest), taken[CHECKSUM] = now() - start;
        for (int i = 0; i < FIGURES; i++) least[i] = taken[i] < least[i] ? taken[i] : least[i];
    }
    printf("{\"bytes\": %llu", (unsigned long long)size);
    for (int i = 0; i < FIGURES; i++) printf(", \"%s\": %.9f", names[i], least[i]);
    puts("}");
    fclose(stream);
    free(bytes);
    return 0;
}
