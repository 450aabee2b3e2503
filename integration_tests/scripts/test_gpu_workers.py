"""Which worker runs which of vLLM's GPU tests: a file that shares engines stays whole, one that does not is spread."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import defaultdict

TESTS = "import pytest\n\n@pytest.mark.parametrize('number', range(4))\ndef test_it(number): pass\n"


def test_tests_that_share_engines_stay_together(repository, tmp_path):
    folder = repository / "integration_tests" / "gpu"
    shutil.copy(folder / "conftest.py", tmp_path)
    names = ("test_vllm_engine.py", "test_vllm_quantised.py")
    for name in names:
        assert (folder / name).exists()
        (tmp_path / name).write_text(TESTS)
    words = ["-v", "-n", "3", "--dist", "loadfile", "--rootdir", str(tmp_path), "-p", "no:cacheprovider", *names]
    ended = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-1000:]
    workers = defaultdict(set)
    for worker, name in re.findall(r"\[(gw\d)\] \[ *\d+%\] PASSED (\w+\.py)", ended.stdout):
        workers[name].add(worker)
    engine, quantised = (workers[name] for name in names)
    assert len(engine) == 1
    assert len(quantised) > 1
