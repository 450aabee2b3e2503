/* Launches the kernels of kernels/cuda with little host work, and is the hot path of every eager call.
 *
 * Compiled once per user with the system's C compiler (launcher.py), without any header beyond the C library: only functions of
 * Python's stable ABI and of the CUDA driver are used, declared here, so that neither Python's nor CUDA's headers are
 * needed and one binary serves every Python from 3.10 on. Loaded by ctypes; `rp_functions` returns its Python functions.
 *
 * new_kernel(...) -> address of a Kernel; launch(kernel, ...) starts one; make_callable(op, has_weight, slow, torch...)
 * returns the op itself: it takes tensors, checks what must be checked in every call, allocates the results and launches
 * the plan that add_plan registered for (dtype, weight dtype, N, device). Whatever it is not sure of goes to `slow`, or,
 * in the op's second form (`attempt`), gives None and has done nothing.
 */
#include "launcher_start.h"
#include "launcher_tensor.h"

enum { RMS_NORM, FUSED_ADD, FUSED_ADD_IN_PLACE };
enum { MAX_PLANS = 64 };

typedef struct {
    PyObject *dtype, *weight_dtype, *out_dtype; /* weight_dtype: None without a weight */
    i64 n, device;
    i64 itemsize, weight_itemsize;
    PyObject *device_object; /* the device index, for the stream query */
    double default_eps;
    Kernel *kernel, *two_level; /* two_level: for x [.., inner, N] whose leading dimensions cannot be merged */
    PyObject *shape, *size, *strides; /* of the last allocation */
} Plan;

typedef struct {
    int op, has_weight, count;
    PyObject *slow, *tensor_type, *parameter_type, *empty_strided, *raw_stream, *bump;
    Plan plans[MAX_PLANS];
} Table;

/* A contiguous tensor's sizes as an exact tuple, and its strides: what the allocator takes. */
static int remember_shape(Plan *plan, PyObject *shape, const i64 *sizes, Py_ssize_t dims) {
    PyObject *size = PyTuple_New(dims), *strides = PyTuple_New(dims);
    if (!size || !strides)
        return 0;
    i64 stride = 1;
    for (Py_ssize_t d = dims - 1; d >= 0; d--) {
        PyTuple_SetItem(size, d, PyLong_FromLongLong(sizes[d]));
        PyTuple_SetItem(strides, d, PyLong_FromLongLong(stride));
        stride *= sizes[d] > 1 ? sizes[d] : 1;
    }
    PyObject *old[3] = {plan->shape, plan->size, plan->strides};
    Py_IncRef(shape);
    plan->shape = shape;
    plan->size = size;
    plan->strides = strides;
    for (int i = 0; i < 3; i++)
        if (old[i])
            Py_DecRef(old[i]);
    return 1;
}

static PyObject *allocate(const Table *table, PyObject *size, PyObject *strides, PyObject *dtype, uint64_t *address) {
    PyObject *tensor = PyObject_CallFunctionObjArgs(table->empty_strided, size, strides, dtype, 0);
    if (tensor && !method_integer(tensor, s_data_ptr, address)) {
        Py_DecRef(tensor);
        return 0;
    }
    return tensor;
}

/* The op. Sets *sure to 0 and returns 0 where the slow path has to decide; nothing has happened then. */
static PyObject *fast(Table *table, PyObject *const *a, int *sure) {
    const int fused = table->op != RMS_NORM, in_place = table->op == FUSED_ADD_IN_PLACE;
    PyObject *x = a[0], *residual = fused ? a[1] : 0, *weight = a[1 + fused], *eps_object = a[2 + fused];
    PyObject *shape = 0, *dtype = 0, *weight_dtype = NONE, *result = 0;
    Plan *plan = 0;
    Args args;
    memset(&args, 0, sizeof args);
    *sure = 0;

    if (!table->has_weight)
        weight = NONE;
    if (!is_type(x, table->tensor_type, table->parameter_type))
        return 0;
    if (weight != NONE) {
        if (!is_type(weight, table->parameter_type, table->tensor_type))
            return 0;
        weight_dtype = PyObject_GetAttr(weight, s_dtype);
        if (!weight_dtype)
            return 0;
        Py_DecRef(weight_dtype); /* dtypes live for ever */
    }
    dtype = PyObject_GetAttr(x, s_dtype);
    shape = PyObject_GetAttr(x, s_shape);
    if (!dtype || !shape)
        goto end;
    Py_ssize_t dims = PyTuple_Size(shape);
    if (dims < 1 || dims > MAX_DIMS)
        goto end;
    i64 sizes[MAX_DIMS], rows = 1;
    for (Py_ssize_t d = 0; d < dims; d++) {
        sizes[d] = PyLong_AsLongLong(PyTuple_GetItem(shape, d));
        if (d < dims - 1)
            rows *= sizes[d];
    }
    uint64_t device;
    if (!method_integer(x, s_get_device, &device))
        goto end;
    for (int i = 0; i < table->count; i++) {
        Plan *candidate = &table->plans[i];
        if (candidate->dtype == dtype && candidate->weight_dtype == weight_dtype &&
            candidate->n == sizes[dims - 1] && candidate->device == (i64)device) {
            plan = candidate;
            break;
        }
    }
    void *context = 0;
    cuCtxGetCurrent(&context);
    if (!plan || rows == 0 || context != plan->kernel->context)
        goto end;

    const i64 columns = plan->kernel->n; /* of a group, where the norm is grouped: a row is then several rows to the kernel */
    Rows x_rows = {columns, 0, 0}, residual_rows = {columns, 0, 0};
    int packed = method_true(x, s_is_contiguous);
    if (!packed && (columns != plan->n || !strided_rows(x, sizes, dims, &x_rows)))
        goto end;
    if (!method_integer(x, s_data_ptr, &args.x))
        goto end;
    uint64_t addresses = args.x | (uint64_t)((x_rows.stride | x_rows.outer) * plan->itemsize);
    if (fused) {
        if (residual != x) {
            PyObject *other = is_type(residual, table->tensor_type, table->parameter_type)
                                  ? PyObject_GetAttr(residual, s_shape) : 0;
            int same = other && PyObject_RichCompareBool(shape, other, Py_EQ) == 1;
            if (other)
                Py_DecRef(other);
            if (!same || !same_attribute(residual, s_dtype, dtype) || !on_device(residual, plan->device))
                goto end;
            if (!method_true(residual, s_is_contiguous)) {
                packed = 0;
                if (columns != plan->n || !strided_rows(residual, sizes, dims, &residual_rows))
                    goto end;
            }
            if (!method_integer(residual, s_data_ptr, &args.residual))
                goto end;
        } else {
            args.residual = args.x;
            residual_rows = x_rows;
        }
        addresses |= args.residual | (uint64_t)((residual_rows.stride | residual_rows.outer) * plan->itemsize);
    }
    if (weight != NONE) {
        PyObject *other = PyObject_GetAttr(weight, s_shape);
        int same = other && PyTuple_Size(other) == 1 && PyLong_AsLongLong(PyTuple_GetItem(other, 0)) == plan->n;
        if (other)
            Py_DecRef(other);
        if (!same || !on_device(weight, plan->device) || !method_true(weight, s_is_contiguous) ||
            !method_integer(weight, s_data_ptr, &args.weight))
            goto end;
    }
    double eps = plan->default_eps;
    if (eps_object != NONE) {
        eps = PyFloat_AsDouble(eps_object);
        if (eps == -1.0 && PyErr_Occurred())
            goto end;
    }
    const Kernel *kernel = plan->kernel;
    if (x_rows.inner || residual_rows.inner) {
        kernel = plan->two_level;
        if (!kernel || in_place || (x_rows.inner && residual_rows.inner && x_rows.inner != residual_rows.inner))
            goto end;
        args.inner_rows = x_rows.inner ? x_rows.inner : residual_rows.inner;
        args.x_outer_stride = x_rows.inner ? x_rows.outer : x_rows.stride * args.inner_rows;
        args.residual_outer_stride =
            residual_rows.inner ? residual_rows.outer : residual_rows.stride * args.inner_rows;
    }
    rows *= plan->n / columns;
    while (rows > kernel->m_max && kernel->next)
        kernel = kernel->next;
    if ((addresses & kernel->mask) || (args.weight & kernel->weight_mask))
        goto end;
    if (in_place && packed) {
        uint64_t bytes = (uint64_t)(rows * columns * plan->itemsize);
        uint64_t weight_bytes = (uint64_t)(plan->n * plan->weight_itemsize);
        if (overlap(args.x, bytes, args.residual, bytes) ||
            (weight != NONE && (overlap(args.x, bytes, args.weight, weight_bytes) ||
                                overlap(args.residual, bytes, args.weight, weight_bytes))))
            goto end;
    } else if (in_place) {
        goto end; /* whether strided tensors overlap takes a closer look */
    }
    PyObject *stream_object = PyObject_CallFunctionObjArgs(table->raw_stream, plan->device_object, 0);
    if (!stream_object)
        goto end;
    void *stream = (void *)PyLong_AsUnsignedLongLong(stream_object);
    Py_DecRef(stream_object);

    /* From here on the call is ours: errors are raised, not handed to the slow path. */
    *sure = 1;
    args.m = rows;
    args.x_row_stride = x_rows.stride;
    args.residual_row_stride = residual_rows.stride;
    args.normed_row_stride = args.total_row_stride = columns;
    args.eps = (float)eps;
    PyObject *normed = 0, *total = 0;
    if (in_place) {
        args.normed = args.x;
        args.total = args.residual;
    } else {
        if (!(plan->shape && PyObject_RichCompareBool(plan->shape, shape, Py_EQ) == 1) &&
            !remember_shape(plan, shape, sizes, dims))
            goto end;
        PyObject *size = plan->size, *strides = plan->strides;
        Py_IncRef(size);
        Py_IncRef(strides);
        normed = allocate(table, size, strides, plan->out_dtype, &args.normed);
        if (normed && fused)
            total = allocate(table, size, strides, dtype, &args.total);
        Py_DecRef(size);
        Py_DecRef(strides);
        if (!normed || (fused && !total)) {
            if (normed)
                Py_DecRef(normed);
            goto end;
        }
    }
    PyObject *parameter_class = weight == NONE ? 0 : PyObject_Type(weight);
    int dependent = weight == NONE || parameter_class == table->parameter_type;
    if (parameter_class)
        Py_DecRef(parameter_class);
    int error = start(kernel, stream, dependent, &args);
    if (error) { /* the slow path repeats the launch and words the error */
        if (normed)
            Py_DecRef(normed);
        if (total)
            Py_DecRef(total);
        *sure = 0;
    } else if (in_place) {
        result = PyObject_CallFunctionObjArgs(table->bump, x, residual, 0);
    } else if (fused) {
        result = PyTuple_New(2);
        PyTuple_SetItem(result, 0, normed);
        PyTuple_SetItem(result, 1, total);
    } else {
        result = normed;
    }
end:
    if (dtype)
        Py_DecRef(dtype);
    if (shape)
        Py_DecRef(shape);
    return result;
}

/* `fast` for any number of arguments; *sure as there, no error left behind where it is 0. */
static PyObject *attempt_fast(Table *table, PyObject *const *a, Py_ssize_t count, int *sure) {
    *sure = 0;
    if (count != 3 + (table->op != RMS_NORM))
        return 0;
    PyObject *result = fast(table, a, sure);
    if (!*sure)
        PyErr_Clear();
    return result;
}

static PyObject *attempt(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Table *table = PyCapsule_GetPointer(self, "rmsnorm_patch.table");
    if (!table)
        return 0;
    int sure;
    PyObject *result = attempt_fast(table, a, count, &sure);
    if (sure)
        return result;
    Py_IncRef(NONE);
    return NONE;
}

static PyObject *call(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Table *table = PyCapsule_GetPointer(self, "rmsnorm_patch.table");
    if (!table)
        return 0;
    int sure;
    PyObject *result = attempt_fast(table, a, count, &sure);
    if (sure)
        return result;
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
static PyMethodDef attempt_definition = {"attempt", (PyCFunction)(void *)attempt, METH_FASTCALL, 0};

/* make_callable(op, has_weight, slow, Tensor, Parameter, empty_strided_cuda, raw_stream, bump) -> (table, call, attempt) */
static PyObject *make_callable(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 8) {
        PyErr_SetString(PyExc_TypeError, "make_callable takes 8 arguments");
        return 0;
    }
    Table *table = calloc(1, sizeof *table);
    table->op = (int)PyLong_AsLongLong(a[0]);
    table->has_weight = PyObject_IsTrue(a[1]);
    PyObject **slots[] = {&table->slow, &table->tensor_type, &table->parameter_type, &table->empty_strided,
                          &table->raw_stream, &table->bump};
    for (int i = 0; i < 6; i++) {
        Py_IncRef(a[2 + i]);
        *slots[i] = a[2 + i];
    }
    PyObject *capsule = PyCapsule_New(table, "rmsnorm_patch.table", 0);
    PyObject *result = PyTuple_New(3);
    PyTuple_SetItem(result, 2, PyCFunction_NewEx(&attempt_definition, capsule, 0));
    PyTuple_SetItem(result, 1, PyCFunction_NewEx(&call_definition, capsule, 0));
    PyTuple_SetItem(result, 0, capsule);
    return result;
}

/* add_plan(table, kernel, two_level kernel or 0, dtype, weight_dtype, out_dtype, n, device, itemsize, weight_itemsize,
 * default_eps) -> 1, or 0 if the table is full (the slow path then serves these calls). Again with the same key: sets the
 * two-level kernel. */
static PyObject *add_plan(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 11) {
        PyErr_SetString(PyExc_TypeError, "add_plan takes 11 arguments");
        return 0;
    }
    Table *table = PyCapsule_GetPointer(a[0], "rmsnorm_patch.table");
    if (!table)
        return 0;
    Plan plan;
    memset(&plan, 0, sizeof plan);
    plan.kernel = (Kernel *)PyLong_AsUnsignedLongLong(a[1]);
    plan.two_level = (Kernel *)PyLong_AsUnsignedLongLong(a[2]);
    plan.dtype = a[3];
    plan.weight_dtype = a[4];
    plan.out_dtype = a[5];
    plan.n = PyLong_AsLongLong(a[6]);
    plan.device = PyLong_AsLongLong(a[7]);
    plan.itemsize = PyLong_AsLongLong(a[8]);
    plan.weight_itemsize = PyLong_AsLongLong(a[9]);
    plan.default_eps = PyFloat_AsDouble(a[10]);
    if (PyErr_Occurred())
        return 0;
    for (int i = 0; i < table->count; i++) {
        Plan *known = &table->plans[i];
        if (known->dtype == plan.dtype && known->weight_dtype == plan.weight_dtype && known->n == plan.n &&
            known->device == plan.device) {
            if (plan.two_level)
                known->two_level = plan.two_level;
            return PyLong_FromLongLong(1);
        }
    }
    if (table->count == MAX_PLANS)
        return PyLong_FromLongLong(0);
    plan.device_object = a[7];
    for (int i = 3; i < 8; i++)
        Py_IncRef(a[i]);
    table->plans[table->count] = plan;
    table->count++;
    return PyLong_FromLongLong(1);
}

/* (new_kernel, launch, make_callable, add_plan), or the name of what the driver lacks. */
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
    s_dtype = PyUnicode_InternFromString("dtype");
    s_shape = PyUnicode_InternFromString("shape");
    s_get_device = PyUnicode_InternFromString("get_device");
    s_is_contiguous = PyUnicode_InternFromString("is_contiguous");
    s_stride = PyUnicode_InternFromString("stride");
    s_data_ptr = PyUnicode_InternFromString("data_ptr");
    static PyMethodDef definitions[] = {
        {"new_kernel", (PyCFunction)(void *)new_kernel, METH_FASTCALL, 0},
        {"launch", (PyCFunction)(void *)launch, METH_FASTCALL, 0},
        {"make_callable", (PyCFunction)(void *)make_callable, METH_FASTCALL, 0},
        {"add_plan", (PyCFunction)(void *)add_plan, METH_FASTCALL, 0},
    };
    PyObject *functions = PyTuple_New(4);
    for (int i = 0; i < 4; i++)
        PyTuple_SetItem(functions, i, PyCFunction_NewEx(&definitions[i], 0, 0));
    return functions;
}
