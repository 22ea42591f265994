"""The CUDA kernel without a GPU: its code for each architecture, its arithmetic on the host.

Only a GPU can test the rest: the kernel's barriers, shared memory of another thread block, the
launch itself, the device's own exponential and division.
"""

import ctypes
import importlib.util
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdiff.kernels.contract import verify
from fastdiff.kernels.dispatch import NATIVE, implementation
from fastdiff.kernels.group_norm_silu import cuda
from fastdiff.kernels.group_norm_silu.spec import SPEC, Arguments
from fastdiff.kernels.occupancy import SMS

ROOT = Path(__file__).parent.parent.parent
_module = importlib.util.spec_from_file_location("cuda_code", ROOT / "tools" / "cuda_code.py")
cuda_code = importlib.util.module_from_spec(_module)
_module.loader.exec_module(cuda_code)

needs_nvcc = pytest.mark.skipif(cuda_code.nvcc() is None, reason="there is no nvcc")
TOO_LARGE = {"vae-top"}
REFUSED = {c.name for c in SPEC.cases if c.get("scaled") or c.get("act") == "gelu"}
KEPT = {c.name for c in SPEC.cases if c.get("keep") or (c.get("C2") and c.get("residual"))}
LARGE = 1 << 20  # elements; larger cases run in one dtype only, to save time
RUN = [
    pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
    for case in SPEC.cases
    for dtype in SPEC.dtypes
    if case.name not in TOO_LARGE | REFUSED | KEPT
    if dtype == torch.float16 or case.B * case.Y * case.X * case.C < LARGE
]


def pick(case, size, arch, **options):
    width = (case.C + case.get("C2", 0)) // case.G
    return cuda.pick(case.B, case.Y * case.X, width, case.G, size, arch, **options)


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    """emulate(backwards, shared): a `call` for cuda.start that runs the kernel on the host.

    backwards: run the threads in reverse order. shared: a list, to which a call appends the bytes
    of a block's shared memory.
    """
    library = tmp_path_factory.mktemp("cuda") / "host.so"
    options = ("-x", "c++", "-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC")
    options += ("-cudart", "none", "-cudadevrt", "none")  # runs without the CUDA runtime
    source = ROOT / "csrc" / "cuda" / "group_norm_silu_host.cpp"
    subprocess.run([cuda_code.nvcc(), *options, "-o", library, source], check=True)
    function = ctypes.CDLL(str(library)).emulate
    function.restype = ctypes.c_int64

    def call(backwards, shared, dtype, vector, addresses, sizes, eps, silu):
        pointers = (ctypes.c_uint64 * len(addresses))(*addresses)
        integers = (ctypes.c_int64 * len(sizes))(*sizes)
        flags = map(ctypes.c_bool, (silu, backwards))
        number = ctypes.c_float(eps)
        shared.append(function(dtype, ctypes.c_bool(vector), pointers, integers, number, *flags))

    return lambda backwards=False, shared=None: partial(
        call, backwards, [] if shared is None else shared
    )


@needs_nvcc
@pytest.mark.parametrize(("case", "dtype"), RUN)
def test_arithmetic_is_within_the_budget(case, dtype, emulate):
    shared = []
    run = SPEC.called(partial(cuda.start, emulate(shared=shared), 90))
    for verdict in verify(SPEC, run, case, dtype):
        assert verdict.passed, verdict
    assert shared == [pick(case, dtype.itemsize, 90).shared]


@needs_nvcc
@pytest.mark.parametrize("cluster", [1, 2, 4, 8, 16])
def test_clusters_of_every_size_agree(cluster, emulate, monkeypatch):
    """45 pixels: the last of 16 blocks of 3 pixels has none."""
    case = next(case for case in SPEC.cases if case.name == "odd")
    monkeypatch.setattr(cuda, "CLUSTERS", {90: (cluster,)})
    inputs = SPEC.inputs(case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    for verdict in verify(
        SPEC, SPEC.called(partial(cuda.start, emulate(), 90)), case, torch.float32
    ):
        assert verdict.passed, verdict
    forwards, backwards = (
        cuda.start(emulate(order), 90, Arguments(**inputs)) for order in (False, True)
    )
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one, other)  # within a phase, no thread depends on another


@needs_nvcc
def test_the_order_of_threads_changes_no_bit_in_vectors_either(emulate):
    case = next(case for case in SPEC.cases if case.name == "sdxl-32-residual")
    inputs = SPEC.inputs(case, torch.float16, torch.device("cpu"), torch.Generator().manual_seed(0))
    forwards, backwards = (
        cuda.start(emulate(order), 90, Arguments(**inputs)) for order in (False, True)
    )
    for one, other in zip(forwards, backwards, strict=True):
        assert torch.equal(one, other)


@needs_nvcc
def test_far_mean_is_exact_where_eager_is_not(emulate):
    case = next(case for case in SPEC.cases if case.name == "far-mean")
    verdict = verify(SPEC, SPEC.called(partial(cuda.start, emulate(), 90)), case, torch.float32)[0]
    assert verdict.error < 1e-3, verdict


@needs_nvcc
def test_addresses_that_are_not_aligned_take_the_narrow_path(emulate):
    x = torch.randn(2 * 64 * 32 + 1)[1:].view(2, 8, 8, 32)
    weight, bias = torch.randn(2, 32).unbind(0)
    wide = []

    def call(dtype, vector, *rest):
        wide.append(vector)
        emulate()(dtype, vector, *rest)

    for picture in (x, x.clone()):
        y, _ = cuda.start(call, 90, Arguments(picture, weight, bias, 4, 1e-5, "silu"))
        expected, _ = SPEC.reference(picture, weight, bias, 4, 1e-5, "silu")
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert wide == [False, True]


# compiles for every architecture, by an nvcc that few have
@pytest.mark.product
@needs_nvcc
def test_code_is_as_committed():
    """No spills, no local memory, two blocks on an SM, loads of 16 bytes, clusters where the
    architecture has them; with the compiler of the committed table, not one register more."""
    with ThreadPoolExecutor(2) as pool:
        rows = [row for some in pool.map(cuda_code.rows, cuda_code.ARCHS) for row in some]
    committed = json.loads((ROOT / "benchmarks" / "static" / "cuda.json").read_text())
    key = lambda row: (row["kernel"], row["dtype"], row["lanes"], row["arch"])  # noqa: E731
    before = {key(row): row for row in committed["rows"]}
    assert sorted(map(key, rows)) == sorted(before)
    for row in rows:
        size = getattr(torch, row["dtype"]).itemsize
        assert row["spills"] == 0, row
        assert row["registers"] <= 64, row
        assert row["load"] == row["store"] == row["lanes"] * size, row
        assert row["lanes"] in (1, 16 // size), row
        assert row["cluster"] == (row["arch"] >= 90), row
        if cuda_code.version() == committed["nvcc"]:
            assert row["registers"] <= before[key(row)]["registers"], (row, before[key(row)])


@pytest.mark.parametrize("arch", SMS)
@pytest.mark.parametrize("size", [2, 4])
def test_launches_fit_the_chip(arch, size):
    for case in SPEC.cases:
        config = pick(case, size, arch)
        if config is None:
            assert arch not in cuda.CLUSTERS or case.name in TOO_LARGE, case
            continue
        L, width = case.Y * case.X, (case.C + case.get("C2", 0)) // case.G
        segment = config.groups * width * size
        assert config.shared <= (SMS[arch].shared - 1) * 1024
        assert case.G % config.groups == 0
        assert segment >= cuda.SEGMENT or config.groups == case.G
        assert config.lanes == 1 or segment % 16 == 0
        assert config.rows * config.cluster >= L
        assert config.cluster in cuda.CLUSTERS.get(arch, (1,))


def test_a_picture_of_sdxl_takes_the_largest_cluster():
    config = cuda.pick(B=2, L=128 * 128, W=10, G=32, size=2, arch=90)
    assert config == cuda.LaunchConfig(groups=8, cluster=16, rows=1024, lanes=8, shared=202848)
    assert cuda.pick(B=2, L=128 * 128, W=10, G=32, size=2, arch=80) is None
    assert cuda.pick(B=2, L=128 * 128, W=10, G=32, size=2, arch=70) is None  # not supported


def test_the_kernel_says_what_it_does_not_take():
    def call(*arguments):
        raise AssertionError("started")

    def inputs(name, dtype=torch.float16):
        case = next(case for case in SPEC.cases if case.name == name)
        return Arguments(**SPEC.inputs(case, dtype, torch.device("cpu"), torch.Generator()))

    with pytest.raises(ValueError, match=r"does not fit into the shared memory of a cluster"):
        cuda.start(call, 90, inputs("vae-top"))
    with pytest.raises(ValueError, match=r"torch\.float64"):
        cuda.start(call, 90, inputs("odd", torch.float64))
    empty = torch.empty(0, 4, 4, 8)
    channels = torch.ones(8)
    nothing = Arguments(empty, channels, channels, 2, 1e-5, "silu")
    assert cuda.start(call, 90, nothing)[0].numel() == 0
    for name in REFUSED:
        with pytest.raises(ValueError, match="takes none or silu, and no scale_shift"):
            cuda.start(call, 90, inputs(name))
    for name in KEPT - REFUSED:
        with pytest.raises(ValueError, match="returns the sum of x and residual alone"):
            cuda.start(call, 90, inputs(name))


@pytest.mark.skipif(hasattr(NATIVE, "cuda_group_norm_silu"), reason="built with the CUDA kernels")
def test_a_build_without_cuda_says_so():
    x = torch.randn(1, 4, 4, 8)
    with pytest.raises(RuntimeError, match=r"built without its CUDA kernels; install it with"):
        implementation("group_norm_silu", "cuda")(x, x[0, 0, 0], x[0, 0, 0], 2, 1e-5, "silu")
