/* The hand-over of a normed tensor from a layer's last add to the norm that reads its sum (rewrite/handover.py): both
 * ends, and what must not have changed in between. Included by launcher_pair.h. */
#pragma once

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
    PyObject *fields = PyTuple_New(10);
    PyObject *values[] = {own(normed),
                          PyLong_FromUnsignedLongLong((uint64_t)(uintptr_t)total),
                          own(inference ? NONE : zero), /* the sum was made just now */
                          own(module),
                          own(served->weight),
                          written,
                          own(served->eps),
                          own(norm->kernel),
                          own(link),
                          own(s_cuda)};
    for (int i = 0; i < 10; i++)
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

/* The layer's sum with the next norm's result riding on it: a + b, or where `inner` is given, operand `side` of which
 * it norms before. */
static PyObject *hand(PyObject *classes, PyObject *layer, PyObject *inner, PyObject *side, PyObject *a, PyObject *b) {
    Served served = {0, 0, 0}, before = {0, 0, 0};
    PyObject *layer_state = classes ? PyObject_GenericGetDict(layer, 0) : 0, *total = 0;
    PyObject *ours = layer_state ? PyDict_GetItem(layer_state, s_state) : 0;
    PyObject *link = ours ? own(PyDict_GetItem(ours, s_next)) : 0, *module_of = 0, *module = 0, *state = 0,
             *untaken = 0;
    int sure = 0;
    if (!link)
        goto end;
    module_of = PyObject_GetAttr(link, s_norm);
    module = module_of ? PyObject_CallNoArgs(module_of) : 0;
    Norm *norm = module ? norm_of(classes, module) : 0; /* of None, too: nothing is registered for its class */
    Norm *first = norm && inner ? norm_of(classes, inner) : 0;
    untaken = norm ? PyObject_GetAttr(link, s_untaken) : 0;
    if (!untaken || PyLong_AsLongLong(untaken) >= around.max_untaken ||
        (inner && !(first && first->table == norm->table)))
        goto end;
    int inference = is_true_call(around.is_inference_mode_enabled);
    state = PyObject_GenericGetDict(module, 0);
    if (!state || !unhooked(state) || !undisturbed(layer_state, link, inference) || PyErr_Occurred())
        goto end;
    if (inner) {
        sure = read_norm(norm, module, state, &served) && serve_added(first, inner, side, a, b, &before, &served);
    } else {
        PyObject *operands[] = {a, b, 0, 0};
        sure = serve(norm, module, state, operands, 2, &served);
    }
    if (sure && served.result && carry(norm, module, link, PyLong_AsLongLong(untaken), inference, &served))
        total = own(PyTuple_GetItem(served.result, 1));
end:
    release(&served);
    release(&before);
    PyObject *held[] = {layer_state, link, module_of, module, state, untaken};
    for (int i = 0; i < 6; i++)
        if (held[i])
            Py_DecRef(held[i]);
    if (sure)
        return total;
    PyErr_Clear();
    return own(NONE);
}

/* hand_over(layer, a, b) -> a + b, with the next norm's result riding on it */
static PyObject *hand_over(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    return count == 3 ? hand(around.classes, a[0], 0, 0, a[1], a[2]) : own(NONE);
}

/* norm_hand_over(layer, inner, side, a, b) -> the sum of norm_add, with the next norm's result riding on it */
static PyObject *norm_hand_over(PyObject *self, PyObject *const *a, Py_ssize_t count) {
    return count == 5 ? hand(around.norm_add_norm, a[0], a[1], a[2], a[3], a[4]) : own(NONE);
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
    if (!norm && count == 2)
        norm = norm_of(around.norm_add_norm, a[0]);
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
