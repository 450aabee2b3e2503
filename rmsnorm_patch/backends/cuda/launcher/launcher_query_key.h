/* The query's and the key's norm of an attention in one launch (rewrite/query_key.py): every check and the call in one
 * C function, as in launcher_pair.h.
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

/* Whether the tensors are such as a kernel reads. */
static int read_rows(const Table *table, Side *side) {
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
    return side->m > 0 && (is_contiguous(x) || strided_rows(x, &side->rows));
}

/* Starts the kernel for both. Sets *sure to 0 where the slow path has to decide; nothing has happened then. */
static PyObject *start_two(Table *table, Side *query, Side *key, int *sure) {
    RowKind *row_kind = row_kind_for(table, &query->x, query->weight.dtype);
    const int two_level = query->rows.inner || key->rows.inner;
    const Kernel *kernel = row_kind ? (two_level ? row_kind->two_level : row_kind->kernel) : 0;
    if (!kernel)
        return 0;
    while (query->m + key->m > kernel->m_max && kernel->next)
        kernel = kernel->next;
    const i64 strides = query->rows.stride | query->rows.outer | key->rows.stride | key->rows.outer;
    Values values;
    memset(&values, 0, sizeof values);
    values.x = address_of(&query->x);
    values.x2 = address_of(&key->x);
    if (query->weight_object != NONE) {
        values.weight = address_of(&query->weight);
        values.weight2 = address_of(&key->weight);
    }
    void *stream = 0;
    if (((values.x | values.x2 | (uint64_t)(strides * row_kind->itemsize)) & kernel->mask) ||
        ((values.weight | values.weight2) & kernel->weight_mask) ||
        table->exchange->current_stream(query->x.device_type, query->x.device, &stream))
        return 0;
    values.m = query->m;
    values.m2 = key->m;
    values.x_row_stride = query->rows.stride;
    values.x2_row_stride = key->rows.stride;
    values.inner_rows = query->rows.inner ? query->rows.inner : query->m;
    values.inner_rows2 = key->rows.inner ? key->rows.inner : key->m;
    values.x_outer_stride = query->rows.outer;
    values.x2_outer_stride = key->rows.outer;
    values.normed_row_stride = values.normed2_row_stride = row_kind->n;
    values.eps = (float)PyFloat_AsDouble(query->eps);

    PyObject *first = allocate_like(table, &row_kind->shape, &query->x, row_kind->out_dtype, &values.normed);
    PyObject *second =
        first ? allocate_like(table, &row_kind->second, &key->x, row_kind->out_dtype, &values.normed2) : 0;
    PyObject *result = second ? PyTuple_New(2) : 0;
    if (!result || start_plain(kernel, stream, &values)) { /* the slow path repeats it and words the error */
        PyObject *held[] = {first, second, result};
        for (int i = 0; i < 3; i++)
            if (held[i])
                Py_DecRef(held[i]);
        return 0;
    }
    PyTuple_SetItem(result, 0, first);
    PyTuple_SetItem(result, 1, second);
    *sure = 1;
    return result;
}

/* query_key(query norm, key norm, query, key) -> (norm of query, norm of key) */
static PyObject *query_key(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Norm *norm = count == 4 ? norm_of(around.query_key, a[0]) : 0, *other = norm ? norm_of(around.query_key, a[1]) : 0;
    if (!other || norm->table != other->table)
        return own(NONE);
    Side query = {a[0], a[2]}, key = {a[1], a[3]};
    PyObject *result = 0;
    int sure = 0;
    if (read_side(norm, &query) && read_side(other, &key) && PyObject_RichCompareBool(query.eps, key.eps, Py_EQ) == 1 &&
        nothing_watches() && read_rows(norm->table, &query) && read_rows(norm->table, &key) &&
        query.x.dtype == key.x.dtype && query.x.device == key.x.device && query.weight.dtype == key.weight.dtype &&
        query.x.sizes[query.x.dims - 1] == key.x.sizes[key.x.dims - 1])
        result = start_two(norm->table, &query, &key, &sure);
    release_side(&query);
    release_side(&key);
    if (sure)
        return result;
    PyErr_Clear();
    return own(NONE);
}
