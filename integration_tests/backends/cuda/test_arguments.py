"""The launch arguments that a kernel's source declares: read, filled by name, laid out as the compiler does."""

from __future__ import annotations

import ctypes

import pytest

from rmsnorm_patch.backends.cuda import arguments, jit, nvrtc
from rmsnorm_patch.errors import KernelBuildError
from rmsnorm_patch.kernel_files import kernels_dir

STRUCT = """#include "deep.cuh"
struct Args {
    const void* x;  // X_T [m, N]; a comment
    float eps;
    int groups; /* two
    lines */
    float scale;
    i64 m;
    int last;
};
"""


def declared(text: str, **headers: str) -> arguments.Arguments:
    return arguments.declared("some.cu", text, {f"{name}.cuh": header for name, header in headers.items()})


def test_fields_lie_as_a_c_compiler_lays_them_out():
    class Args(ctypes.Structure):
        _fields_ = (
            ("x", ctypes.c_void_p),
            ("eps", ctypes.c_float),
            ("groups", ctypes.c_int),
            ("scale", ctypes.c_float),
            ("m", ctypes.c_int64),
            ("last", ctypes.c_int),
        )

    read = declared(STRUCT)
    expected = [(name, getattr(Args, name).offset, getattr(Args, name).size) for name, _ in Args._fields_]
    assert [tuple(field) for field in read.fields] == expected
    assert read.size == ctypes.sizeof(Args)
    values = {"x": 2**63 + 8, "eps": 0.5, "groups": -3, "scale": 2.0, "m": -(2**40), "last": 7}
    packed = read.pack(values)
    placed = Args.from_buffer_copy(packed)
    assert {name: getattr(placed, name) for name, _ in Args._fields_} == values == read.unpack(packed)
    assert read.pick({**values, "another": 1}) == packed


def test_the_declaration_may_stand_in_a_header():
    text = '#include "outer.cuh"\n'
    read = declared(text, outer='#include "inner.cuh"', inner="struct Args {\n    i64 m;\n};\n", other=STRUCT)
    assert (read.names, read.pack({"m": 3})) == (("m",), (3).to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("int m;", "0 times `struct Args`"),
        ("// struct Args { i64 m; };", "0 times `struct Args`"),
        (STRUCT + STRUCT, "2 times `struct Args`"),
        ("struct Args { double m; };", "'double m'"),
        ("struct Args { i64 m, n; };", "'i64 m, n'"),
        ("struct Args { i64 m; float m; };", "'float m'"),
        ("struct Args { i64 strides[4]; };", r"'i64 strides\[4\]'"),
        ("struct Args { };", "0 fields"),
        ("struct Args {" + "".join(f"i64 f{i};" for i in range(513)) + "};", "4104 bytes"),
    ],
)
def test_what_cannot_be_read_is_named(text, got):
    with pytest.raises(KernelBuildError, match=got) as caught:
        declared(text)
    assert "some.cu" in caught.value.site
    assert caught.value.next_step


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({"x": 1}, r"no value for \['eps'\]"),
        ({"x": 1, "eps": 1.0, "y": 2}, r"values for \['y'\]"),
        ({"x": 1, "epsilon": 1.0}, r"no value for \['eps'\], and values for \['epsilon'\]"),
        ({"x": -1, "eps": 1.0}, "-1"),
        ({"x": 1.5, "eps": 1.0}, "1.5"),
    ],
)
def test_a_launch_names_each_field_once(values, got):
    read = declared("struct Args { void* x; float eps; };")
    with pytest.raises(KernelBuildError, match=got) as caught:
        read.pack(values)
    assert caught.value.supported == "one value for each of x, eps"


def test_every_kernel_declares_its_own():
    sources = [path.name for path in (kernels_dir() / "cuda").glob("*.cu")]
    assert len(sources) >= 4
    read = {source: jit.source_of(source).arguments for source in sources}
    assert all("eps" in each.names for source, each in read.items() if source.startswith("rms_norm"))
    assert "scale_group_stride" in read["silu_and_mul_quantised.cu"].names
    assert "m2" in read["rms_norm_pair.cu"].names
    assert "part_stride" in read["rms_norm_partials.cu"].names


def test_the_compiler_refuses_a_layout_that_was_read_otherwise(build, kernel_folder, cache_dir):
    if nvrtc.find() is None:
        pytest.skip("NVRTC is not installed")
    assert jit.machine_code(build())
    source = kernel_folder / "cuda" / "scale_rows.cu"
    packed = source.read_text().replace("struct Args {", "#pragma pack(4)\nstruct Args {\n    float first;")
    for text, named in ((packed, "as the host reads"), (packed.replace("#pragma pack(4)", ""), "")):
        source.write_text(text)
        jit.source_of.cache_clear()
        if named:
            with pytest.raises(KernelBuildError, match=named):
                jit.machine_code(build())
        else:
            assert jit.machine_code(build())
