/* Asking a torch tensor what the launcher must know, by its Python methods; errors mean "not sure" to the caller. */
#pragma once
#include "launcher_abi.h"

enum { MAX_DIMS = 16 };

static PyObject *s_dtype, *s_shape, *s_get_device, *s_is_contiguous, *s_data_ptr, *s_stride;

static int is_type(PyObject *object, PyObject *a, PyObject *b) {
    PyObject *type = PyObject_Type(object);
    int same = type == a || type == b;
    Py_DecRef(type);
    return same;
}

static int same_attribute(PyObject *object, PyObject *name, PyObject *expected) {
    PyObject *value = PyObject_GetAttr(object, name);
    if (!value)
        return 0;
    int same = value == expected;
    Py_DecRef(value);
    return same;
}

static int method_true(PyObject *object, PyObject *name) {
    PyObject *value = PyObject_CallMethodObjArgs(object, name, 0);
    if (!value)
        return 0;
    int result = PyObject_IsTrue(value);
    Py_DecRef(value);
    return result == 1;
}

static int method_integer(PyObject *object, PyObject *name, uint64_t *result) {
    PyObject *value = PyObject_CallMethodObjArgs(object, name, 0);
    if (!value)
        return 0;
    *result = (uint64_t)PyLong_AsLongLong(value);
    if (*result == (uint64_t)-1 && PyErr_Occurred()) {
        PyErr_Clear();
        *result = PyLong_AsUnsignedLongLong(value);
    }
    Py_DecRef(value);
    return 1;
}

static int on_device(PyObject *tensor, i64 device) {
    uint64_t value;
    return method_integer(tensor, s_get_device, &value) && (i64)value == device;
}

static int overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

/* Where the rows of a tensor lie: row r at (r / inner) * outer + (r % inner) * stride; inner == 0: one level. */
typedef struct {
    i64 stride, inner, outer;
} Rows;

/* The rows of a tensor that is not contiguous; 0 where no kernel can address them. */
static int strided_rows(PyObject *tensor, const i64 *sizes, Py_ssize_t dims, Rows *rows) {
    PyObject *strides = PyObject_CallMethodObjArgs(tensor, s_stride, 0);
    if (!strides)
        return 0;
    i64 size[2] = {1, 1}, stride[2] = {0, 0}; /* levels from the innermost, after merging what lies evenly */
    int levels = 0, addressable = 1;
    for (Py_ssize_t d = dims - 1; d >= 0 && addressable; d--) {
        i64 step = PyLong_AsLongLong(PyTuple_GetItem(strides, d));
        if (d == dims - 1)
            addressable = step == 1 || sizes[d] == 1;
        else if (sizes[d] == 1)
            continue;
        else if (levels && step == size[levels - 1] * stride[levels - 1])
            size[levels - 1] *= sizes[d];
        else if (levels < 2 && (levels == 0 || step != 0)) {
            size[levels] = sizes[d];
            stride[levels++] = step;
        } else
            addressable = 0;
    }
    Py_DecRef(strides);
    rows->stride = levels ? stride[0] : sizes[dims - 1];
    rows->inner = levels == 2 ? size[0] : 0;
    rows->outer = stride[1];
    return addressable;
}
