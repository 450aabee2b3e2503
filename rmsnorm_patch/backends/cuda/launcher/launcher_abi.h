/* The parts of Python's stable ABI and of the CUDA driver that the launcher uses, declared by hand so that no header of
 * either is needed. */
#pragma once
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef intptr_t Py_ssize_t;
typedef struct _object PyObject;
typedef PyObject *(*PyCFunction)(PyObject *, PyObject *);
typedef struct {
    const char *name;
    PyCFunction function;
    int flags;
    const char *doc;
} PyMethodDef;
#define METH_FASTCALL 0x0080
#define Py_EQ 2

extern PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *, PyObject *);
extern PyObject *PyCapsule_New(void *, const char *, void (*)(PyObject *));
extern void *PyCapsule_GetPointer(PyObject *, const char *);
extern PyObject *PyTuple_New(Py_ssize_t);
extern int PyTuple_SetItem(PyObject *, Py_ssize_t, PyObject *);
extern PyObject *PyTuple_GetItem(PyObject *, Py_ssize_t);
extern Py_ssize_t PyTuple_Size(PyObject *);
extern PyObject *PyLong_FromLongLong(long long);
extern PyObject *PyLong_FromUnsignedLongLong(unsigned long long);
extern long long PyLong_AsLongLong(PyObject *);
extern unsigned long long PyLong_AsUnsignedLongLong(PyObject *);
extern double PyFloat_AsDouble(PyObject *);
extern PyObject *PyUnicode_InternFromString(const char *);
extern int PyUnicode_CompareWithASCIIString(PyObject *, const char *);
extern int PyBytes_AsStringAndSize(PyObject *, char **, Py_ssize_t *);
extern PyObject *PyObject_GetAttr(PyObject *, PyObject *);
extern PyObject *PyObject_CallMethodObjArgs(PyObject *, PyObject *, ...);
extern PyObject *PyObject_CallFunctionObjArgs(PyObject *, ...);
extern PyObject *PyObject_CallObject(PyObject *, PyObject *);
extern PyObject *PyObject_CallNoArgs(PyObject *);
extern PyObject *PyObject_GenericGetDict(PyObject *, void *);
extern int PyObject_SetAttr(PyObject *, PyObject *, PyObject *);
extern PyObject *PyDict_GetItem(PyObject *, PyObject *);
extern int PyDict_DelItem(PyObject *, PyObject *);
extern Py_ssize_t PyDict_Size(PyObject *);
extern PyObject *PyObject_Type(PyObject *);
extern int PyObject_RichCompareBool(PyObject *, PyObject *, int);
extern int PyObject_IsTrue(PyObject *);
extern PyObject *PyErr_Occurred(void);
extern void PyErr_Clear(void);
extern void PyErr_SetString(PyObject *, const char *);
extern PyObject *PyExc_TypeError;
extern void Py_IncRef(PyObject *);
extern void Py_DecRef(PyObject *);
extern PyObject _Py_NoneStruct, _Py_FalseStruct, _Py_TrueStruct, PyFloat_Type;
extern void *PyEval_SaveThread(void);
extern void PyEval_RestoreThread(void *);
#define NONE ((PyObject *)&_Py_NoneStruct)

static PyObject *own(PyObject *object) {
    if (object)
        Py_IncRef(object);
    return object;
}

static PyObject *attribute(PyObject *object, const char *text) {
    PyObject *name = PyUnicode_InternFromString(text), *value = name ? PyObject_GetAttr(object, name) : 0;
    if (name)
        Py_DecRef(name);
    return value;
}

static int is_attribute(PyObject *object, PyObject *name, PyObject *expected) {
    PyObject *value = PyObject_GetAttr(object, name);
    if (!value)
        return 0;
    Py_DecRef(value);
    return value == expected;
}

static int is_true_call(PyObject *function) {
    PyObject *value = PyObject_CallNoArgs(function);
    if (!value)
        return -1;
    int result = PyObject_IsTrue(value);
    Py_DecRef(value);
    return result;
}

/* The driver's launch structures (cuda.h); each attribute is 8 bytes of header and a 64-byte value. */
typedef struct {
    int id;
    char pad[4];
    union {
        char bytes[64];
        struct {
            unsigned x, y, z;
        } cluster;
        int flag;
    } value;
} LaunchAttribute;
typedef struct {
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void *stream;
    LaunchAttribute *attributes;
    unsigned attribute_count;
} LaunchConfig;
enum { ATTRIBUTE_CLUSTER = 4, ATTRIBUTE_PROGRAMMATIC_SERIALIZATION = 6 };

static int (*cuLaunchKernelEx)(const LaunchConfig *, void *, void **, void **);
static int (*cuCtxGetCurrent)(void **);
static int (*cuCtxPushCurrent)(void *);
static int (*cuCtxPopCurrent)(void **);
