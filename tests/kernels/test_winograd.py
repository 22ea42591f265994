"""Winograd's algorithms on a CPU are inside the error budget of `conv2d`.

The eager reference runs on NCHW here. On channels last, which the contract's own test uses, torch's
error is two to ten times as large, and so would be the budget.
"""

from copy import deepcopy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.kernels.contract import Case, judge, max_error, poisoned_memory
from fastdiff.kernels.conv2d.cpu import ALGORITHMS as NUMBERS
from fastdiff.kernels.conv2d.cpu import convolved
from fastdiff.kernels.conv2d.spec import SPEC, Arguments, around
from fastdiff.kernels.dispatch import NATIVE

pytestmark = pytest.mark.skipif(NATIVE is None, reason="built without its kernels in C++")
ISAS = NATIVE.isas() if NATIVE else []
ALGORITHMS = {name: number for name, number in NUMBERS.items() if number}
DTYPES = (torch.float32, torch.bfloat16)

CASES = (
    Case("tiles", B=2, Y=16, X=16, C=64, N=64, residual=True),
    Case("odd", B=3, Y=9, X=5, C=33, N=37, residual=True),
    Case("odd-columns", B=1, Y=13, X=11, C=131, N=70, bias=False),
    Case("many-blocks", B=2, Y=37, X=41, C=20, N=24),
    Case("up", B=2, Y=8, X=8, C=48, N=80, size=(16, 16), residual=True),
    Case("odd-up", B=1, Y=9, X=5, C=20, N=20, size=(17, 9)),
    Case("one-pixel", B=1, Y=1, X=1, C=16, N=48),
    Case("less-than-a-tile", B=1, Y=1, X=3, C=40, N=1),
    Case("less-than-a-vector", B=2, Y=6, X=7, C=7, N=3),
    Case("in", B=2, Y=16, X=16, C=4, N=64),
    Case("out", B=2, Y=16, X=16, C=64, N=4),
    Case("sd15-8", B=2, Y=8, X=8, C=1280, N=96),
    Case("sd15-4", B=1, Y=4, X=4, C=1280, N=640, residual=True),
)


@pytest.fixture(autouse=True)
def restored_isa():
    isa = NATIVE.isa()
    yield
    NATIVE.set_isa(isa)


def winograd(algorithm, isa, **arguments):
    """`conv2d` by one of `ALGORITHMS` on an instruction set."""
    NATIVE.set_isa(isa)
    with poisoned_memory():
        return convolved(Arguments(**arguments), ALGORITHMS[algorithm])


def _in_rows(x, weight, *rest):
    return F.conv2d(x.contiguous(), weight.contiguous(), *rest)


def reference(**arguments):
    """The eager result and the exact one."""
    doubled = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    eager, exact = (around(_in_rows, Arguments(**given)) for given in (arguments, doubled))
    return eager, exact


@cache
def prepared(case, dtype):
    arguments = SPEC.inputs(case, dtype, torch.device("cpu"), torch.Generator().manual_seed(0))
    return arguments, reference(**arguments)


def columns_beside(weight):
    """As `models.borrow` lays it out: memory is [kernel, kernel, channels, columns]."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_winograd_is_inside_the_budget(case, algorithm, isa):
    for dtype in DTYPES:
        arguments, (eager, exact) = prepared(case, dtype)
        verdict = judge(case.name, winograd(algorithm, isa, **arguments), eager, exact)
        assert verdict.passed, (dtype, verdict)


def around_it(x, weight, bias=None):
    """Arguments of a 3x3 convolution, and its eager and exact results."""
    arguments = {"x": x, "weight": weight, "bias": bias, "stride": 1, "padding": [1, 1]}
    return arguments, reference(**arguments)


@cache
def smooth(channels, dtype):
    generator = torch.Generator().manual_seed(channels)
    taps = torch.tensor([0.25, 0.5, 0.25])
    scales = torch.randn(48, channels, 1, 1, generator=generator) + 0.3
    noise = torch.randn(48, channels, 3, 3, generator=generator)
    weight = columns_beside((taps[:, None] * taps * scales + 0.02 * noise) / channels**0.5)
    x = F.silu(torch.randn(1, 8, 12, channels, generator=generator) + 0.5)
    return around_it(x.to(dtype), weight.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("channels", [32, 320, 1280])
def test_smooth_filters_and_positive_pictures(channels, algorithm, isa):
    """Trained filters are low-pass, and the mean of a picture after SiLU is not zero: terms do not
    cancel."""
    for dtype in DTYPES:
        arguments, (eager, exact) = smooth(channels, dtype)
        verdict = judge("smooth", winograd(algorithm, isa, **arguments), eager, exact)
        assert verdict.passed, (dtype, verdict)


@pytest.fixture(scope="module")
def drawn(demo):
    """For every 3x3 convolution at stride 1 of the demo's U-Net and VAE: its arguments with an
    input that it got, and its eager and exact results."""
    unet, vae = deepcopy(demo.unet), deepcopy(demo.vae)
    read = {}

    def note(module, inputs):
        read[module] = inputs[0].permute(0, 2, 3, 1).contiguous()

    for module in (*unet.modules(), *vae.decoder.modules()):
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] == 3 and module.stride[0] == 1:
            module.register_forward_pre_hook(note)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        unet(latents, 500, text)
        vae.decode(latents[:1, :, :6, :7])
    return [
        around_it(x, columns_beside(module.weight.detach()), module.bias.detach())
        for module, x in read.items()
        if x.shape[3] >= 16
    ]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_demos_filters_on_the_demos_pictures(algorithm, isa, drawn):
    assert len(drawn) >= 40
    for arguments, (eager, exact) in drawn:
        got = winograd(algorithm, isa, **arguments)
        verdict = judge(str(list(arguments["x"].shape)), got, eager, exact)
        assert verdict.passed, verdict


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_threads_change_no_bit(algorithm, isa):
    """Threads share the tiles where there are many, and the columns where there are few tiles."""
    threads = torch.get_num_threads()
    for dtype in DTYPES:
        for case in (CASES[0], CASES[3], CASES[-2]):
            arguments, _ = prepared(case, dtype)
            try:
                made = []
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    made.append(winograd(algorithm, isa, **arguments))
            finally:
                torch.set_num_threads(threads)
            assert torch.equal(made[0], made[1]), (case, dtype)
            assert torch.equal(made[0], made[2]), (case, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_infinity_and_nan_reach_the_output(algorithm, isa):
    """An Inf makes the outputs of the tiles that read it NaN or Inf, and no others."""
    case = Case("inf", B=1, Y=16, X=16, C=20, N=24)
    for dtype in DTYPES:
        arguments, _ = prepared(case, dtype)
        for value in (float("inf"), float("nan")):
            x = arguments["x"].clone()
            x[0, 8, 8, 3] = value
            bad = ~winograd(algorithm, isa, **(arguments | {"x": x})).isfinite()
            assert bad[0, 7:10, 7:10].all()
            for far in (bad[0, :5], bad[0, 12:], bad[0, :, :4], bad[0, :, 12:]):
                assert not far.any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_residual_shared_by_the_batch_and_silu(algorithm, isa):
    """`conv2d` does not use either yet, but the C++ loop computes both."""
    x, w, bias = torch.randn(2, 6, 6, 20), torch.randn(3, 3, 20, 36) / 13, torch.randn(36)
    residual, out = torch.randn(6, 6, 36), torch.empty(2, 6, 6, 36)
    NATIVE.set_isa(isa)
    NATIVE.conv(*call(x, w, out, ALGORITHMS[algorithm], bias, (residual.data_ptr(), 36), act=1))
    y = around(
        F.conv2d, Arguments(x.double(), w.double().permute(3, 2, 0, 1), bias.double(), 1, [1, 1])
    )
    assert max_error(out, F.silu(y) + residual) < 1e-5


def call(x, w, out, algorithm, bias=None, residual=(0, 1), act=0, window=(3, 1, 1)):
    """Arguments of `NATIVE.conv`."""
    return (
        0,
        x.data_ptr(),
        x.shape,
        x.shape[1:3],
        window,
        out.shape[1:3],
        (w.data_ptr(), w.stride(2), w.shape[3]),
        0 if bias is None else bias.data_ptr(),
        residual,
        act,
        algorithm,
        out.data_ptr(),
    )


@pytest.mark.parametrize(
    ("window", "made", "act", "said"),
    [
        ((3, 2, 1), (3, 3), 0, "got a 3x3 window at stride 2"),
        ((1, 1, 0), (6, 6), 0, "got a 1x1 window"),
        ((3, 1, 0), (4, 4), 0, "0 zeros before it"),
        ((3, 1, 1), (5, 6), 0, "an output of 5x6"),
        ((3, 1, 1), (6, 6), 2, "gated"),
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_winograd_says_what_it_does_not_take(window, made, act, said, algorithm):
    x, w = torch.randn(1, 6, 6, 8), torch.randn(window[0], window[0], 8, 16)
    out = torch.full((1, *made, 16), 7.0)
    with pytest.raises(ValueError, match=f"take a 3x3 window at stride 1.*{said}"):
        NATIVE.conv(*call(x, w, out, ALGORITHMS[algorithm], act=act, window=window))
    assert (out == 7).all()


def test_an_unknown_algorithm_is_named():
    x, w, out = torch.randn(1, 6, 6, 8), torch.randn(3, 3, 8, 16), torch.empty(1, 6, 6, 16)
    for algorithm in (-1, 3):
        with pytest.raises(ValueError, match=f"conv: there is no algorithm {algorithm}"):
            NATIVE.conv(*call(x, w, out, algorithm))
