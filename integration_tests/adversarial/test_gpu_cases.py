"""Every bad-input case of shape, numerics and device has a test among the GPU tests; read, not run."""

from __future__ import annotations

import ast
from pathlib import Path

GPU = Path(__file__).parents[1] / "gpu" / "test_adversarial.py"


def numbers(function: ast.FunctionDef) -> set[int]:
    marks = [d for d in function.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "case"]
    return {ast.literal_eval(argument) for mark in marks for argument in mark.args}


def test_cases_1_to_27_and_32_to_42_have_a_gpu_test():
    functions = [f for f in ast.parse(GPU.read_text()).body if isinstance(f, ast.FunctionDef)]
    tests = [f for f in functions if f.name.startswith("test_")]
    assert all(numbers(test) for test in tests), [test.name for test in tests if not numbers(test)]
    assert set().union(*map(numbers, tests)) == {*range(1, 28), *range(32, 43)}
