"""What the launcher hands to the driver: the bytes it is given, the grid, the attributes."""

from __future__ import annotations

import pytest
from recording_driver import CLUSTER, FUNCTION, PAIR, PARTIALS, PLAIN, PROGRAMMATIC, STREAM, kernel

from rmsnorm_patch.backends.cuda import launcher

ZEROS = PLAIN.pack(dict.fromkeys(PLAIN.names, 0))


def test_a_launch_starts_the_bytes_that_it_is_given(functions, recorded):
    for taken in (PLAIN, PAIR, PARTIALS):
        recorded.expect(taken)
        values = {name: i + 1 for i, name in enumerate(taken.names)} | {"eps": 0.5}
        assert functions.launch(kernel(functions, arguments=taken), STREAM, 3, taken.pack(values)) == 0
        last = recorded.last
        assert {name: last[name] for name in taken.names} == values
        assert (last["grid"], last["block"], last["stream"], last["function"]) == (3, 256, STREAM, FUNCTION)
        assert (last["count"], last["id0"], last["value0"]) == (1, PROGRAMMATIC, 1)


def test_arguments_of_another_kernel_are_not_started(functions, recorded):
    before = recorded.last["launches"]
    with pytest.raises(TypeError, match="another size"):
        functions.launch(kernel(functions, arguments=PAIR), STREAM, 3, ZEROS)
    assert recorded.last["launches"] == before


def test_launch_attributes(functions, recorded):
    functions.launch(kernel(functions, cluster=8), STREAM, 2, ZEROS)
    last = recorded.last
    assert (last["grid"], last["shared_bytes"]) == (16, 0)
    assert [last[name] for name in ("count", "id0", "value0", "id1", "value1")] == [2, CLUSTER, 8, PROGRAMMATIC, 1]
    functions.launch(kernel(functions, cluster=8, dependent=0), STREAM, 2, ZEROS)
    assert (recorded.last["count"], recorded.last["id0"]) == (1, CLUSTER)
    functions.launch(kernel(functions, dependent=0), STREAM, 2, ZEROS)
    assert recorded.last["count"] == 0


def test_no_rows_no_launch_and_too_many_rows_are_said(functions, recorded):
    before = recorded.last["launches"]
    handle = kernel(functions, cluster=2)
    assert functions.launch(handle, STREAM, 0, ZEROS) == 0
    assert functions.launch(handle, STREAM, 2**30, ZEROS) == launcher.TOO_MANY_ROWS
    assert recorded.last["launches"] == before


def test_another_context_is_pushed(functions, recorded):
    before = recorded.last["pushes"]
    recorded.library.set_context(99)
    functions.launch(kernel(functions), STREAM, 2, ZEROS)
    assert recorded.last["pushes"] == before + 1


def test_driver_error_is_returned(functions, recorded):
    recorded.library.set_result(719)
    assert functions.launch(kernel(functions), STREAM, 2, ZEROS) == 719
