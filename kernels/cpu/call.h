/* How the functions of deltafmt._core take their arguments.
 *
 * Arguments are taken one after the other. After the first that is wrong, an exception is set and every other one counts
 * as wrong too: arrays are then empty and numbers the least that is allowed, so that a function looks once, at its end.
 */
#ifndef DELTAFMT_CALL_H
#define DELTAFMT_CALL_H

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "core.h"

enum { MAX_ARRAYS = 10 };

struct call {
    const char *name;
    PyObject *const *arguments;
    Py_ssize_t count, next;
    Py_buffer arrays[MAX_ARRAYS];
    int held, wrong;
};

/* Takes an array in C order with one of the formats: B uint8, ? bool, H uint16, I uint32, L uint64, l int64, i int32,
 * f float32. */
const Py_buffer *array(struct call *call, const char *formats, int rank, int writable);
/* Takes rows of uint8, each of which lies in one piece, and says how far they are apart. */
const Py_buffer *rows(struct call *call, int writable, size_t *stride);
size_t extent(const Py_buffer *view, int dimension);

/* Takes a raw array, and the name of its dtype: BF16, F16 or F32. */
const void *raw(struct call *call, int rank, int writable, enum dtype *found, const Py_buffer **view);

uint64_t number(struct call *call, uint64_t least, uint64_t most);
float real(struct call *call);
enum dtype dtype(struct call *call);

/* Checks what a sentence claims about the arguments. */
void require(struct call *call, int holds, const char *claim);

/* Returns memory for a loop, to be freed; NULL after a wrong argument. */
void *scratch_of(struct call *call, size_t bytes);

/* Ends the arguments: one too many is wrong. */
void begin(struct call *call);

/* Gives the arrays back and returns the result, or NULL after a wrong argument. */
PyObject *finish(struct call *call, PyObject *(*result)(long), long value);
PyObject *nothing(long value);

/* Runs a statement without the interpreter's lock, unless an argument was wrong. */
#define RUN(call, ...)               \
    do {                             \
        begin(call);                 \
        if (!(call)->wrong) {        \
            Py_BEGIN_ALLOW_THREADS;  \
            __VA_ARGS__;             \
            Py_END_ALLOW_THREADS;    \
        }                            \
    } while (0)

#endif
