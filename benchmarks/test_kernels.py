"""Every kernel at the sizes of models: `pytest benchmarks/test_kernels.py`.

A kernel that exceeds its error budget fails here and gets no number.
"""

import pytest

from fastdiff.bench.kernels import cases, check, chosen, floor_ms, runner

CASES = {(kernel.spec.name, case.name): (kernel, case) for kernel, case in cases()}


@pytest.mark.parametrize(("kernel_name", "case_name"), CASES)
def test_kernel(kernel_name, case_name, device, dtype, pytestconfig, record):
    kernel, case = CASES[kernel_name, case_name]
    which = chosen(kernel, device)
    check(kernel, case, dtype, device, which)
    record(
        runner(kernel, case, dtype, device, which),
        pytestconfig.option.rounds,
        floor_ms(kernel, case, dtype, device),
        which=which,
        bytes=kernel.spec.bytes(case, dtype.itemsize),
        flops=kernel.spec.flops(case),
    )
