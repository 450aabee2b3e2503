/* A loaded kernel with its launch constants, and starting it. What its arguments mean is not known here: they are
 * bytes, which Python made, or which `plain_arguments` puts together from the values of a plain call. */
#pragma once
#include "launcher_abi.h"

/* What a plain call knows, by the names that kernels/cuda/plain_ops.cuh, rms_norm_add.cu and
 * rms_norm_rotated.cu give the fields. */
typedef struct {
    uint64_t x, residual, weight, normed, total;
    i64 m, x_row_stride, residual_row_stride, normed_row_stride, total_row_stride;
    i64 inner_rows, x_outer_stride, residual_outer_stride;
    /* The second set of rows of a kernel that takes two; m2 is 0 for any other. */
    uint64_t x2, weight2, normed2;
    i64 m2, x2_row_stride, normed2_row_stride, inner_rows2, x2_outer_stride;
    float eps, next_eps;
    uint64_t next_weight;
    uint64_t cos, sin;
    i64 angles;
} Values;

#define VALUE(name) {#name, offsetof(Values, name), sizeof(((Values *)0)->name)}
static const struct {
    const char *name;
    size_t offset, size;
} known_values[] = {VALUE(x),
                    VALUE(residual),
                    VALUE(weight),
                    VALUE(normed),
                    VALUE(total),
                    VALUE(m),
                    VALUE(x_row_stride),
                    VALUE(residual_row_stride),
                    VALUE(normed_row_stride),
                    VALUE(total_row_stride),
                    VALUE(inner_rows),
                    VALUE(x_outer_stride),
                    VALUE(residual_outer_stride),
                    VALUE(x2),
                    VALUE(weight2),
                    VALUE(normed2),
                    VALUE(m2),
                    VALUE(x2_row_stride),
                    VALUE(normed2_row_stride),
                    VALUE(inner_rows2),
                    VALUE(x2_outer_stride),
                    VALUE(eps),
                    VALUE(next_eps),
                    VALUE(next_weight),
                    VALUE(cos),
                    VALUE(sin),
                    VALUE(angles)};
enum { KNOWN_VALUES = sizeof known_values / sizeof *known_values, MAX_PLAIN_BYTES = KNOWN_VALUES * 8 };

/* `size` bytes of Values that go to the arguments as they lie. */
typedef struct {
    size_t to, from, size;
} Run;

typedef struct Kernel {
    void *function, *context;
    i64 n, m_max, rows_per_cta;
    unsigned cluster, threads;
    int dependent; /* launched with programmatic stream serialization */
    uint64_t mask, weight_mask;
    struct Kernel *next; /* the kernel for more than m_max rows; same reduction tree */
    size_t argument_bytes;
    int plain; /* its arguments are made of a plain call's values, by `runs` */
    int run_count;
    Run runs[KNOWN_VALUES];
} Kernel;

#define TOO_MANY_ROWS 1000001

static int start(const Kernel *kernel, void *stream, i64 groups, void *arguments) {
    if (groups == 0)
        return 0;
    if (groups * kernel->cluster > 2147483647LL)
        return TOO_MANY_ROWS;
    LaunchAttribute attributes[2];
    LaunchConfig config = {(unsigned)groups * kernel->cluster, 1, 1, kernel->threads, 1, 1, 0, stream, attributes, 0};
    if (kernel->cluster > 1) {
        LaunchAttribute *attribute = &attributes[config.attribute_count++];
        attribute->id = ATTRIBUTE_CLUSTER;
        attribute->value.cluster.x = kernel->cluster;
        attribute->value.cluster.y = attribute->value.cluster.z = 1;
    }
    if (kernel->dependent) {
        LaunchAttribute *attribute = &attributes[config.attribute_count++];
        attribute->id = ATTRIBUTE_PROGRAMMATIC_SERIALIZATION;
        attribute->value.flag = 1;
    }
    void *parameters[] = {arguments};
    void *current = 0;
    cuCtxGetCurrent(&current);
    int pushed = current != kernel->context;
    if (pushed) { /* another device is current, or this thread has not used CUDA yet */
        int error = cuCtxPushCurrent(kernel->context);
        if (error)
            return error;
    }
    /* A full queue blocks; a host callback in it may need the interpreter. */
    void *thread = PyEval_SaveThread();
    int error = cuLaunchKernelEx(&config, kernel->function, parameters, 0);
    PyEval_RestoreThread(thread);
    if (pushed)
        cuCtxPopCurrent(&current);
    return error;
}

/* Starts a `plain` kernel on the values of a call. */
static int start_plain(const Kernel *kernel, void *stream, const Values *values) {
    uint64_t arguments[KNOWN_VALUES];
    for (int i = 0; i < kernel->run_count; i++) {
        const Run *run = &kernel->runs[i];
        memcpy((char *)arguments + run->to, (const char *)values + run->from, run->size);
    }
    const i64 each = kernel->rows_per_cta;
    return start(kernel, stream, (values->m + each - 1) / each + (values->m2 + each - 1) / each, arguments);
}

/* Where each field of the kernel's `struct Args` comes from; `plain` where all are known. Fields that lie as in Values
 * are one run: one copy where a kernel keeps the order. arguments: an arguments.Arguments. */
static void find_values(Kernel *kernel, PyObject *arguments) {
    PyObject *bytes = attribute(arguments, "size"), *fields = attribute(arguments, "fields");
    kernel->argument_bytes = bytes ? (size_t)PyLong_AsLongLong(bytes) : 0;
    const Py_ssize_t count = fields ? PyTuple_Size(fields) : 0;
    int known = 0;
    for (Py_ssize_t i = 0; i < count && known < KNOWN_VALUES; i++) {
        PyObject *field = PyTuple_GetItem(fields, i); /* (name, offset, size) */
        PyObject *name = PyTuple_GetItem(field, 0);
        const size_t to = (size_t)PyLong_AsLongLong(PyTuple_GetItem(field, 1));
        const size_t size = (size_t)PyLong_AsLongLong(PyTuple_GetItem(field, 2));
        known = 0;
        while (known < KNOWN_VALUES &&
               (PyUnicode_CompareWithASCIIString(name, known_values[known].name) || known_values[known].size != size))
            known++;
        if (known == KNOWN_VALUES)
            continue;
        const size_t from = known_values[known].offset;
        Run *last = kernel->run_count ? &kernel->runs[kernel->run_count - 1] : 0;
        if (last && last->to + last->size == to && last->from + last->size == from)
            last->size += size;
        else
            kernel->runs[kernel->run_count++] = (Run){to, from, size};
    }
    /* Names are different: there are no more known fields than known values. */
    kernel->plain = count > 0 && known < KNOWN_VALUES && kernel->argument_bytes <= MAX_PLAIN_BYTES;
    if (bytes)
        Py_DecRef(bytes);
    if (fields)
        Py_DecRef(fields);
}

/* new_kernel(function, context, n, m_max, rows_per_cta, cluster, threads, dependent, align, weight_align, next, bytes
 * of the arguments, their fields as (name, offset, size)) -> address. Lives as long as the process, as its module does.
 */
static PyObject *new_kernel(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    enum { INTEGERS = 11 };
    if (count != INTEGERS + 1) {
        PyErr_SetString(PyExc_TypeError, "new_kernel takes 11 integers and the arguments");
        return 0;
    }
    uint64_t v[INTEGERS];
    for (int i = 0; i < INTEGERS; i++)
        v[i] = PyLong_AsUnsignedLongLong(a[i]);
    if (PyErr_Occurred())
        return 0;
    Kernel *kernel = calloc(1, sizeof *kernel);
    kernel->function = (void *)v[0];
    kernel->context = (void *)v[1];
    kernel->n = (i64)v[2];
    kernel->m_max = (i64)v[3];
    kernel->rows_per_cta = (i64)v[4];
    kernel->cluster = (unsigned)v[5];
    kernel->threads = (unsigned)v[6];
    kernel->dependent = (int)v[7];
    kernel->mask = v[8] - 1;
    kernel->weight_mask = v[9] - 1;
    kernel->next = (Kernel *)v[10];
    find_values(kernel, a[INTEGERS]);
    if (PyErr_Occurred()) {
        free(kernel);
        return 0;
    }
    return PyLong_FromUnsignedLongLong((uint64_t)(uintptr_t)kernel);
}

/* launch(kernel, stream, groups of rows_per_cta rows, arguments as bytes) -> CUresult */
static PyObject *launch(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "launch takes 4 arguments");
        return 0;
    }
    Kernel *kernel = (Kernel *)PyLong_AsUnsignedLongLong(a[0]);
    void *stream = (void *)PyLong_AsUnsignedLongLong(a[1]);
    const i64 groups = PyLong_AsLongLong(a[2]);
    char *arguments = 0;
    Py_ssize_t size = 0;
    if (PyErr_Occurred() || PyBytes_AsStringAndSize(a[3], &arguments, &size))
        return 0;
    if ((size_t)size != kernel->argument_bytes) {
        PyErr_SetString(PyExc_TypeError, "the kernel's arguments have another size");
        return 0;
    }
    return PyLong_FromLongLong(start(kernel, stream, groups, arguments));
}
