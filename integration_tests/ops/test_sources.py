"""What compilers keep of graphs with our calls is kept under the source of the package too."""

from __future__ import annotations

from pathlib import Path

import rmsnorm_patch
from rmsnorm_patch.ops import sources


def test_any_source_of_a_package_changes_its_digest(tmp_path: Path) -> None:
    def written(**contents: str) -> str:
        for path in tmp_path.rglob("*.py"):
            path.unlink()
        for name, content in contents.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        return sources.digest_of(tmp_path)

    found = written(a="x = 1", room__b="y = 1")
    assert written(a="x = 1", room__b="y = 1") == found
    others = [
        written(a="x = 2", room__b="y = 1"),
        written(a="x = 1", room__b="y = 2"),
        written(a="x = 1", room__c="y = 1"),
        written(a="x = 1", b="y = 1"),
        written(a="x = 1"),
    ]
    assert len({found, *others}) == 6


def test_the_digest_is_the_package_s() -> None:
    package = Path(rmsnorm_patch.__file__).parent
    assert sources.digest() == sources.digest_of(package)
    assert (package / "vllm_plugin" / "calls.py").is_file()
