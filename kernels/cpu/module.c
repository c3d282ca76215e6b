/* deltafmt._core: the compiled loops as functions of arrays.
 *
 * Every function checks the dtype, the shape and the alignment of every array, and every number, before a loop sees a
 * pointer, and lets other threads run while the loop does. Results are written into arrays that the caller gives. The
 * functions are called by the Python functions that stand beside the references.
 */
#include "functions.h"
#include "upload.h"

/* Returns the addresses that `upload` calls, or None where there is no CUDA driver. */
static PyObject *driver(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    struct upload_calls calls;
    if (!find_driver(&calls)) return Py_NewRef(Py_None);
    return Py_BuildValue("KKKKK", calls.read, calls.bind, calls.copy, calls.record, calls.wait);
}

/* Returns the address of the driver's function that launches a kernel, 0 where there is no CUDA driver. */
static PyObject *launcher(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    return PyLong_FromUnsignedLongLong(find_launcher());
}

/* Launches a kernel; returns the driver's error, 0 for none. The job is the driver's function, the kernel, the grid in
 * three dimensions, threads, bytes of shared memory and the number of places; then, for each place, the number of a
 * parameter and that of the address that it gets; then the parameters. A parameter has eight bytes, of which a kernel
 * reads as many as it has declared. The job is followed by the stream and the addresses. */
static PyObject *launch(struct call *call) {
    const Py_buffer *job = array(call, "L", 1, 0);
    uint64_t stream = number(call, 0, UINT64_MAX), addresses[MAX_ADDRESSES], params[MAX_PARAMETERS];
    size_t given = 0;
    while (!call->wrong && call->next < call->count && given < MAX_ADDRESSES)
        addresses[given++] = number(call, 0, UINT64_MAX);
    const uint64_t *fields = job->buf;
    size_t length = extent(job, 0), places = length < JOB_FIELDS ? 0 : fields[7];
    require(call, length > JOB_FIELDS && places <= (length - JOB_FIELDS) / 2, "a job has 8 fields, places and parameters");
    size_t count = length - JOB_FIELDS - 2 * places;
    require(call, count >= 1 && count <= MAX_PARAMETERS, "a kernel has 1 to 128 parameters");
    if (call->wrong) return finish(call, nothing, 0);
    require(call, fields[0] && fields[1], "no address is 0");
    unsigned sizes[5];
    for (int i = 0; i < 5; i++) {
        require(call, fields[2 + i] >= (i < 4) && fields[2 + i] <= INT32_MAX, "sizes are positive");
        sizes[i] = (unsigned)fields[2 + i];
    }
    memcpy(params, fields + JOB_FIELDS + 2 * places, count * sizeof *params);
    for (size_t i = 0; i < places && !call->wrong; i++) {
        const uint64_t *place = fields + JOB_FIELDS + 2 * i;
        require(call, place[0] < count && place[1] < given, "a place is that of a parameter and of an address");
        if (!call->wrong) params[place[0]] = addresses[place[1]];
    }
    int error = 0;
    RUN(call, error = run_launch(fields[0], fields[1], sizes, stream, params, count));
    return finish(call, PyLong_FromLong, error);
}

/* Returns the CUDA context of this thread, 0 for none. */
static PyObject *context(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    return PyLong_FromUnsignedLongLong(current_context());
}

static PyObject *upload(struct call *call) {
    struct upload job = {0};
    const Py_buffer *pieces = array(call, "l", 2, 0), *copies = array(call, "l", 2, 0), *paddings = array(call, "l", 2, 0);
    job.first = number(call, 0, INT64_MAX);
    job.step = number(call, 1, INT32_MAX);
    job.is_read = (int)number(call, 0, 1);
    const Py_buffer *ring = array(call, "B", 1, 1), *slots = array(call, "l", 1, 0), *events = array(call, "l", 1, 0);
    job.file = (int)number(call, 0, INT32_MAX);
    job.context = number(call, 0, UINT64_MAX);
    job.stream = number(call, 0, UINT64_MAX);
    const Py_buffer *calls = array(call, "l", 1, 0), *stop = array(call, "l", 1, 1);
    job.pieces = pieces->buf;
    job.copies = copies->buf;
    job.paddings = paddings->buf;
    job.count = extent(pieces, 0);
    job.ring = ring->buf;
    job.slots = slots->buf;
    job.events = events->buf;
    job.slot_count = extent(slots, 0);
    job.stop = stop->buf;
    require(call, extent(pieces, 1) == 6 && extent(copies, 1) == 3 && extent(paddings, 1) == 3, "rows have 6, 3, 3 columns");
    require(call, job.slot_count >= 1 && extent(events, 0) == job.slot_count, "every slot has an event");
    require(call, extent(calls, 0) == 5 && extent(stop, 0) == 1, "there are 5 addresses and one flag");
    if (!call->wrong) {
        memcpy(&job.calls, calls->buf, sizeof job.calls);
        require(call, job.calls.read && job.calls.bind && job.calls.copy && job.calls.record && job.calls.wait,
                "no address is 0");
        require(call, upload_fits(&job, extent(ring, 0), extent(copies, 0), extent(paddings, 0)),
                "every piece fits its slot of the ring");
    }
    RUN(call, run_upload(&job));
    PyObject *result = finish(call, nothing, 0);
    if (!result) return NULL;
    Py_DecRef(result);
    return Py_BuildValue("iKK", job.outcome, (unsigned long long)job.piece, (unsigned long long)job.detail);
}

static const struct loops *level_by_name(PyObject *name) {
#if defined(__x86_64__)
    if (!PyUnicode_CompareWithASCIIString(name, loops_x86_64_v3.level)) {
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
            __builtin_cpu_supports("popcnt"))
            return &loops_x86_64_v3;
    }
#endif
    return PyUnicode_CompareWithASCIIString(name, loops_baseline.level) ? NULL : &loops_baseline;
}

/* Returns the name of the level in use. */
static PyObject *level(PyObject *module, PyObject *ignored) {
    (void)module, (void)ignored;
    return PyUnicode_FromString(loops->level);
}

/* Uses another level from now on; tells whether this processor has it. */
static PyObject *use(PyObject *module, PyObject *name) {
    (void)module;
    if (!PyUnicode_Check(name)) {
        PyErr_SetString(PyExc_TypeError, "use: the name of a level is a string");
        return NULL;
    }
    const struct loops *found = level_by_name(name);
    if (found) loops = found;
    return PyBool_FromLong(found != NULL);
}

#define FUNCTION(NAME)                                                                                     \
    static PyObject *call_##NAME(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {         \
        (void)module;                                                                                      \
        struct call call = {.name = #NAME, .arguments = arguments, .count = count};                        \
        return NAME(&call);                                                                                \
    }
LOOP_FUNCTIONS(FUNCTION)
FUNCTION(upload)
FUNCTION(launch)

#define METHOD(NAME) {#NAME, (PyCFunction)(void (*)(void))call_##NAME, METH_FASTCALL, NULL},

static PyMethodDef methods[] = {
    LOOP_FUNCTIONS(METHOD)
    METHOD(upload)
    METHOD(launch)
    {"launcher", launcher, METH_NOARGS, NULL},
    {"driver", driver, METH_NOARGS, NULL},
    {"context", context, METH_NOARGS, NULL},
    {"level", level, METH_NOARGS, NULL},
    {"use", use, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static int execute(PyObject *module) {
    (void)module;
    PyObject *best = PyUnicode_FromString("x86-64-v3");
    if (!best) return -1;
    const struct loops *found = level_by_name(best);
    if (found) loops = found;
    Py_DecRef(best);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, (void *)execute}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "deltafmt._core", "The compiled loops; see deltafmt/core.py.", 0, methods, module_slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
