/* Launches the kernels of kernels/cuda with little host work, and is the hot path of every eager call.
 *
 * Compiled once per user with the system's C compiler (launcher.py), without any header beyond the C library: only
 * functions of Python's stable ABI and of the CUDA driver are used, declared here, so that neither Python's nor CUDA's
 * headers are needed and one binary serves every Python from 3.10 on. Loaded by ctypes; `rp_functions` returns its
 * Python functions.
 *
 * new_kernel(...) -> address of a Kernel; launch(kernel, ...) starts one on arguments that are bytes to it, so that an
 * op whose host side is Python needs nothing here; make_callable(op, has_weight, slow, torch...) returns a plain op
 * itself: it takes tensors, checks what must be checked in every call, allocates the results and launches the kernel
 * that add_row_kind registered for rows of this kind: their dtype, the weight's, N and the device. Whatever it is not
 * sure of goes to `slow`. launcher_pair.h has what a patched model's layers call, launcher_query_key.h what its
 * attentions do: TWO_NORMS and ROTATED have tables for it.
 */
#include "launcher_start.h"
#include "launcher_tensor.h"

enum { RMS_NORM, FUSED_ADD, FUSED_ADD_IN_PLACE, NORM_ADD, NORM_ADD_NORM, TWO_NORMS, ROTATED };
enum { MAX_ROW_KINDS = 64 };

/* Of the last allocation, which had `dims` dimensions of `sizes`. */
typedef struct {
    PyObject *size, *strides;
    int dims;
    i64 sizes[MAX_DIMS];
} Shape;

typedef struct {
    uint32_t x_code, weight_code; /* dtypes in DLPack's terms; 0: no weight */
    PyObject *dtype, *out_dtype;
    i64 n, device;
    i64 itemsize, weight_itemsize;
    double default_eps;
    Kernel *kernel, *two_level; /* two_level: for x [.., inner, N] whose leading dimensions cannot be merged */
    Shape shape, second;        /* second: of the second set of rows, where an op has two */
} RowKind;

typedef struct {
    int op, has_weight, device_type, count;
    PyObject *slow, *tensor_type, *parameter_type, *empty_strided, *bump;
    const Exchange *exchange;
    RowKind row_kinds[MAX_ROW_KINDS];
} Table;

/* A contiguous tensor's sizes and strides as tuples: what the allocator takes. */
static int remember_shape(Shape *shape, const i64 *sizes, int dims) {
    PyObject *size = PyTuple_New(dims), *strides = PyTuple_New(dims);
    if (!size || !strides)
        return 0;
    i64 stride = 1;
    for (int d = dims - 1; d >= 0; d--) {
        PyTuple_SetItem(size, d, PyLong_FromLongLong(sizes[d]));
        PyTuple_SetItem(strides, d, PyLong_FromLongLong(stride));
        stride *= sizes[d] > 1 ? sizes[d] : 1;
    }
    PyObject *old[2] = {shape->size, shape->strides};
    shape->size = size;
    shape->strides = strides;
    shape->dims = dims;
    memcpy(shape->sizes, sizes, (size_t)dims * sizeof *sizes);
    for (int i = 0; i < 2; i++)
        if (old[i])
            Py_DecRef(old[i]);
    return 1;
}

static PyObject *allocate(const Table *table, PyObject *size, PyObject *strides, PyObject *dtype, uint64_t *address) {
    Tensor made;
    PyObject *tensor = PyObject_CallFunctionObjArgs(table->empty_strided, size, strides, dtype, 0);
    if (tensor && table->exchange->look(tensor, &made)) {
        Py_DecRef(tensor);
        return 0;
    }
    if (tensor)
        *address = address_of(&made);
    return tensor;
}

/* Whether `shape` has the sizes of `x`, from now on at least; 0 with an error set. */
static int has_sizes_of(Shape *shape, const Tensor *x) {
    return (shape->size && same_sizes(x, shape->sizes, shape->dims)) || remember_shape(shape, x->sizes, x->dims);
}

/* A contiguous tensor of the sizes of `x`; `shape` remembers them. */
static PyObject *allocate_like(const Table *table, Shape *shape, const Tensor *x, PyObject *dtype, uint64_t *address) {
    if (!has_sizes_of(shape, x))
        return 0;
    PyObject *size = own(shape->size), *strides = own(shape->strides); /* allocating may run other threads' calls */
    PyObject *made = allocate(table, size, strides, dtype, address);
    Py_DecRef(size);
    Py_DecRef(strides);
    return made;
}

/* The kind of the rows of `x`, with a weight of this dtype; 0 where there is none, or another context. */
static RowKind *row_kind_for(Table *table, const Tensor *x, uint32_t weight_code) {
    RowKind *row_kind = 0;
    for (int i = 0; i < table->count && !row_kind; i++) {
        RowKind *candidate = &table->row_kinds[i];
        if (candidate->x_code == x->dtype && candidate->weight_code == weight_code &&
            candidate->n == x->sizes[x->dims - 1] && candidate->device == x->device)
            row_kind = candidate;
    }
    void *context = 0;
    cuCtxGetCurrent(&context);
    return row_kind && context == row_kind->kernel->context ? row_kind : 0;
}

/* Whether the tensor is a weight [n] for x, contiguous. */
static int is_weight(const Table *table, PyObject *object, i64 n, const Tensor *x, Tensor *weight) {
    return is_type(object, table->parameter_type, table->tensor_type) && !table->exchange->look(object, weight) &&
           same_sizes(weight, &n, 1) && weight->device_type == x->device_type && weight->device == x->device &&
           is_contiguous(weight);
}

/* How many operands the op has: x, residual, weight, eps, next weight, next eps, as far as it has them. -1: it is none
 * of these. */
static int operands_of(const Table *table) {
    return table->op == RMS_NORM ? 3 : table->op == NORM_ADD_NORM ? 6 : table->op >= TWO_NORMS ? -1 : 4;
}

/* The op. Sets *sure to 0 and returns 0 where the slow path has to decide; nothing has happened then. */
static PyObject *fast(Table *table, PyObject *const *a, int *sure) {
    const int fused = table->op != RMS_NORM, in_place = table->op == FUSED_ADD_IN_PLACE;
    PyObject *x_object = a[0], *residual_object = fused ? a[1] : 0, *eps_object = a[2 + fused];
    PyObject *weight_object = table->has_weight ? a[1 + fused] : NONE;
    Tensor x, residual, weight;
    Values values;
    memset(&values, 0, sizeof values);
    *sure = 0;

    if (!is_type(x_object, table->tensor_type, table->parameter_type) || table->exchange->look(x_object, &x))
        return 0;
    weight.dtype = 0;
    if (weight_object != NONE && (!is_type(weight_object, table->parameter_type, table->tensor_type) ||
                                  table->exchange->look(weight_object, &weight)))
        return 0;
    if (x.dims < 1 || x.dims > MAX_DIMS || x.device_type != table->device_type)
        return 0;
    const i64 n = x.sizes[x.dims - 1];
    i64 rows = 1;
    for (int d = 0; d < x.dims - 1; d++)
        rows *= x.sizes[d];
    RowKind *row_kind = row_kind_for(table, &x, weight.dtype);
    if (!row_kind || rows == 0 || !x.data)
        return 0;

    const i64 columns =
        row_kind->kernel->n; /* of a group, where the norm is grouped: a row is then several rows to the kernel */
    Rows x_rows = {columns, 0, 0}, residual_rows = {columns, 0, 0};
    int packed = is_contiguous(&x);
    if (!packed && (columns != n || !strided_rows(&x, &x_rows)))
        return 0;
    values.x = address_of(&x);
    uint64_t addresses = values.x | (uint64_t)((x_rows.stride | x_rows.outer) * row_kind->itemsize);
    if (residual_object == x_object) {
        values.residual = values.x;
        residual_rows = x_rows;
    } else if (fused) {
        if (!is_type(residual_object, table->tensor_type, table->parameter_type) ||
            table->exchange->look(residual_object, &residual) || !same_sizes(&residual, x.sizes, x.dims) ||
            residual.dtype != x.dtype || residual.device_type != x.device_type || residual.device != x.device)
            return 0;
        if (!is_contiguous(&residual)) {
            packed = 0;
            if (columns != n || !strided_rows(&residual, &residual_rows))
                return 0;
        }
        values.residual = address_of(&residual);
        addresses |= values.residual | (uint64_t)((residual_rows.stride | residual_rows.outer) * row_kind->itemsize);
    }
    if (weight_object != NONE) {
        if (!same_sizes(&weight, &n, 1) || weight.device_type != x.device_type || weight.device != x.device ||
            !is_contiguous(&weight))
            return 0;
        values.weight = address_of(&weight);
    }
    double eps = row_kind->default_eps;
    if (eps_object != NONE) {
        eps = PyFloat_AsDouble(eps_object);
        if (eps == -1.0 && PyErr_Occurred())
            return 0;
    }
    double next_eps = row_kind->default_eps;
    if (table->op == NORM_ADD_NORM) {
        Tensor next_weight;
        if (table->has_weight) {
            if (!is_weight(table, a[4], n, &x, &next_weight) || next_weight.dtype != weight.dtype)
                return 0;
            values.next_weight = address_of(&next_weight);
        }
        if (a[5] != NONE) {
            next_eps = PyFloat_AsDouble(a[5]);
            if (next_eps == -1.0 && PyErr_Occurred())
                return 0;
        }
    }
    const Kernel *kernel = row_kind->kernel;
    if (x_rows.inner || residual_rows.inner) {
        kernel = row_kind->two_level;
        if (!kernel || in_place || (x_rows.inner && residual_rows.inner && x_rows.inner != residual_rows.inner))
            return 0;
        values.inner_rows = x_rows.inner ? x_rows.inner : residual_rows.inner;
        values.x_outer_stride = x_rows.inner ? x_rows.outer : x_rows.stride * values.inner_rows;
        values.residual_outer_stride =
            residual_rows.inner ? residual_rows.outer : residual_rows.stride * values.inner_rows;
    }
    rows *= n / columns;
    while (rows > kernel->m_max && kernel->next)
        kernel = kernel->next;
    if ((addresses & kernel->mask) || ((values.weight | values.next_weight) & kernel->weight_mask))
        return 0;
    if (in_place && packed) {
        uint64_t bytes = (uint64_t)(rows * columns * row_kind->itemsize);
        uint64_t weight_bytes = (uint64_t)(n * row_kind->weight_itemsize);
        if (overlap(values.x, bytes, values.residual, bytes) ||
            (weight_object != NONE && (overlap(values.x, bytes, values.weight, weight_bytes) ||
                                       overlap(values.residual, bytes, values.weight, weight_bytes))))
            return 0;
    } else if (in_place) {
        return 0; /* whether strided tensors overlap takes a closer look */
    }
    void *stream = 0;
    if (table->exchange->current_stream(x.device_type, x.device, &stream))
        return 0;

    /* From here on the call is ours: errors are raised, not handed to the slow path. */
    *sure = 1;
    values.m = rows;
    values.x_row_stride = x_rows.stride;
    values.residual_row_stride = residual_rows.stride;
    values.normed_row_stride = values.total_row_stride = columns;
    values.eps = (float)eps;
    values.next_eps = (float)next_eps;
    const int normed_wanted = table->op != NORM_ADD;
    PyObject *normed = 0, *total = 0;
    if (in_place) {
        values.normed = values.x;
        values.total = values.residual;
    } else {
        Shape *shape = &row_kind->shape;
        if (!has_sizes_of(shape, &x))
            return 0;
        PyObject *size = own(shape->size), *strides = own(shape->strides); /* as in allocate_like, for both results */
        if (normed_wanted)
            normed = allocate(table, size, strides, row_kind->out_dtype, &values.normed);
        if (fused && (normed || !normed_wanted))
            total = allocate(table, size, strides, row_kind->dtype, &values.total);
        Py_DecRef(size);
        Py_DecRef(strides);
        if ((normed_wanted && !normed) || (fused && !total)) {
            if (normed)
                Py_DecRef(normed);
            return 0;
        }
    }
    int error = start_plain(kernel, stream, &values);
    if (error) { /* the slow path repeats the launch and words the error */
        if (normed)
            Py_DecRef(normed);
        if (total)
            Py_DecRef(total);
        *sure = 0;
        return 0;
    }
    if (in_place)
        return PyObject_CallFunctionObjArgs(table->bump, x_object, residual_object, 0);
    if (!fused || !normed_wanted)
        return fused ? total : normed;
    PyObject *result = PyTuple_New(2);
    PyTuple_SetItem(result, 0, normed);
    PyTuple_SetItem(result, 1, total);
    return result;
}

#include "launcher_pair.h"
#include "launcher_query_key.h"

static PyObject *call(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Table *table = PyCapsule_GetPointer(self, "rmsnorm_patch.table");
    if (!table)
        return 0;
    int sure = 0;
    PyObject *result = count == operands_of(table) ? fast(table, a, &sure) : 0;
    if (sure)
        return result;
    PyErr_Clear();
    PyObject *arguments = PyTuple_New(count);
    if (!arguments)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_IncRef(a[i]);
        PyTuple_SetItem(arguments, i, a[i]);
    }
    result = PyObject_CallObject(table->slow, arguments);
    Py_DecRef(arguments);
    return result;
}

static PyMethodDef call_definition = {"call", (PyCFunction)(void *)call, METH_FASTCALL, 0};

/* make_callable(op, has_weight, slow, Tensor, Parameter, empty_strided_cuda, bump, exchange API capsule, DLPack's
 * device type) -> (table, call), or None where the API is of a version that this file does not know. */
static PyObject *make_callable(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 9) {
        PyErr_SetString(PyExc_TypeError, "make_callable takes 9 arguments");
        return 0;
    }
    const Exchange *exchange = PyCapsule_GetPointer(a[7], "dlpack_exchange_api");
    if (!exchange)
        return 0;
    if (exchange->header.major != EXCHANGE_MAJOR || exchange->header.minor < EXCHANGE_MINOR || !exchange->look ||
        !exchange->current_stream) {
        Py_IncRef(NONE);
        return NONE;
    }
    Table *table = calloc(1, sizeof *table);
    table->op = (int)PyLong_AsLongLong(a[0]);
    table->has_weight = PyObject_IsTrue(a[1]);
    table->exchange = exchange;
    table->device_type = (int)PyLong_AsLongLong(a[8]);
    PyObject **slots[] = {&table->slow, &table->tensor_type, &table->parameter_type, &table->empty_strided,
                          &table->bump};
    for (int i = 0; i < 5; i++) {
        Py_IncRef(a[2 + i]);
        *slots[i] = a[2 + i];
    }
    PyObject *capsule = PyCapsule_New(table, "rmsnorm_patch.table", 0);
    PyObject *result = PyTuple_New(2);
    PyTuple_SetItem(result, 1, PyCFunction_NewEx(&call_definition, capsule, 0));
    PyTuple_SetItem(result, 0, capsule);
    return result;
}

/* add_row_kind(table, kernel, two_level kernel or 0, dtype, weight_dtype, out_dtype, n, device, itemsize,
 * weight_itemsize, default_eps, code of dtype, code of weight_dtype) -> 1, or 0 if the table is full or a kernel is not
 * plain (the slow path then serves these calls). Again with the same key: sets the two-level kernel. Codes:
 * launcher.dlpack_code. */
static PyObject *add_row_kind(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 13) {
        PyErr_SetString(PyExc_TypeError, "add_row_kind takes 13 arguments");
        return 0;
    }
    Table *table = PyCapsule_GetPointer(a[0], "rmsnorm_patch.table");
    if (!table)
        return 0;
    RowKind row_kind;
    memset(&row_kind, 0, sizeof row_kind);
    row_kind.kernel = (Kernel *)PyLong_AsUnsignedLongLong(a[1]);
    row_kind.two_level = (Kernel *)PyLong_AsUnsignedLongLong(a[2]);
    row_kind.dtype = a[3];
    row_kind.out_dtype = a[5];
    row_kind.n = PyLong_AsLongLong(a[6]);
    row_kind.device = PyLong_AsLongLong(a[7]);
    row_kind.itemsize = PyLong_AsLongLong(a[8]);
    row_kind.weight_itemsize = PyLong_AsLongLong(a[9]);
    row_kind.default_eps = PyFloat_AsDouble(a[10]);
    row_kind.x_code = (uint32_t)PyLong_AsLongLong(a[11]);
    row_kind.weight_code = (uint32_t)PyLong_AsLongLong(a[12]);
    if (PyErr_Occurred())
        return 0;
    for (const Kernel *kernel = row_kind.kernel; kernel; kernel = kernel->next)
        if (!kernel->plain)
            return PyLong_FromLongLong(0);
    for (const Kernel *kernel = row_kind.two_level; kernel; kernel = kernel->next)
        if (!kernel->plain)
            return PyLong_FromLongLong(0);
    for (int i = 0; i < table->count; i++) {
        RowKind *known = &table->row_kinds[i];
        if (known->x_code == row_kind.x_code && known->weight_code == row_kind.weight_code && known->n == row_kind.n &&
            known->device == row_kind.device) {
            if (row_kind.two_level)
                known->two_level = row_kind.two_level;
            return PyLong_FromLongLong(1);
        }
    }
    if (table->count == MAX_ROW_KINDS)
        return PyLong_FromLongLong(0);
    Py_IncRef(row_kind.dtype);
    Py_IncRef(row_kind.out_dtype);
    table->row_kinds[table->count] = row_kind;
    table->count++;
    return PyLong_FromLongLong(1);
}

/* The functions of `definitions` in that order, or the name of what the driver lacks. */
PyObject *rp_functions(const char *driver) {
    void *library = dlopen(driver, RTLD_NOW | RTLD_GLOBAL);
    if (!library)
        return PyUnicode_InternFromString("libcuda");
    cuLaunchKernelEx = (int (*)(const LaunchConfig *, void *, void **, void **))dlsym(library, "cuLaunchKernelEx");
    cuCtxGetCurrent = (int (*)(void **))dlsym(library, "cuCtxGetCurrent");
    cuCtxPushCurrent = (int (*)(void *))dlsym(library, "cuCtxPushCurrent_v2");
    cuCtxPopCurrent = (int (*)(void **))dlsym(library, "cuCtxPopCurrent_v2");
    if (!cuLaunchKernelEx || !cuCtxGetCurrent || !cuCtxPushCurrent || !cuCtxPopCurrent)
        return PyUnicode_InternFromString("cuLaunchKernelEx");
    static PyMethodDef definitions[] = {
        {"new_kernel", (PyCFunction)(void *)new_kernel, METH_FASTCALL, 0},
        {"launch", (PyCFunction)(void *)launch, METH_FASTCALL, 0},
        {"make_callable", (PyCFunction)(void *)make_callable, METH_FASTCALL, 0},
        {"add_row_kind", (PyCFunction)(void *)add_row_kind, METH_FASTCALL, 0},
        {"set_surroundings", (PyCFunction)(void *)set_surroundings, METH_FASTCALL, 0},
        {"new_norm", (PyCFunction)(void *)new_norm, METH_FASTCALL, 0},
        {"in_layer", (PyCFunction)(void *)in_layer, METH_FASTCALL, 0},
        {"hand_over", (PyCFunction)(void *)hand_over, METH_FASTCALL, 0},
        {"take", (PyCFunction)(void *)take, METH_FASTCALL, 0},
        {"alone", (PyCFunction)(void *)alone, METH_FASTCALL, 0},
        {"query_key", (PyCFunction)(void *)query_key, METH_FASTCALL, 0},
        {"rotated", (PyCFunction)(void *)rotated, METH_FASTCALL, 0},
        {"norm_add", (PyCFunction)(void *)norm_add, METH_FASTCALL, 0},
        {"norm_add_norm", (PyCFunction)(void *)norm_add_norm, METH_FASTCALL, 0},
        {"norm_hand_over", (PyCFunction)(void *)norm_hand_over, METH_FASTCALL, 0},
    };
    enum { COUNT = sizeof definitions / sizeof *definitions };
    PyObject *functions = PyTuple_New(COUNT);
    for (int i = 0; i < COUNT; i++)
        PyTuple_SetItem(functions, i, PyCFunction_NewEx(&definitions[i], 0, 0));
    return functions;
}
