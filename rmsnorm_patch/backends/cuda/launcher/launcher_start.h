/* A loaded kernel with its launch constants, and starting it. */
#pragma once
#include "launcher_abi.h"

/* `struct Args` of kernels/cuda/abi.cuh. */
typedef struct {
    uint64_t x, residual, weight, normed, total;
    i64 m, x_row_stride, residual_row_stride, normed_row_stride, total_row_stride;
    i64 inner_rows, x_outer_stride, residual_outer_stride;
    uint64_t x2, weight2, normed2;
    i64 m2, x2_row_stride, normed2_row_stride, inner_rows2, x2_outer_stride;
    float eps;
} Args;

typedef struct Kernel {
    void *function, *context;
    i64 n, m_max, rows_per_cta;
    unsigned cluster, threads;
    int dependent; /* launched with programmatic stream serialization */
    uint64_t mask, weight_mask;
    struct Kernel *next; /* the kernel for more than m_max rows; same reduction tree */
} Kernel;

#define TOO_MANY_ROWS 1000001

static int start(const Kernel *kernel, void *stream, Args *args) {
    i64 groups = (args->m + args->m2 + kernel->rows_per_cta - 1) / kernel->rows_per_cta;
    if (args->m2) /* a CTA of a pair kernel works on one of its two problems only */
        groups = (args->m + kernel->rows_per_cta - 1) / kernel->rows_per_cta +
                 (args->m2 + kernel->rows_per_cta - 1) / kernel->rows_per_cta;
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
    void *parameters[] = {args};
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

/* new_kernel(function, context, n, m_max, rows_per_cta, cluster, threads, dependent, align, weight_align,
 *            next) -> address. Lives as long as the process, as its module does. */
static PyObject *new_kernel(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 11) {
        PyErr_SetString(PyExc_TypeError, "new_kernel takes 11 integers");
        return 0;
    }
    uint64_t v[11];
    for (int i = 0; i < 11; i++)
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
    return PyLong_FromUnsignedLongLong((uint64_t)(uintptr_t)kernel);
}

/* launch(kernel, stream, eps, x, residual, weight, normed, total, m[, x_row_stride, residual_row_stride,
 *        normed_row_stride, total_row_stride[, inner_rows, x_outer_stride, residual_outer_stride[, x2, weight2,
 * normed2, m2, x2_row_stride, normed2_row_stride, inner_rows2, x2_outer_stride]]]) -> CUresult */
static PyObject *launch(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Args args;
    memset(&args, 0, sizeof args);
    if (count < 9 || count > 3 + 21) {
        PyErr_SetString(PyExc_TypeError, "launch takes 9 to 24 arguments");
        return 0;
    }
    Kernel *kernel = (Kernel *)PyLong_AsUnsignedLongLong(a[0]);
    void *stream = (void *)PyLong_AsUnsignedLongLong(a[1]);
    args.eps = (float)PyFloat_AsDouble(a[2]);
    uint64_t *fields = (uint64_t *)&args;
    for (Py_ssize_t i = 3; i < count; i++)
        fields[i - 3] = PyLong_AsUnsignedLongLong(a[i]);
    if (PyErr_Occurred())
        return 0;
    if (count == 9)
        args.x_row_stride = args.residual_row_stride = args.normed_row_stride = args.total_row_stride = kernel->n;
    return PyLong_FromLongLong(start(kernel, stream, &args));
}
