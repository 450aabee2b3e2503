/* What the launcher must know of a torch tensor, through the DLPack exchange API that `torch.Tensor` offers
 * (`__dlpack_c_exchange_api__`, torch 2.10 and newer; DLPack 1.2): one C call for a tensor's address, dtype, device,
 * sizes and strides, where torch's Python methods take five. Errors mean "not sure" to the caller. */
#pragma once
#include "launcher_abi.h"

enum { MAX_DIMS = 16 };

/* The structures of dlpack.h; DLTensor's fields in its order. */
typedef struct {
    void *data;
    int32_t device_type, device;
    int32_t dims;
    uint32_t dtype;       /* code | bits << 8 | lanes << 16 */
    i64 *sizes, *strides; /* the tensor's own: valid while it lives and nobody resizes it */
    uint64_t byte_offset;
} Tensor;
typedef struct {
    struct {
        uint32_t major, minor;
        void *older;
    } header;
    void *allocate, *from_object, *to_object;
    int (*look)(PyObject *, Tensor *);
    int (*current_stream)(int32_t device_type, int32_t device, void **stream);
} Exchange;
enum { EXCHANGE_MAJOR = 1, EXCHANGE_MINOR = 2 };

static int is_type(PyObject *object, PyObject *a, PyObject *b) {
    PyObject *type = PyObject_Type(object);
    int same = type == a || type == b;
    Py_DecRef(type);
    return same;
}

static uint64_t address_of(const Tensor *tensor) { return (uint64_t)(uintptr_t)tensor->data + tensor->byte_offset; }

static int is_contiguous(const Tensor *tensor) {
    i64 expected = 1;
    for (int d = tensor->dims - 1; d >= 0; d--) {
        if (tensor->sizes[d] != 1 && tensor->strides[d] != expected)
            return 0;
        expected *= tensor->sizes[d];
    }
    return 1;
}

static int same_sizes(const Tensor *a, const i64 *sizes, int dims) {
    return a->dims == dims && memcmp(a->sizes, sizes, (size_t)dims * sizeof *sizes) == 0;
}

static int overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes) {
    return a < b + b_bytes && b < a + a_bytes;
}

/* Where the rows of a tensor lie: row r at (r / inner) * outer + (r % inner) * stride; inner == 0: one level. */
typedef struct {
    i64 stride, inner, outer;
} Rows;

/* The rows of a tensor that is not contiguous; 0 where no kernel can address them. */
static int strided_rows(const Tensor *tensor, Rows *rows) {
    i64 size[2] = {1, 1}, stride[2] = {0, 0}; /* levels from the innermost, after merging what lies evenly */
    const int last = tensor->dims - 1;
    int levels = 0;
    for (int d = last; d >= 0; d--) {
        const i64 step = tensor->strides[d], count = tensor->sizes[d];
        if (d == last) {
            if (step != 1 && count != 1)
                return 0;
        } else if (count == 1) {
            continue;
        } else if (levels && step == size[levels - 1] * stride[levels - 1]) {
            size[levels - 1] *= count;
        } else if (levels < 2 && (levels == 0 || step != 0)) {
            size[levels] = count;
            stride[levels++] = step;
        } else {
            return 0;
        }
    }
    rows->stride = levels ? stride[0] : tensor->sizes[last];
    rows->inner = levels == 2 ? size[0] : 0;
    rows->outer = stride[1];
    return 1;
}
