/* One thread's share of an upload: read, check the padding, copy to the device (deltafmt/runtime/unlocked.py). */
#ifndef DELTAFMT_UPLOAD_H
#define DELTAFMT_UPLOAD_H

#include <stddef.h>
#include <stdint.h>

/* Addresses of the functions that the loop calls.
 *
 * read: pread. bind: cuCtxSetCurrent. copy: cuMemcpyHtoDAsync. record: cuEventRecord. wait: cuEventSynchronize. */
struct upload_calls {
    uint64_t read, bind, copy, record, wait;
};

enum upload_outcome { UPLOAD_DONE, UPLOAD_STOPPED, UPLOAD_NOT_READ, UPLOAD_PADDING, UPLOAD_DRIVER };

struct upload {
    const int64_t *pieces;   /* (count, 6): offset in the file, length, and the ranges of its rows in the next two */
    const int64_t *copies;   /* (copies, 3): place in the piece, device address, length */
    const int64_t *paddings; /* (paddings, 3): place in the piece, length, section */
    size_t count, first, step;
    int is_read;          /* whether the first piece already lies in its slot */
    uint8_t *ring;        /* all slots */
    const int64_t *slots; /* where this thread's slots begin; a piece goes to that of its number in the thread */
    const int64_t *events;
    size_t slot_count;
    int file;
    uint64_t context, stream;
    struct upload_calls calls;
    const int64_t *stop; /* other than 0 once an error has come up elsewhere */
    enum upload_outcome outcome;
    size_t piece;    /* the piece at which the outcome came */
    uint64_t detail; /* the row of the padding, or the driver's error */
};

/* Finds the functions of the CUDA driver; returns 0 where there is none. */
int find_driver(struct upload_calls *calls);

/* Returns the address of cuLaunchKernel, or 0. */
uint64_t find_launcher(void);

enum { MAX_PARAMETERS = 128, MAX_ADDRESSES = 64, JOB_FIELDS = 8 };

/* Launches a kernel: grid, threads and bytes of shared memory in `sizes`, eight bytes a parameter. */
int run_launch(uint64_t address, uint64_t function, const unsigned sizes[5], uint64_t stream, uint64_t *params,
               size_t count);

/* Returns the CUDA context of this thread, or 0. */
uint64_t current_context(void);

/* Tells whether every piece and all that is in it lies inside the ring. */
int upload_fits(const struct upload *job, size_t ring_bytes, size_t copies, size_t paddings);

void run_upload(struct upload *job);

#endif
