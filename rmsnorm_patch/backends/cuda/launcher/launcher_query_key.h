/* The query's and the key's norm of an attention in one launch, also with their rotation (rewrite/query_key.py): every
 * check and the call in one C function, as in launcher_pair.h.
 *
 * Included by launcher.c after launcher_pair.h. */
#pragma once

/* One of the two: its norm, its rows, its weight. */
typedef struct {
    PyObject *module, *object, *state, *weight_object, *eps;
    Tensor x, weight;
    Rows rows;
    i64 m;
} Side;

static void release_side(Side *side) {
    PyObject *held[] = {side->state, side->weight_object, side->eps};
    for (int i = 0; i < 3; i++)
        if (held[i])
            Py_DecRef(held[i]);
}

/* Whether nobody watches the norm and its weight and eps can be read. */
static int read_side(const Norm *norm, Side *side) {
    side->state = PyObject_GenericGetDict(side->module, 0);
    if (!side->state || !unhooked(side->state) ||
        PyDict_GetItem(side->state, s_training) != (PyObject *)&_Py_FalseStruct)
        return 0;
    side->weight_object = weight_of(norm, side->state);
    side->eps = eps_of(norm, side->module);
    return side->weight_object && side->eps && is_type(side->eps, (PyObject *)&PyFloat_Type, (PyObject *)&PyFloat_Type);
}

/* Whether the tensors are such as a kernel reads, wherever their rows lie. */
static int read_tensors(const Table *table, Side *side) {
    Tensor *x = &side->x, *weight = &side->weight;
    if (!is_type(side->object, table->tensor_type, table->tensor_type) || table->exchange->look(side->object, x) ||
        x->dims < 1 || x->dims > MAX_DIMS || x->device_type != table->device_type || !x->data)
        return 0;
    const i64 n = x->sizes[x->dims - 1];
    weight->dtype = 0;
    if (side->weight_object != NONE &&
        (!is_type(side->weight_object, table->parameter_type, table->tensor_type) ||
         table->exchange->look(side->weight_object, weight) || !same_sizes(weight, &n, 1) ||
         weight->device_type != x->device_type || weight->device != x->device || !is_contiguous(weight)))
        return 0;
    side->m = 1;
    for (int d = 0; d < x->dims - 1; d++)
        side->m *= x->sizes[d];
    side->rows = (Rows){n, 0, 0};
    return side->m > 0;
}

static int read_rows(const Table *table, Side *side) {
    return read_tensors(table, side) && (is_contiguous(&side->x) || strided_rows(&side->x, &side->rows));
}

/* The kernel for both sets of rows and what it is started with, but for the results; 0 where the slow path has to
 * decide. two_level: not all rows lie one after another, or at one stride. */
static const Kernel *kernel_of_two(Table *table, const RowKind *row_kind, const Side *query, const Side *key,
                                   int two_level, Values *values, void **stream) {
    const Kernel *kernel = row_kind ? (two_level ? row_kind->two_level : row_kind->kernel) : 0;
    if (!kernel)
        return 0;
    while (query->m + key->m > kernel->m_max && kernel->next)
        kernel = kernel->next;
    const i64 strides = query->rows.stride | query->rows.outer | key->rows.stride | key->rows.outer;
    memset(values, 0, sizeof *values);
    values->x = address_of(&query->x);
    values->x2 = address_of(&key->x);
    if (query->weight_object != NONE) {
        values->weight = address_of(&query->weight);
        values->weight2 = address_of(&key->weight);
    }
    if (((values->x | values->x2 | (uint64_t)(strides * row_kind->itemsize)) & kernel->mask) ||
        ((values->weight | values->weight2) & kernel->weight_mask) ||
        table->exchange->current_stream(query->x.device_type, query->x.device, stream))
        return 0;
    values->m = query->m;
    values->m2 = key->m;
    values->x_row_stride = query->rows.stride;
    values->x2_row_stride = key->rows.stride;
    values->inner_rows = query->rows.inner ? query->rows.inner : query->m;
    values->inner_rows2 = key->rows.inner ? key->rows.inner : key->m;
    values->x_outer_stride = query->rows.outer;
    values->x2_outer_stride = key->rows.outer;
    values->normed_row_stride = values->normed2_row_stride = row_kind->n;
    values->eps = (float)PyFloat_AsDouble(query->eps);
    return kernel;
}

/* Starts the kernel; the two results as a tuple. 0 where an allocation or the launch failed: the slow path repeats it
 * and words the error. Takes the references. */
static PyObject *started_two(const Kernel *kernel, void *stream, const Values *values, PyObject *first,
                             PyObject *second) {
    PyObject *result = second ? PyTuple_New(2) : 0;
    if (!result || start_plain(kernel, stream, values)) {
        PyObject *held[] = {first, second, result};
        for (int i = 0; i < 3; i++)
            if (held[i])
                Py_DecRef(held[i]);
        return 0;
    }
    PyTuple_SetItem(result, 0, first);
    PyTuple_SetItem(result, 1, second);
    return result;
}

/* Starts the kernel for both; 0 where the slow path has to decide: nothing has happened then. */
static PyObject *start_two(Table *table, Side *query, Side *key) {
    RowKind *row_kind = row_kind_for(table, &query->x, query->weight.dtype);
    Values values;
    void *stream = 0;
    const int two_level = query->rows.inner || key->rows.inner;
    const Kernel *kernel = kernel_of_two(table, row_kind, query, key, two_level, &values, &stream);
    if (!kernel)
        return 0;
    PyObject *first = allocate_like(table, &row_kind->shape, &query->x, row_kind->out_dtype, &values.normed);
    PyObject *second =
        first ? allocate_like(table, &row_kind->second, &key->x, row_kind->out_dtype, &values.normed2) : 0;
    return started_two(kernel, stream, &values, first, second);
}

/* Both sides of a call: whether nobody watches, and the rows and weights are of one kind. read: of one side. */
static int read_both(Norm *norm, Norm *other, Side *query, Side *key, int (*read)(const Table *, Side *)) {
    return read_side(norm, query) && read_side(other, key) &&
           PyObject_RichCompareBool(query->eps, key->eps, Py_EQ) == 1 && nothing_watches() &&
           read(norm->table, query) && read(norm->table, key) && query->x.dtype == key->x.dtype &&
           query->x.device == key->x.device && query->weight.dtype == key->weight.dtype &&
           query->x.sizes[query->x.dims - 1] == key->x.sizes[key->x.dims - 1];
}

/* query_key(query norm, key norm, query, key) -> (norm of query, norm of key) */
static PyObject *query_key(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Norm *norm = count == 4 ? norm_of(around.query_key, a[0]) : 0, *other = norm ? norm_of(around.query_key, a[1]) : 0;
    if (!other || norm->table != other->table)
        return own(NONE);
    Side query = {a[0], a[2]}, key = {a[1], a[3]};
    PyObject *result = 0;
    if (read_both(norm, other, &query, &key, read_rows))
        result = start_two(norm->table, &query, &key);
    release_side(&query);
    release_side(&key);
    if (result)
        return result;
    PyErr_Clear();
    return own(NONE);
}

/* The rows of a rotation: a token has all its heads, and tokens lie at one stride. */
typedef struct {
    i64 batch, length, heads;
} Heads;

/* Where the heads of x [batch, length, heads, N] (head_axis 2) or [batch, heads, length, N] (1) lie; 0 where tokens do
 * not lie so (`rotated.heads_of` in Python). Sets side->rows. */
static int read_heads(Side *side, int head_axis, Heads *heads) {
    const Tensor *x = &side->x;
    if (x->dims != 4 || x->strides[3] != 1)
        return 0;
    const i64 n = x->sizes[3];
    *heads = (Heads){x->sizes[0], x->sizes[3 - head_axis], x->sizes[head_axis]};
    const i64 head_stride = heads->heads > 1 ? x->strides[head_axis] : n;
    i64 token_stride = heads->heads * n;
    if (heads->length > 1)
        token_stride = x->strides[3 - head_axis];
    else if (heads->batch > 1)
        token_stride = x->strides[0];
    if ((heads->batch > 1 && x->strides[0] != heads->length * token_stride) || head_stride < n ||
        (heads->batch * heads->length > 1 && token_stride < (heads->heads - 1) * head_stride + n))
        return 0;
    side->rows = (Rows){head_stride, heads->heads, token_stride};
    return side->m <= INT32_MAX;
}

static int is_packed(const Side *side, i64 n) {
    return side->rows.stride == n && side->rows.outer == side->rows.inner * n;
}

/* A result [batch, heads, length, N] that lies as [batch, length, heads, N]; `shape` remembers it. */
static PyObject *allocate_heads(const Table *table, Shape *shape, const Heads *heads, i64 n, PyObject *dtype,
                                uint64_t *address) {
    const i64 sizes[] = {heads->batch, heads->heads, heads->length, n};
    const i64 strides[] = {heads->length * heads->heads * n, n, heads->heads * n, 1};
    if (!shape->size || shape->dims != 4 || memcmp(shape->sizes, sizes, sizeof sizes)) {
        if (!remember_shape(shape, sizes, 4))
            return 0;
        for (int d = 0; d < 4; d++) /* of a tuple that nobody else has seen */
            PyTuple_SetItem(shape->strides, d, PyLong_FromLongLong(strides[d]));
    }
    PyObject *size = own(shape->size), *stride = own(shape->strides);
    PyObject *made = allocate(table, size, stride, dtype, address);
    Py_DecRef(size);
    Py_DecRef(stride);
    return made;
}

/* Whether the tensor has the angles of these tokens, for rows like those of x. */
static int is_angle(const Table *table, PyObject *object, const Heads *heads, const Tensor *x, Tensor *angle) {
    return is_type(object, table->tensor_type, table->tensor_type) && !table->exchange->look(object, angle) &&
           angle->dims == 3 && (angle->sizes[0] == 1 || angle->sizes[0] == heads->batch) &&
           angle->sizes[1] == heads->length && angle->sizes[2] == x->sizes[3] && angle->dtype == x->dtype &&
           angle->device_type == x->device_type && angle->device == x->device && is_contiguous(angle) &&
           address_of(angle) % 32 == 0;
}

/* Starts the kernel for both and their rotation; 0 as `start_two`. */
static PyObject *start_rotated(Table *table, Side *query, Side *key, int head_axis, PyObject *const *angles) {
    Heads heads, key_heads;
    Tensor cos, sin;
    if (!read_heads(query, head_axis, &heads) || !read_heads(key, head_axis, &key_heads) ||
        heads.batch != key_heads.batch || heads.length != key_heads.length ||
        !is_angle(table, angles[0], &heads, &query->x, &cos) || !is_angle(table, angles[1], &heads, &query->x, &sin) ||
        cos.sizes[0] != sin.sizes[0])
        return 0;
    RowKind *row_kind = row_kind_for(table, &query->x, query->weight.dtype);
    Values values;
    void *stream = 0;
    const int two_level = row_kind && !(is_packed(query, row_kind->n) && is_packed(key, row_kind->n));
    const Kernel *kernel = kernel_of_two(table, row_kind, query, key, two_level, &values, &stream);
    if (!kernel || row_kind->out_dtype != row_kind->dtype)
        return 0;
    values.cos = address_of(&cos);
    values.sin = address_of(&sin);
    values.angles = cos.sizes[0] * cos.sizes[1];
    PyObject *first = allocate_heads(table, &row_kind->shape, &heads, row_kind->n, row_kind->out_dtype, &values.normed);
    PyObject *second =
        first ? allocate_heads(table, &row_kind->second, &key_heads, row_kind->n, row_kind->out_dtype, &values.normed2)
              : 0;
    return started_two(kernel, stream, &values, first, second);
}

/* rotated(query norm, key norm, head axis, query, key, cos, sin) -> both normed and rotated, [batch, heads, length, N]
 */
static PyObject *rotated(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Norm *norm = count == 7 ? norm_of(around.rotated, a[0]) : 0, *other = norm ? norm_of(around.rotated, a[1]) : 0;
    if (!other || norm->table != other->table)
        return own(NONE);
    const int head_axis = (int)PyLong_AsLongLong(a[2]);
    Side query = {a[0], a[3]}, key = {a[1], a[4]};
    PyObject *result = 0;
    if ((head_axis == 1 || head_axis == 2) && read_both(norm, other, &query, &key, read_tensors))
        result = start_rotated(norm->table, &query, &key, head_axis, a + 5);
    release_side(&query);
    release_side(&key);
    if (result)
        return result;
    PyErr_Clear();
    return own(NONE);
}
