/* The upload loop of one thread, which needs neither the interpreter nor its lock.
 *
 * The CUDA driver is looked up when it is first needed, so that nothing is linked against it. */
#define _GNU_SOURCE
#include "upload.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

typedef int (*bind_function)(void *context);
typedef int (*copy_function)(uint64_t device, const void *host, size_t bytes, void *stream);
typedef int (*record_function)(void *event, void *stream);
typedef int (*wait_function)(void *event);
typedef ssize_t (*read_function)(int file, void *buffer, size_t bytes, off_t offset);

/* Declares a function by its address. ISO C has no cast from data to a function, so the bits are copied. */
#define FUNCTION_AT(type, function, address) \
    type function;                           \
    memcpy(&function, &(address), sizeof function)

static uint64_t symbol(void *library, const char *name) { return library ? (uint64_t)(uintptr_t)dlsym(library, name) : 0; }

int find_driver(struct upload_calls *calls) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    read_function reads = pread;
    memcpy(&calls->read, &reads, sizeof reads);
    calls->bind = symbol(library, "cuCtxSetCurrent");
    calls->copy = symbol(library, "cuMemcpyHtoDAsync_v2");
    calls->record = symbol(library, "cuEventRecord");
    calls->wait = symbol(library, "cuEventSynchronize");
    return calls->bind && calls->copy && calls->record && calls->wait;
}

uint64_t find_launcher(void) { return symbol(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), "cuLaunchKernel"); }

static void *handle(uint64_t bits) { return (void *)(uintptr_t)bits; }

int run_launch(uint64_t address, uint64_t function, const unsigned sizes[5], uint64_t stream, uint64_t *params,
               size_t count) {
    typedef int (*launch_function)(void *function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                   unsigned shared, void *stream, void **params, void **extra);
    FUNCTION_AT(launch_function, launch, address);
    void *pointers[MAX_PARAMETERS];
    for (size_t i = 0; i < count; i++) pointers[i] = params + i;
    return launch(handle(function), sizes[0], sizes[1], sizes[2], sizes[3], 1, 1, sizes[4], handle(stream), pointers,
                  NULL);
}

uint64_t current_context(void) {
    typedef int (*current_function)(void **context);
    uint64_t address = symbol(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), "cuCtxGetCurrent");
    void *context = NULL;
    if (!address) return 0;
    FUNCTION_AT(current_function, get_current, address);
    return get_current(&context) ? 0 : (uint64_t)(uintptr_t)context;
}

static int inside(int64_t start, int64_t length, size_t bytes) {
    return start >= 0 && length >= 0 && (uint64_t)start <= bytes && (uint64_t)length <= bytes - (uint64_t)start;
}

static int is_range(int64_t first, int64_t last, size_t count) { return 0 <= first && first <= last && (uint64_t)last <= count; }

int upload_fits(const struct upload *job, size_t ring_bytes, size_t copies, size_t paddings) {
    for (size_t p = job->first; p < job->count; p += job->step) {
        const int64_t *piece = job->pieces + p * 6;
        if (!is_range(piece[2], piece[3], copies) || !is_range(piece[4], piece[5], paddings)) return 0;
        if (piece[0] < 0 || !inside(job->slots[p / job->step % job->slot_count], piece[1], ring_bytes)) return 0;
        for (int64_t row = piece[2]; row < piece[3]; row++)
            if (!inside(job->copies[row * 3], job->copies[row * 3 + 2], (size_t)piece[1])) return 0;
        for (int64_t row = piece[4]; row < piece[5]; row++)
            if (!inside(job->paddings[row * 3], job->paddings[row * 3 + 1], (size_t)piece[1])) return 0;
    }
    return 1;
}

/* Reads a piece into its slot; returns 0 where the file ends early or reading fails. */
static int read_piece(const struct upload *job, const int64_t *piece, uint8_t *slot) {
    FUNCTION_AT(read_function, reads, job->calls.read);
    int64_t done = 0;
    while (done < piece[1]) {
        ssize_t count = reads(job->file, slot + done, (size_t)(piece[1] - done), (off_t)(piece[0] + done));
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return 0;
        done += count;
    }
    return 1;
}

static int is_zero(const uint8_t *bytes, int64_t count) {
    uint8_t any = 0;
    for (int64_t i = 0; i < count; i++) any |= bytes[i];
    return !any;
}

#define ENDS(what, why)                        \
    do {                                       \
        job->outcome = (what);                 \
        job->detail = (uint64_t)(why);         \
        return;                                \
    } while (0)

#define DRIVER_CALL(expression)                          \
    do {                                                 \
        int error = (expression);                        \
        if (error) ENDS(UPLOAD_DRIVER, (unsigned)error); \
    } while (0)

void run_upload(struct upload *job) {
    FUNCTION_AT(bind_function, bind_context, job->calls.bind);
    FUNCTION_AT(copy_function, copy, job->calls.copy);
    FUNCTION_AT(record_function, record, job->calls.record);
    FUNCTION_AT(wait_function, wait_for, job->calls.wait);
    void *stream = handle(job->stream);
    job->piece = job->first;
    DRIVER_CALL(bind_context(handle(job->context)));
    for (size_t p = job->first; p < job->count; p += job->step) {
        job->piece = p;
        if (__atomic_load_n(job->stop, __ATOMIC_RELAXED)) ENDS(UPLOAD_STOPPED, 0);
        size_t number = p / job->step % job->slot_count;
        const int64_t *piece = job->pieces + p * 6;
        uint8_t *slot = job->ring + job->slots[number];
        void *event = handle((uint64_t)job->events[number]);
        if (!(job->is_read && p == job->first)) {
            DRIVER_CALL(wait_for(event));
            if (!read_piece(job, piece, slot)) ENDS(UPLOAD_NOT_READ, 0);
        }
        for (int64_t row = piece[4]; row < piece[5]; row++)
            if (!is_zero(slot + job->paddings[row * 3], job->paddings[row * 3 + 1])) ENDS(UPLOAD_PADDING, row);
        for (int64_t row = piece[2]; row < piece[3]; row++) {
            const int64_t *part = job->copies + row * 3;
            DRIVER_CALL(copy((uint64_t)part[1], slot + part[0], (size_t)part[2], stream));
        }
        DRIVER_CALL(record(event, stream));
    }
    job->piece = job->first;
    ENDS(UPLOAD_DONE, 0);
}
