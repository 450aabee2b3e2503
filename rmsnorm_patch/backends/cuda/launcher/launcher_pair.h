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
    PyObject *classes;   /* dict: patched norm class -> capsule of its Norm with the fused op */
    PyObject *alone;     /* the same with the plain norm */
    PyObject *query_key; /* the same with two plain norms */
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
    *s_norm, *s_untaken, *s_places, *s_all_places, *s_receiver, *s_passive, *s_depth, *s_caller, *s_loop, *s_f_code,
    *s_version, *s_is_inference, *s_hooks[4], *zero;

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

/* The op of `norm` on operands[0..count), weight and eps. *sure and the result as in `fast`. */
static int serve(const Norm *norm, PyObject *module, PyObject *state, PyObject **operands, int count, Served *served) {
    int sure = 0;
    if (PyDict_GetItem(state, s_training) != (PyObject *)&_Py_FalseStruct || !nothing_watches())
        return 0;
    served->weight = weight_of(norm, state);
    served->eps = eps_of(norm, module);
    if (!served->weight || !served->eps)
        return 0;
    PyObject *type = PyObject_Type(served->eps);
    Py_DecRef(type);
    if (type != (PyObject *)&PyFloat_Type)
        return 0;
    operands[count] = served->weight;
    operands[count + 1] = served->eps;
    served->result = fast(norm->table, operands, &sure);
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

/* Whether every module of a hand-over is where it was (places.Places.unchanged). */
static int unchanged(PyObject *places) {
    PyObject *all = PyObject_GetAttr(places, s_all_places);
    if (!all)
        return 0;
    Py_ssize_t count = PyTuple_Size(all);
    int same = count > 0;
    for (Py_ssize_t i = 0; i < count && same; i++) {
        PyObject *place = PyTuple_GetItem(all, i); /* (holder, name, module, class of the module, children or None) */
        PyObject *holder = PyObject_CallNoArgs(PyTuple_GetItem(place, 0));
        PyObject *module = PyObject_CallNoArgs(PyTuple_GetItem(place, 2));
        PyObject *among = PyTuple_GetItem(place, 4);
        same = holder && module && holder != NONE && module != NONE;
        if (same) {
            PyObject *type = PyObject_Type(module), *state = PyObject_GenericGetDict(holder, 0);
            PyObject *modules = state ? PyDict_GetItem(state, s_modules) : 0;
            same = type == PyTuple_GetItem(place, 3) && modules &&
                   PyDict_GetItem(modules, PyTuple_GetItem(place, 1)) == module &&
                   (among == NONE || PyDict_Size(modules) == PyLong_AsLongLong(among));
            Py_DecRef(type);
            if (state)
                Py_DecRef(state);
        }
        if (holder)
            Py_DecRef(holder);
        if (module)
            Py_DecRef(module);
    }
    Py_DecRef(all);
    return same;
}

/* Whether the code of the frame `link.<up>` above the caller of `hand_over` is `code`. */
static int runs_above(PyObject *link, PyObject *up, PyObject *code) {
    PyObject *depth = PyObject_GetAttr(link, up);
    PyObject *frame = depth ? PyObject_CallFunctionObjArgs(around.getframe, depth, 0) : 0;
    int same = frame && is_attribute(frame, s_f_code, code);
    if (depth)
        Py_DecRef(depth);
    if (frame)
        Py_DecRef(frame);
    return same;
}

/* No foreign code can see the sum between the add and the norm that reads it (layer_calls._undisturbed,
 * _called_by_loop).
 */
static int undisturbed(PyObject *layer_state, PyObject *link, int inference) {
    if (!is_empty(layer_state, s_hooks[0]) || PyDict_GetItem(layer_state, s_forward))
        return 0;
    PyObject *places = PyObject_GetAttr(link, s_places), *receiver_of = PyObject_GetAttr(link, s_receiver);
    PyObject *loop = PyObject_GetAttr(link, s_loop);
    int calm =
        places && receiver_of && loop && (!inference || is_attribute(link, s_passive, (PyObject *)&_Py_TrueStruct));
    calm = calm && runs_above(link, s_depth, loop) && runs_above(link, s_caller, around.call_impl) && unchanged(places);
    if (calm && receiver_of != NONE) {
        PyObject *receiver = PyObject_CallNoArgs(receiver_of);
        PyObject *state = receiver && receiver != NONE ? PyObject_GenericGetDict(receiver, 0) : 0;
        calm = state && is_empty(state, s_hooks[1]) && !PyDict_GetItem(state, s_forward);
        if (state)
            Py_DecRef(state);
        if (receiver)
            Py_DecRef(receiver);
    }
    PyObject *held[] = {places, receiver_of, loop};
    for (int i = 0; i < 3; i++)
        if (held[i])
            Py_DecRef(held[i]);
    return calm;
}

/* A new reference: the tensor's version, or None where none is counted. */
static PyObject *version_of(PyObject *tensor) {
    PyObject *inference = PyObject_CallMethodObjArgs(tensor, s_is_inference, 0);
    if (!inference)
        return 0;
    int uncounted = PyObject_IsTrue(inference);
    Py_DecRef(inference);
    return uncounted ? own(NONE) : PyObject_GetAttr(tensor, s_version);
}

/* Puts handover.Carry on the sum. Gives 0 with an error set where that fails. */
static int carry(const Norm *norm, PyObject *module, PyObject *link, i64 untaken, int inference, const Served *served) {
    PyObject *normed = PyTuple_GetItem(served->result, 0), *total = PyTuple_GetItem(served->result, 1);
    PyObject *written = served->weight == NONE ? own(NONE) : version_of(served->weight);
    PyObject *fields = PyTuple_New(9);
    PyObject *values[] = {own(normed),
                          PyLong_FromUnsignedLongLong((uint64_t)(uintptr_t)total),
                          own(inference ? NONE : zero), /* the sum was made just now */
                          own(module),
                          own(served->weight),
                          written,
                          own(served->eps),
                          own(norm->kernel),
                          own(link)};
    for (int i = 0; i < 9; i++)
        PyTuple_SetItem(fields, i, values[i]);
    PyObject *carried = written ? PyObject_CallFunctionObjArgs(around.tuple_new, around.carry_type, fields, 0) : 0;
    Py_DecRef(fields);
    PyObject *count = PyLong_FromLongLong(untaken + 1);
    int done =
        carried && PyObject_SetAttr(link, s_untaken, count) == 0 && PyObject_SetAttr(total, s_carried, carried) == 0;
    Py_DecRef(count);
    if (carried)
        Py_DecRef(carried);
    return done;
}

/* hand_over(layer, a, b) -> a + b, with the next norm's result riding on it */
static PyObject *hand_over(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    Served served = {0, 0, 0};
    PyObject *layer_state = count == 3 && around.classes ? PyObject_GenericGetDict(a[0], 0) : 0, *total = 0;
    PyObject *ours = layer_state ? PyDict_GetItem(layer_state, s_state) : 0;
    PyObject *link = ours ? own(PyDict_GetItem(ours, s_next)) : 0, *module_of = 0, *module = 0, *state = 0,
             *untaken = 0;
    int sure = 0;
    if (!link)
        goto end;
    module_of = PyObject_GetAttr(link, s_norm);
    module = module_of ? PyObject_CallNoArgs(module_of) : 0;
    Norm *norm = module ? norm_of(around.classes, module) : 0; /* of None, too: nothing is registered for its class */
    untaken = norm ? PyObject_GetAttr(link, s_untaken) : 0;
    if (!untaken || PyLong_AsLongLong(untaken) >= around.max_untaken)
        goto end;
    int inference = is_true_call(around.is_inference_mode_enabled);
    state = PyObject_GenericGetDict(module, 0);
    if (!state || !unhooked(state) || !undisturbed(layer_state, link, inference) || PyErr_Occurred())
        goto end;
    PyObject *operands[] = {a[1], a[2], 0, 0};
    sure = serve(norm, module, state, operands, 2, &served);
    if (sure && served.result && carry(norm, module, link, PyLong_AsLongLong(untaken), inference, &served))
        total = own(PyTuple_GetItem(served.result, 1));
end:
    release(&served);
    PyObject *held[] = {layer_state, link, module_of, module, state, untaken};
    for (int i = 0; i < 6; i++)
        if (held[i])
            Py_DecRef(held[i]);
    if (sure)
        return total;
    PyErr_Clear();
    return own(NONE);
}

/* Whether what was handed over is what the norm would compute now (handover.take). */
static int is_current(PyObject *carried, const Norm *norm, PyObject *module, PyObject *state, PyObject *x) {
    PyObject *version = PyTuple_GetItem(carried, 2), *written = PyTuple_GetItem(carried, 5);
    if (PyTuple_GetItem(carried, 3) != module || PyTuple_GetItem(carried, 7) != norm->kernel ||
        PyLong_AsUnsignedLongLong(PyTuple_GetItem(carried, 1)) != (uint64_t)(uintptr_t)x)
        return 0;
    PyObject *weight = weight_of(norm, state), *eps = eps_of(norm, module);
    int same = weight && eps && weight == PyTuple_GetItem(carried, 4) &&
               PyObject_RichCompareBool(eps, PyTuple_GetItem(carried, 6), Py_EQ) == 1;
    PyObject *now[] = {version == NONE ? own(NONE) : PyObject_GetAttr(x, s_version),
                       written == NONE || !same ? own(NONE) : PyObject_GetAttr(weight, s_version)};
    same = same && now[0] && now[1] && PyObject_RichCompareBool(now[0], version, Py_EQ) == 1 &&
           PyObject_RichCompareBool(now[1], written, Py_EQ) == 1;
    PyObject *held[] = {weight, eps, now[0], now[1]};
    for (int i = 0; i < 4; i++)
        if (held[i])
            Py_DecRef(held[i]);
    return same;
}

/* take(norm, x) -> the normed tensor that rides on x */
static PyObject *take(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    PyObject *normed = 0, *riding = 0, *state = 0, *carried = 0;
    Norm *norm = count == 2 ? norm_of(around.classes, a[0]) : 0;
    if (!norm || !is_type(a[1], norm->table->tensor_type, norm->table->tensor_type))
        return own(NONE);
    riding = PyObject_GenericGetDict(a[1], 0);
    carried = riding ? own(PyDict_GetItem(riding, s_carried)) : 0;
    state = carried ? PyObject_GenericGetDict(a[0], 0) : 0;
    if (state && unhooked(state) && is_true_call(around.is_grad_enabled) == 0) {
        PyDict_DelItem(riding, s_carried);
        if (is_current(carried, norm, a[0], state, a[1])) {
            normed = own(PyTuple_GetItem(carried, 0));
            PyObject_SetAttr(PyTuple_GetItem(carried, 8), s_untaken, zero);
        }
    }
    PyObject *held[] = {riding, carried, state};
    for (int i = 0; i < 3; i++)
        if (held[i])
            Py_DecRef(held[i]);
    PyErr_Clear();
    return normed ? normed : own(NONE);
}

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

/* set_surroundings(classes, alone, unwatched, function_modes, function_mode_watches, transform, forward_ad,
 * is_grad_enabled, is_inference_mode_enabled, getframe, code of Module._call_impl, Carry, tuple.__new__, max_untaken,
 * global hooks (4-tuple), query_key): once a process. */
static PyObject *set_surroundings(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    if (count != 16 || PyTuple_Size(a[14]) != GLOBAL_HOOKS) {
        PyErr_SetString(PyExc_TypeError, "set_surroundings takes 16 arguments");
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
        around.global_hooks[i] = own(PyTuple_GetItem(a[14], i));
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
        *places[i] = own(a[2 + i]);
    around.max_untaken = PyLong_AsLongLong(a[13]);
    around.classes = own(a[0]);
    around.alone = own(a[1]);
    around.query_key = own(a[15]);
    return own(NONE);
}
