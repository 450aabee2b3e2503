"""A kernel's launch arguments: the `struct Args` that its source declares, filled by name.

The declaration is the only place that knows the fields, their types and their order. The bytes of a launch are made
from it here. The launcher's hot path, which makes them itself, is told by name where each field lies.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from operator import itemgetter
from typing import NamedTuple

from ...errors import KernelBuildError

MAX_BYTES = 4096
"""Of one struct: what a launch takes on every device."""
_CODES = {"pointer": ("Q", 8), "i64": ("q", 8), "int": ("i", 4), "float": ("f", 4)}
_STRUCT = re.compile(r"\bstruct\s+Args\s*\{(.*?)\};", re.DOTALL)
_FIELD = re.compile(r"(?:const\s+)?(\w+)\s*(\*?)\s*(\w+)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class Field(NamedTuple):
    """One field: where it lies in the struct and how many bytes it takes."""

    name: str
    offset: int
    size: int


class Arguments:
    """The fields of one `struct Args`, in their order, and how many bytes it takes."""

    def __init__(self, source: str, types: Mapping[str, str]) -> None:
        """source: the kernel's file, for errors. types: "pointer", "i64", "int" or "float" by field name."""
        self.source = source
        fields, layout, end, widest = [], "<", 0, 1
        for name, kind in types.items():
            code, size = _CODES[kind]
            gap = -end % size
            layout += f"{gap}x{code}"
            fields.append(Field(name, end + gap, size))
            end, widest = end + gap + size, max(widest, size)
        layout += f"{-end % widest}x"
        self.fields = tuple(fields)
        self.names = tuple(types)
        self.size = end + -end % widest
        if not types or self.size > MAX_BYTES:
            raise self.error(f"{len(types)} fields of {self.size} bytes", f"1 to {MAX_BYTES} bytes", "pass a pointer")
        self._struct = struct.Struct(layout)
        self._in_order = itemgetter(*self.names) if len(types) > 1 else lambda values: (values[self.names[0]],)

    def pack(self, values: Mapping[str, float]) -> bytes:
        """The struct with these values, addresses as integers. KernelBuildError unless each field has exactly one."""
        try:
            packed = self._struct.pack(*self._in_order(values))
        except (KeyError, struct.error) as error:
            raise self._cannot(values, str(error)) from error
        if len(values) != len(self.names):
            raise self._cannot(values, "fields that it does not declare")
        return packed

    def pick(self, values: Mapping[str, float]) -> bytes:
        """`pack` of values some of which the struct may not declare."""
        return self._struct.pack(*self._in_order(values))

    def unpack(self, content: bytes) -> dict[str, float]:
        """The values in a struct's bytes, by name."""
        return dict(zip(self.names, self._struct.unpack(content), strict=True))

    def assertions(self) -> str:
        """CUDA C++ that does not compile unless the compiler lays the struct out as it was read. `__INTADDR__` is what
        `offsetof` is in NVRTC's front end; NVRTC has no header for it."""
        checks = [(f"sizeof(Args) == {self.size}", "Args")]
        checks += [
            (f"__INTADDR__(&((Args*)0)->{name}) == {offset} && sizeof(Args::{name}) == {size}", name)
            for name, offset, size in self.fields
        ]
        return "".join(f'static_assert({check}, "as the host reads {name}");\n' for check, name in checks)

    def error(self, got: str, supported: str, next_step: str) -> KernelBuildError:
        """An error of this declaration."""
        return KernelBuildError(f"kernels/cuda/{self.source}: struct Args", got, supported, next_step)

    def _cannot(self, values: Mapping[str, float], why: str) -> KernelBuildError:
        missing = [name for name in self.names if name not in values]
        unknown = [name for name in values if name not in self.names]
        got = f"no value for {missing}, and values for {unknown}" if missing or unknown else f"{values}: {why}"
        return self.error(got, f"one value for each of {', '.join(self.names)}", "name the fields as the kernel does")


def declared(source: str, text: str, headers: Mapping[str, str]) -> Arguments:
    """The arguments of the kernel file `source`, whose `text` or a header that it includes declares them.

    Raises KernelBuildError where there is no `struct Args`, more than one, or a field that is no pointer, i64, int or
    float.
    """
    found = [body for part in _included(text, headers) for body in _STRUCT.findall(_COMMENT.sub("", part))]
    if len(found) != 1:
        raise KernelBuildError(
            f"kernels/cuda/{source}",
            f"{len(found)} times `struct Args`",
            "one, in the file or in a header that it includes",
            "declare the kernel's launch arguments so",
        )
    types: dict[str, str] = {}
    for statement in filter(None, map(str.strip, found[0].split(";"))):
        match = _FIELD.fullmatch(statement)
        kind = "" if match is None else "pointer" if match[2] else match[1]
        if match is None or kind not in _CODES or match[3] in types:
            raise KernelBuildError(
                f"kernels/cuda/{source}: struct Args",
                repr(statement),
                "fields of different names, one a line: a pointer, i64, int or float",
                "declare the field so",
            )
        types[match[3]] = kind
    return Arguments(source, types)


def _included(text: str, headers: Mapping[str, str]) -> Iterator[str]:
    """`text` and each header that it includes, at any depth, once."""
    waiting, seen = [text], set()
    while waiting:
        part = waiting.pop()
        yield part
        for name in _INCLUDE.findall(part):
            if name not in seen and name in headers:
                seen.add(name)
                waiting.append(headers[name])
