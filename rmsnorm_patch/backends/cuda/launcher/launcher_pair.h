/* The eager decode path of a patched model (rewrite/layer_calls.py): a residual-add with its norm, the hand-over of a
 * normed tensor from a layer's last add to the next norm, its reading, and a norm alone (rewrite/norms.py). Each is one
 * call that makes every check itself: between the operations of a whole model a Python function costs several times
 * what a tight loop shows, a dictionary look-up from C does not. None means "not sure": nothing has happened, and the
 * Python code of layer_calls.py decides.
 *
 * Included by launcher.c after `fast`. */
#pragma once
#include "launcher_abi.h"

/* How to read the weight and eps of one patched norm class, and the op that serves it. */
typedef struct {
    Table *table;
    PyObject *kernel;      /* layer_calls.NormKernel, for the hand-over's reader */
    PyObject *weight_name; /* 0: a weightless norm */
    PyObject *eps_name;    /* 0: always `eps` */
    PyObject *eps;
} Norm;

enum { GLOBAL_HOOKS = 4 };

/* What `set_surroundings` was given; process-wide, as torch's own state is. */
static struct {
    PyObject *classes;                  /* dict: patched norm class -> capsule of its Norm with the fused op */
    PyObject *alone;                    /* the same with the plain norm */
    PyObject *norm_add, *norm_add_norm; /* the same with the ops of the add behind a norm */
    PyObject *query_key, *rotated;      /* the same with two plain norms, without and with their rotation */
    PyObject *unwatched; /* tuple of functions that give False or 0 while nothing around must see the ops */
    PyObject *function_modes,
        *function_mode_watches; /* how many there are; whether one is more than a default device */
    PyObject *transform;        /* gives None outside function transforms */
    PyObject *forward_ad;       /* dict of torch.autograd.forward_ad; `_current_level` is negative outside of it */
    PyObject *global_hooks[GLOBAL_HOOKS];
    PyObject *is_grad_enabled, *is_inference_mode_enabled, *getframe, *call_impl;
    PyObject *carry_type, *tuple_new;
    i64 max_untaken;
} around;

static PyObject *s_forward, *s_training, *s_parameters, *s_buffers, *s_modules, *s_state, *s_next, *s_carried, *s_level,
    *s_norm, *s_cuda, *s_untaken, *s_places, *s_all_places, *s_receiver, *s_passive, *s_depth, *s_caller, *s_loop,
    *s_f_code, *s_version, *s_is_inference, *s_hooks[4], *zero;

/* Whether no mode, transform, autocast, tracer or gradient may have to see the ops (guards.ambient). */
static int nothing_watches(void) {
    for (Py_ssize_t i = 0; i < PyTuple_Size(around.unwatched); i++)
        if (is_true_call(PyTuple_GetItem(around.unwatched, i)))
            return 0;
    if (is_true_call(around.function_modes) && is_true_call(around.function_mode_watches))
        return 0;
    PyObject *transform = PyObject_CallNoArgs(around.transform);
    if (!transform)
        return 0;
    Py_DecRef(transform);
    PyObject *level = PyDict_GetItem(around.forward_ad, s_level);
    return transform == NONE && level && PyLong_AsLongLong(level) < 0;
}

static int is_empty(PyObject *state, PyObject *name) {
    PyObject *hooks = PyDict_GetItem(state, name);
    return hooks && PyDict_Size(hooks) == 0;
}

/* False where somebody watches or wraps the norm. state: its __dict__. */
static int unhooked(PyObject *state) {
    for (int i = 0; i < 4; i++)
        if (!is_empty(state, s_hooks[i]))
            return 0;
    for (int i = 0; i < GLOBAL_HOOKS; i++)
        if (PyDict_Size(around.global_hooks[i]) != 0)
            return 0;
    return !PyDict_GetItem(state, s_forward);
}

static Norm *norm_of(PyObject *classes, PyObject *module) {
    PyObject *type = PyObject_Type(module);
    PyObject *capsule = classes ? PyDict_GetItem(classes, type) : 0;
    Py_DecRef(type);
    return capsule ? PyCapsule_GetPointer(capsule, "rmsnorm_patch.norm") : 0;
}

/* New references to the weight (None: weightless) and eps that the norm has now; 0 where they are not where they were.
 */
static PyObject *weight_of(const Norm *norm, PyObject *state) {
    if (!norm->weight_name)
        return own(NONE);
    PyObject *held = PyDict_GetItem(state, s_parameters);
    PyObject *weight = held ? PyDict_GetItem(held, norm->weight_name) : 0;
    if (!weight || weight == NONE) {
        held = PyDict_GetItem(state, s_buffers);
        weight = held ? PyDict_GetItem(held, norm->weight_name) : 0;
    }
    return weight == NONE ? 0 : own(weight);
}

static PyObject *eps_of(const Norm *norm, PyObject *module) {
    PyObject *eps = norm->eps_name ? PyObject_GetAttr(module, norm->eps_name) : own(norm->eps);
    if (eps == NONE) {
        Py_DecRef(eps);
        return own(norm->eps);
    }
    return eps;
}

typedef struct {
    PyObject *weight, *eps, *result; /* result: (normed, total), or the normed tensor */
} Served;

static void release(Served *served) {
    PyObject *held[] = {served->weight, served->eps, served->result};
    for (int i = 0; i < 3; i++)
        if (held[i])
            Py_DecRef(held[i]);
}

/* The weight and eps that the norm has now; 0 where it trains, or where they are none that a kernel takes. */
static int read_norm(const Norm *norm, PyObject *module, PyObject *state, Served *served) {
    if (PyDict_GetItem(state, s_training) != (PyObject *)&_Py_FalseStruct)
        return 0;
    served->weight = weight_of(norm, state);
    served->eps = eps_of(norm, module);
    if (!served->weight || !served->eps)
        return 0;
    PyObject *type = PyObject_Type(served->eps);
    Py_DecRef(type);
    return type == (PyObject *)&PyFloat_Type;
}

/* The op of `norm` on operands[0..count), weight and eps. *sure and the result as in `fast`. */
static int serve(const Norm *norm, PyObject *module, PyObject *state, PyObject **operands, int count, Served *served) {
    int sure = 0;
    if (!nothing_watches() || !read_norm(norm, module, state, served))
        return 0;
    operands[count] = served->weight;
    operands[count + 1] = served->eps;
    served->result = fast(norm->table, operands, &sure);
    return sure;
}

/* norm_add and its kin: operand `side` of a and b is what `inner` norms, the other one is added to that; then `next`,
 * read already, norms the sum where it is not 0. The result is kept by `next`, else by `inner`. */
static int serve_added(const Norm *norm, PyObject *inner, PyObject *side, PyObject *a, PyObject *b, Served *served,
                       Served *next) {
    PyObject *state = PyObject_GenericGetDict(inner, 0);
    const int left = PyObject_IsTrue(side) == 0;
    int sure = 0;
    if (state && unhooked(state) && nothing_watches() && read_norm(norm, inner, state, served)) {
        PyObject *operands[] = {left ? a : b,        left ? b : a, served->weight, served->eps, next ? next->weight : 0,
                                next ? next->eps : 0};
        (next ? next : served)->result = fast(norm->table, operands, &sure);
    }
    if (state)
        Py_DecRef(state);
    return sure;
}

/* alone(norm, x) -> norm(x), called from the norm's own forward: hooks are the module call's business. None where a
 * normed tensor may ride on x. */
static PyObject *alone(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Norm *norm = count == 2 ? norm_of(around.alone, a[0]) : 0;
    if (!norm || !is_type(a[1], norm->table->tensor_type, norm->table->tensor_type))
        return own(NONE);
    Served served = {0, 0, 0};
    PyObject *riding = PyObject_GenericGetDict(a[1], 0), *state = PyObject_GenericGetDict(a[0], 0);
    PyObject *operands[] = {a[1], 0, 0};
    int sure = riding && state && !PyDict_GetItem(riding, s_carried) && serve(norm, a[0], state, operands, 1, &served);
    PyObject *result = own(served.result);
    release(&served);
    PyObject *held[] = {riding, state};
    for (int i = 0; i < 2; i++)
        if (held[i])
            Py_DecRef(held[i]);
    if (sure)
        return result;
    PyErr_Clear();
    return own(NONE);
}

/* in_layer(norm, a, b) -> (normed, a + b) */
static PyObject *in_layer(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Norm *norm = count == 3 ? norm_of(around.classes, a[0]) : 0;
    if (!norm)
        return own(NONE);
    Served served = {0, 0, 0};
    PyObject *state = PyObject_GenericGetDict(a[0], 0);
    PyObject *operands[] = {a[1], a[2], 0, 0};
    int sure = state && unhooked(state) && serve(norm, a[0], state, operands, 2, &served);
    PyObject *result = own(served.result);
    release(&served);
    if (state)
        Py_DecRef(state);
    if (sure)
        return result;
    PyErr_Clear();
    return own(NONE);
}

/* norm_add(inner, side, a, b) -> a + b, operand `side` of which `inner` norms before it is added */
static PyObject *norm_add(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Norm *norm = count == 4 ? norm_of(around.norm_add, a[0]) : 0;
    if (!norm)
        return own(NONE);
    Served served = {0, 0, 0};
    int sure = serve_added(norm, a[0], a[1], a[2], a[3], &served, 0);
    PyObject *result = own(served.result);
    release(&served);
    if (sure)
        return result;
    PyErr_Clear();
    return own(NONE);
}

/* norm_add_norm(norm, inner, side, a, b) -> (norm(sum), sum), sum as in norm_add */
static PyObject *norm_add_norm(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Norm *norm = count == 5 ? norm_of(around.norm_add_norm, a[0]) : 0;
    Norm *inner = norm ? norm_of(around.norm_add_norm, a[1]) : 0;
    if (!inner || inner->table != norm->table)
        return own(NONE);
    Served served = {0, 0, 0}, next = {0, 0, 0};
    PyObject *state = PyObject_GenericGetDict(a[0], 0);
    int sure = state && unhooked(state) && read_norm(norm, a[0], state, &next) &&
               serve_added(inner, a[1], a[2], a[3], a[4], &served, &next);
    PyObject *result = own(next.result);
    release(&served);
    release(&next);
    if (state)
        Py_DecRef(state);
    if (sure)
        return result;
    PyErr_Clear();
    return own(NONE);
}

#include "launcher_hand_over.h"

/* new_norm(table, kernel, weight name or None, eps name or None, eps) -> capsule, to be put into the dict of classes */
static PyObject *new_norm(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 5) {
        PyErr_SetString(PyExc_TypeError, "new_norm takes 5 arguments");
        return 0;
    }
    Table *table = PyCapsule_GetPointer(a[0], "rmsnorm_patch.table");
    if (!table)
        return 0;
    Norm *norm = calloc(1, sizeof *norm);
    norm->table = table;
    norm->kernel = own(a[1]);
    norm->weight_name = a[2] == NONE ? 0 : own(a[2]);
    norm->eps_name = a[3] == NONE ? 0 : own(a[3]);
    norm->eps = own(a[4]);
    Py_IncRef(a[0]); /* the table lives as long */
    return PyCapsule_New(norm, "rmsnorm_patch.norm", 0);
}

/* set_surroundings(classes, alone, norm_add, norm_add_norm, unwatched, function_modes, function_mode_watches,
 * transform, forward_ad, is_grad_enabled, is_inference_mode_enabled, getframe, code of Module._call_impl, Carry,
 * tuple.__new__, max_untaken, global hooks (4-tuple), query_key, rotated): once a process. */
static PyObject *set_surroundings(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 19 || PyTuple_Size(a[16]) != GLOBAL_HOOKS) {
        PyErr_SetString(PyExc_TypeError, "set_surroundings takes 19 arguments");
        return 0;
    }
    static const char *const names[] = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks",
                                        "_backward_pre_hooks"};
    for (int i = 0; i < 4; i++)
        s_hooks[i] = PyUnicode_InternFromString(names[i]);
    struct {
        PyObject **place;
        const char *text;
    } strings[] = {{&s_forward, "forward"},
                   {&s_training, "training"},
                   {&s_parameters, "_parameters"},
                   {&s_buffers, "_buffers"},
                   {&s_modules, "_modules"},
                   {&s_state, "_rmsnorm_patch"},
                   {&s_next, "next"},
                   {&s_carried, "_rmsnorm_patch_normed"},
                   {&s_level, "_current_level"},
                   {&s_norm, "norm"},
                   {&s_cuda, "cuda"},
                   {&s_untaken, "untaken"},
                   {&s_places, "places"},
                   {&s_all_places, "_places"},
                   {&s_receiver, "receiver"},
                   {&s_passive, "passive"},
                   {&s_depth, "depth"},
                   {&s_caller, "caller"},
                   {&s_loop, "loop"},
                   {&s_f_code, "f_code"},
                   {&s_version, "_version"},
                   {&s_is_inference, "is_inference"}};
    for (unsigned i = 0; i < sizeof strings / sizeof *strings; i++)
        *strings[i].place = PyUnicode_InternFromString(strings[i].text);
    zero = PyLong_FromLongLong(0);
    for (int i = 0; i < GLOBAL_HOOKS; i++)
        around.global_hooks[i] = own(PyTuple_GetItem(a[16], i));
    PyObject **places[] = {&around.unwatched,
                           &around.function_modes,
                           &around.function_mode_watches,
                           &around.transform,
                           &around.forward_ad,
                           &around.is_grad_enabled,
                           &around.is_inference_mode_enabled,
                           &around.getframe,
                           &around.call_impl,
                           &around.carry_type,
                           &around.tuple_new};
    for (int i = 0; i < 11; i++)
        *places[i] = own(a[4 + i]);
    around.max_untaken = PyLong_AsLongLong(a[15]);
    around.classes = own(a[0]);
    around.alone = own(a[1]);
    around.norm_add = own(a[2]);
    around.norm_add_norm = own(a[3]);
    around.query_key = own(a[17]);
    around.rotated = own(a[18]);
    return own(NONE);
}
