"""Launches, bytes and FLOPs against hand counts, torch's FLOP counter and the layers' shapes."""

import copy
import json
import threading

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff.bench import tally
from fastdiff.bench.counters import count, count_pipe
from fastdiff.bench.tally import Tally, total
from fastdiff.cli import main
from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.dispatch import NATIVE
from fastdiff.kernels.geglu import geglu
from fastdiff.kernels.linear import linear
from fastdiff.kernels.observe import counting

CPU = torch.device("cpu")
SIDE, STEPS = 32, 3
compiled_kernels = pytest.mark.skipif(NATIVE is None, reason="the C++ kernels were not built")


@pytest.fixture(scope="module")
def rows(small_demo):
    """Counts of `small_demo` by backend, and the counted pipeline."""
    pipe = copy.deepcopy(small_demo)
    return {row.backend: row.counts for row in count_pipe(pipe, STEPS, SIDE, SIDE)}, pipe


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_few_ops_counted_by_hand(mode):
    """Each op's bytes are the sizes of its inputs and outputs, 4 bytes per float."""
    x, weight, bias = torch.randn(4, 8), torch.randn(8, 8), torch.randn(8)
    picture, kernel, shift = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3), torch.randn(3)
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    kept, row = torch.randn(4, 8), torch.randn(1, 8)

    def draw(steps):
        with mode():
            once = x @ weight
            for _ in range(steps):
                y = F.linear(once, weight, bias)
                F.silu(y)
                kept.copy_(y)  # does not read its target
                kept.add_(y)  # reads its target
                torch.cat([y, y]).view(2, 4, 8).transpose(0, 1)  # views are free
                row.expand(4, 8).mul(y)  # one row in memory
                torch.empty(100).unsqueeze_(0)  # so is allocating
                F.conv2d(picture, kernel, shift, padding=1)
                F.scaled_dot_product_attention(q, k, v)
                F.layer_norm(y, (8,), bias, bias)
                y[0, 0].item()

    counts = count(draw, 3, CPU)
    assert counts.step == {
        "attention": Tally(1, 4 * (32 + 40 + 40 + 32 + 4), 2 * 2 * 4 * 5 * 8),  # logsumexp too
        "conv": Tally(1, 4 * (72 + 54 + 3 + 108), 2 * 36 * 3 * 2 * 9),
        "linear": Tally(1, 4 * (32 + 64 + 8 + 32), 2 * 4 * 8 * 8),
        "norm": Tally(1, 4 * (32 + 8 + 8 + 32 + 4 + 4), 0),  # mean and deviation of each row
        "pointwise": Tally(3, 4 * ((32 + 32) + (32 + 32 + 32) + (8 + 32 + 32)), 0),
        "copy": Tally(2, 4 * ((32 + 32) + (64 + 64)), 0),
        "host read": Tally(1, 4, 0),
    }
    assert counts.image == {"linear": Tally(1, 4 * (32 + 64 + 32), 2 * 4 * 8 * 8)}
    assert counts.step_kernels is counts.image_kernels is None


@compiled_kernels
@torch.no_grad()
def test_a_fused_kernel_is_one_launch_and_plain_torch_several():
    """Weights whose strides the C++ kernels cannot read run in plain torch, op by op."""
    x, skip = torch.randn(2, 5, 6, 8), torch.randn(2, 5, 6, 4)
    kernel = torch.randn(3, 3, 8, 4).permute(3, 2, 0, 1)
    weight = torch.randn(8, 12).t()

    def draw(steps, kernel=kernel, weight=weight):
        for _ in range(steps):
            conv2d(x, kernel, residual=skip)
            geglu(x, weight)

    counts = count(draw, 2, CPU)
    assert counts.image == {}
    assert counts.step == {
        "conv": Tally(1, 4 * (480 + 288 + 240 + 240), 2 * 60 * 4 * 8 * 9),
        "linear": Tally(1, 4 * (480 + 96 + 360), 2 * 60 * 12 * 8),
    }
    plain = count(lambda n: draw(n, kernel.contiguous(), weight.contiguous()), 2, CPU).step
    assert total(plain).flops == total(counts.step).flops
    assert plain["pointwise"].launches == 3  # the residual; gelu and its product


def test_eager_flops_equal_those_of_torchs_counter(small_demo, rows):
    """With attention as matrix products: torch's counter has no formula for fused CPU attention."""
    pipe = copy.deepcopy(small_demo)

    def flops(steps):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            pipe("red heart", height=SIDE, width=SIDE, num_inference_steps=steps, guidance_scale=4,
                 output_type="latent")  # fmt: skip
        return counter.get_total_flops()

    eager = rows[0]["eager"]
    short, long = flops(STEPS - 1), flops(STEPS)
    assert total(eager.step).flops == long - short
    assert total(eager.image).flops == short - (STEPS - 1) * (long - short)


def products(*layers):
    """FLOPs of linear layers applied to one row."""
    return sum(2 * layer.weight.shape[0] * layer.weight.shape[1] for layer in layers)


def time_layers(unet):
    named = unet.named_modules()
    projections = [layer for name, layer in named if name.endswith("time_emb_proj")]
    assert projections
    return unet.time_embedding.linear_1, unet.time_embedding.linear_2, *projections


def text_layers(unet):
    return [m for n, m in unet.named_modules() if n.endswith(("attn2.to_k", "attn2.to_v"))]


@torch.no_grad()
def flops_before_the_text(unet, rows):
    """FLOPs of diffusers' U-Net before its first cross-attention, for one picture, as torch
    counts them, without the time embedding."""

    class MeetsTextError(Exception):
        pass

    def stop(module, inputs):
        raise MeetsTextError

    unet = copy.deepcopy(unet)
    text_layers(unet)[0].register_forward_pre_hook(stop)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # noqa: SIM117
        with pytest.raises(MeetsTextError):
            unet(torch.randn(1, 4, rows, rows), 7, torch.randn(1, 24, 128))
    return counter.get_total_flops() - products(*time_layers(unet)[:3])


def test_a_step_omits_the_work_that_is_hoisted_out_of_the_loop(small_demo, rows):
    """Per step, fastdiff computes no text keys and values (done before the loop), the layers before
    the first cross-attention once instead of twice, and the time embedding of one row, not two."""
    counts, _ = rows
    eager, fast = total(counts["eager"].step), total(counts["fastdiff"].step)
    text = 2 * small_demo.tokenizer.model_max_length * products(*text_layers(small_demo.unet))
    time = products(*time_layers(small_demo.unet))
    shared = flops_before_the_text(small_demo.unet, SIDE // small_demo.vae_scale_factor)
    assert eager.flops - fast.flops == text + time + shared
    assert fast.launches < 0.5 * eager.launches
    assert fast.bytes < eager.bytes


@torch.no_grad()
def test_a_bare_network_is_counted_without_a_pipeline(small_demo):
    unet = copy.deepcopy(small_demo.unet)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 128)

    def draw(steps):
        for _ in range(steps):
            unet(sample, 7, text)

    eager = count(draw, 2, CPU)
    fastdiff.compile(unet)
    fast = count(draw, 2, CPU)
    assert eager.image == fast.image == {}
    time = products(*time_layers(unet))  # one of the two rows
    assert total(eager.step).flops - total(fast.step).flops == time


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_counts_do_not_depend_on_whether_the_ops_compute(small_demo, monkeypatch, layout):
    unet = copy.deepcopy(small_demo.unet).to(memory_format=layout)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 128)

    def draw(steps):
        for _ in range(steps):
            unet(sample, 7, text)

    monkeypatch.setattr(tally, "COMPUTED", 0)
    counts = count(draw, 2, CPU)
    monkeypatch.setattr(tally, "COMPUTED", 2**63)
    assert count(draw, 2, CPU) == counts


def test_counts_are_the_same_every_time_and_leave_the_pipe_as_it_was(small_demo, rows):
    def picture():
        return pipe(
            "red heart",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images

    pipe = fastdiff.compile(copy.deepcopy(small_demo))
    before = picture()
    fastdiff.restore(pipe)
    again = {row.backend: row.counts for row in count_pipe(pipe, STEPS, SIDE, SIDE)}
    assert again == rows[0]
    assert torch.equal(picture(), before)


@compiled_kernels
def test_other_threads_compute_while_one_is_counted():
    x, weight = torch.randn(3, 4), torch.randn(4, 5).t()
    before = linear(x, weight)
    found = []
    with counting() as called:
        thread = threading.Thread(target=lambda: found.append(linear(x, weight)))
        thread.start()
        thread.join()
        linear(x, weight)
    assert torch.equal(found[0], before)
    assert torch.equal(linear(x, weight), before)
    assert called == ["conv"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_kernels_on_a_gpu():
    x = torch.randn(64, 64, device="cuda")

    def draw(steps):
        y = x + 1
        for _ in range(steps):
            y = y.sin().cos()

    counts = count(draw, 3, x.device)
    assert (counts.step_kernels, counts.image_kernels) == (2, 1)
    assert (total(counts.step).launches, total(counts.image).launches) == (2, 1)


def test_the_command_writes_the_printed_counts_as_json(tmp_path, capsys, small_folder):
    file = tmp_path / "counts.json"
    arguments = ["count", str(small_folder), "--steps", "2", "--json", str(file)]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    written, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert written["schema"] == "fastdiff.counts/1"
    assert written["versions"]["torch"] == torch.__version__
    assert written["command"] == "fastdiff " + " ".join(arguments)
    assert [row["backend"] for row in written["rows"]] == ["eager", "fastdiff"]
    for row in written["rows"]:
        for part in ("step", "image"):
            kinds, whole = row["counts"][part], row["counts"][f"{part}_total"]
            assert whole == {k: sum(kind[k] for kind in kinds.values()) for k in whole}
            assert f" {whole['launches']} " in printed


def test_one_step_is_refused_because_counts_need_a_difference(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["count", "--steps", "1"])
    assert caught.value.code == 2
    assert "--steps is 1; give at least 2" in capsys.readouterr().err
