"""A step of the demo, and of `--presets sd15,sdxl --scale 0.2`, eager and with fastdiff.

Both draw in turn, in random order, as in `fastdiff bench`; a backend whose receipt fails also fails
here and gets no number. Times and counts are per step.
"""

from dataclasses import asdict

import pytest

from fastdiff.bench.counters import count_pipe
from fastdiff.bench.pipelines import check_size
from fastdiff.bench.run import Settings, bench
from fastdiff.bench.tally import total

BACKENDS = ("eager", "fastdiff")


def pytest_generate_tests(metafunc):
    names = ["demo", *filter(None, metafunc.config.option.presets.split(","))]
    metafunc.parametrize("raced", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def raced(request, device, dtype):
    """By backend: its row of a bench, and the work of one step."""
    option = request.config.option
    # diffusers takes seconds to import, which `pytest benchmarks -k linear` does not need
    if request.param == "demo":
        from fastdiff.demo import load_demo

        pipe = load_demo(dtype, "cpu")
    else:
        from fastdiff.bench.presets import build

        pipe = build(request.param, option.scale, dtype, device.type)
    height, width = check_size(pipe, None, None)
    case = f"{request.param}, {width}×{height}, {option.steps} steps"
    size = (option.steps, height, width)
    settings = Settings(case, BACKENDS, str(device), *size, option.rounds, 0, "red heart")
    rows = {row.backend: row for row in bench(pipe, settings)}
    work = {row.backend: total(row.counts.step) for row in count_pipe(pipe, *size)}
    return {name: (rows[name], work[name]) for name in BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
def test_step(raced, backend, record):
    row, work = raced[backend]
    assert not row.failed, f"its receipt is red, so it has no speed: {row.receipt}"
    record(
        iter(row.samples_ms).__next__,
        len(row.samples_ms),
        None,
        case=row.case,
        backend=backend,
        **asdict(work),
        ratio_vs_eager=asdict(row.ratio_vs_eager),
        err_vs_fp64=row.receipt.err_vs_fp64,
    )
