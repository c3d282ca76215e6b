/* Arguments of a function of deltafmt._core: taken one after the other, checked, and given back. */
#include "call.h"

#include <stdlib.h>

static PyObject *argument(struct call *call) {
    if (call->wrong) return NULL;
    if (call->next < call->count) return call->arguments[call->next++];
    PyErr_Format(PyExc_TypeError, "%s: too few arguments", call->name);
    call->wrong = 1;
    return NULL;
}

static void refuse(struct call *call, const char *why) {
    if (!call->wrong) PyErr_Format(PyExc_ValueError, "%s: argument %zd: %s", call->name, call->next, why);
    call->wrong = 1;
}

/* Checks what a sentence claims about the arguments. */
void require(struct call *call, int holds, const char *claim) {
    if (call->wrong || holds) return;
    PyErr_Format(PyExc_ValueError, "%s: it is not so that %s", call->name, claim);
    call->wrong = 1;
}

static const Py_buffer NO_ARRAY;

static const Py_buffer *taken(struct call *call, const char *formats, int rank, int flags) {
    PyObject *object = argument(call);
    if (!object) return &NO_ARRAY;
    Py_buffer *view = &call->arrays[call->held];
    if (call->held == MAX_ARRAYS || PyObject_GetBuffer(object, view, flags | PyBUF_FORMAT)) {
        call->wrong = 1;
        return &NO_ARRAY;
    }
    call->held++;
    char format = view->format ? view->format[0] : 'B';
    if (format == 'Q') format = 'L';
    if (format == 'q') format = 'l';
    if (!strchr(formats, format) || (view->format && view->format[1])) refuse(call, "another dtype");
    if (view->ndim != rank) refuse(call, "another number of dimensions");
    if (view->len && (uintptr_t)view->buf % (size_t)view->itemsize) refuse(call, "not aligned");
    return call->wrong ? &NO_ARRAY : view;
}

/* An array in C order with one of the formats: B uint8, ? bool, H uint16, I uint32, L uint64, l int64, i int32, f float32. */
const Py_buffer *array(struct call *call, const char *formats, int rank, int writable) {
    return taken(call, formats, rank, PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0));
}

/* Rows of bytes, and how far they are apart. */
const Py_buffer *rows(struct call *call, int writable, size_t *stride) {
    const Py_buffer *view = taken(call, "B", 2, PyBUF_STRIDES | (writable ? PyBUF_WRITABLE : 0));
    *stride = extent(view, 1);
    if (call->wrong || !view->len) return view;
    if (view->shape[1] > 1 && view->strides[1] != 1) refuse(call, "rows are not in one piece");
    if (view->shape[0] > 1 && view->strides[0] < view->shape[1]) refuse(call, "rows lie in one another");
    if (view->shape[0] > 1) *stride = (size_t)view->strides[0];
    return call->wrong ? &NO_ARRAY : view;
}

size_t extent(const Py_buffer *view, int dimension) { return view->shape ? (size_t)view->shape[dimension] : 0; }

uint64_t number(struct call *call, uint64_t least, uint64_t most) {
    PyObject *object = argument(call);
    if (!object) return least;
    PyObject *index = PyNumber_Index(object);
    uint64_t value = index ? PyLong_AsUnsignedLongLong(index) : least;
    Py_XDECREF(index);
    if (PyErr_Occurred()) {
        if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
            PyErr_Clear();
            refuse(call, "out of range");
        }
        call->wrong = 1;
        return least;
    }
    if (value < least || value > most) refuse(call, "out of range");
    return call->wrong ? least : value;
}

float real(struct call *call) {
    PyObject *object = argument(call);
    double value = object ? PyFloat_AsDouble(object) : 0;
    if (PyErr_Occurred()) call->wrong = 1;
    return (float)value;
}

enum dtype dtype(struct call *call) {
    PyObject *object = argument(call);
    if (!object) return F32;
    if (PyUnicode_Check(object)) {
        if (!PyUnicode_CompareWithASCIIString(object, "BF16")) return BF16;
        if (!PyUnicode_CompareWithASCIIString(object, "F16")) return F16;
        if (!PyUnicode_CompareWithASCIIString(object, "F32")) return F32;
    }
    refuse(call, "not BF16, F16 or F32");
    return F32;
}

/* A raw array and its dtype. */
const void *raw(struct call *call, int rank, int writable, enum dtype *found, const Py_buffer **view) {
    *view = array(call, "HI", rank, writable);
    *found = dtype(call);
    require(call, (size_t)(*view)->itemsize == (*found == F32 ? 4u : 2u), "a raw array has elements of its dtype's size");
    return (*view)->buf;
}

/* Gives everything back and returns the result, or NULL where an argument was wrong. */
PyObject *finish(struct call *call, PyObject *(*result)(long), long value) {
    while (call->held) PyBuffer_Release(&call->arrays[--call->held]);
    if (call->wrong) return NULL;
    return result(value);
}

PyObject *nothing(long value) {
    (void)value;
    return Py_NewRef(Py_None);
}

void begin(struct call *call) {
    if (!call->wrong && call->next < call->count) {
        PyErr_Format(PyExc_TypeError, "%s: too many arguments", call->name);
        call->wrong = 1;
    }
}

void *scratch_of(struct call *call, size_t bytes) {
    if (call->wrong) return NULL;
    void *scratch = malloc(bytes + 64);
    if (!scratch) {
        PyErr_NoMemory();
        call->wrong = 1;
    }
    return scratch;
}
