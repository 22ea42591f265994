"""The roofline: blocks against the whole picture and against torch's counts, floors by hand."""

import copy
import json

import pytest
import torch
from command import run
from diffusers import DPMSolverMultistepScheduler
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff.bench import presets
from fastdiff.bench.counters import count_pipe
from fastdiff.bench.gpus import GPUS, Gpu, gpu_called, gpu_named
from fastdiff.bench.roofline import Roofline, floor, roofline
from fastdiff.bench.stopwatch import time_blocks
from fastdiff.bench.tally import Counter, Tally, total
from fastdiff.bench.timing import GUIDANCE_SCALE
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError
from fastdiff.kernels.observe import counting, scope, watching

SIDE, STEPS = 32, 3
PARTS = ("launches", "flops", "bytes")


@pytest.fixture(scope="module")
def pipe(small_demo):
    return copy.deepcopy(small_demo)


@pytest.fixture(scope="module")
def priced(pipe):
    """The roofline of `small_demo` for an H200, with times of this machine; `pipe` stays eager."""
    return roofline(pipe, "h200", steps=STEPS, rounds=2)


def row(priced: Roofline, block: str):
    return next(row for row in priced.rows if row.block == block)


def test_scopes_nest_and_cost_nothing_when_nobody_watches():
    heard = []
    with watching(heard.append), scope("a"):
        with scope("b"):
            pass
        with pytest.raises(ZeroDivisionError), scope("c"):
            _ = 1 / 0
    assert heard == ["a", "b", "a", "c", "a", ""]
    assert scope("d") is scope("e")  # nobody watches


def test_blocks_add_up_to_the_whole_picture(pipe, priced):
    """The whole is counted over all steps, without blocks; the roofline counts one step for all."""
    compiled = fastdiff.compile(copy.deepcopy(pipe))

    def draw():
        compiled("red heart", height=SIDE, width=SIDE, num_inference_steps=STEPS,
                 guidance_scale=GUIDANCE_SCALE, output_type="pt")  # fmt: skip

    for _ in range(2):
        with counting() as called, Counter(compiled.device, called) as counter:
            draw()
    whole = total(counter.work)
    times = {"step": STEPS, "image": 1}
    for part in PARTS:
        added = sum(times[row.per] * getattr(row, part) for row in priced.rows)
        assert added == getattr(whole, part), part
    assert total(counter.blocks) == whole


def test_blocks_of_a_step_add_up_to_the_counts_of_fastdiff_count(pipe, priced):
    *_, fast = count_pipe(copy.deepcopy(pipe), STEPS, SIDE, SIDE)
    step = total(fast.counts.step)
    rows = [row for row in priced.rows if row.per == "step"]
    assert sum(row.bytes for row in rows) <= step.bytes  # it includes a row of time
    time = step.flops - sum(row.flops for row in rows)
    named = pipe.unet.named_modules()
    layers = [m for n, m in named if n.endswith(("time_emb_proj", "linear_1", "linear_2"))]
    assert time == sum(2 * layer.weight.numel() for layer in layers)


@torch.no_grad()
def test_flops_of_blocks_are_those_of_torch_on_diffusers_modules(pipe, priced):
    """In a guided step the middle and the up blocks compute two pictures; in fastdiff the text's
    keys and values and the time embedding are computed elsewhere."""
    side = SIDE // pipe.vae_scale_factor
    latents = torch.randn(2, 4, side, side)
    text = torch.randn(2, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        pipe.unet(latents, 7, text)
        pipe.vae.decode(latents[:1])
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    unet, decoder = type(pipe.unet).__name__, type(pipe.vae.decoder).__name__

    def hoisted(block):
        layers = dict(block.named_modules())
        time = sum(2 * 2 * m.weight.numel() for n, m in layers.items() if "time_emb_proj" in n)
        keys = [m for n, m in layers.items() if n.endswith(("attn2.to_k", "attn2.to_v"))]
        return time + sum(2 * text.shape[0] * text.shape[1] * m.weight.numel() for m in keys)

    theirs = {"mid": (f"{unet}.mid_block", pipe.unet.mid_block)}
    for i, block in enumerate(pipe.unet.up_blocks):
        theirs[f"up {i}"] = (f"{unet}.up_blocks.{i}", block)
    theirs["VAE mid"] = (f"{decoder}.mid_block", pipe.vae.decoder.mid_block)
    for i, block in enumerate(pipe.vae.decoder.up_blocks):
        theirs[f"VAE up {i}"] = (f"{decoder}.up_blocks.{i}", block)
    for block, (name, module) in theirs.items():
        found = next(flops for key, flops in counts.items() if key.endswith(name))
        assert row(priced, block).flops == found - hoisted(module), block


def test_each_block_appears_once_in_the_order_of_a_picture(priced):
    names = [row.block for row in priced.rows]
    assert names == [
        *("text encoder", "text rows", "time rows", "conv in", "down 0", "down 1"),
        *("mid", "up 0", "up 1", "out", "guided step"),
        *("VAE conv in", "VAE mid", "VAE up 0", "VAE up 1", "VAE out", "the rest"),
    ]
    step = names[names.index("conv in") : names.index("VAE conv in")]
    assert [row.block for row in priced.rows if row.per == "step"] == step


def test_each_block_that_can_run_alone_is_timed(priced):
    for row in priced.rows:
        if row.block == "the rest":
            assert row.measured_ms is None
        else:
            assert row.measured_ms > 0, row.block


def test_a_stopwatch_times_each_block():
    def work():
        with scope("a"):
            torch.randn(10)
            with scope("b"):
                torch.randn(10)

    times = time_blocks([work, work], 3, torch.device("cpu"))
    assert set(times) == {"", "a", "b"}
    assert all(ms > 0 for ms in times.values())


def test_floors_by_hand():
    gpu = Gpu("x", "X", "sm_1", 100.0, 50.0, 2.0, 8, "a test")
    bf16, fp32 = torch.bfloat16, torch.float32
    assert floor(Tally(9, 10**9, 10**12), gpu, bf16) == (pytest.approx(10.0), "compute")
    assert floor(Tally(9, 10**9, 10**12), gpu, fp32) == (pytest.approx(20.0), "compute")
    assert floor(Tally(9, 10**12, 10**12), gpu, bf16) == (pytest.approx(500.0), "memory")
    h200 = GPUS["h200"]  # reported rates go before the datasheet's
    assert floor(Tally(1, 0, 79 * 10**10), h200, bf16) == (pytest.approx(1.0), "compute")
    assert floor(Tally(1, 43 * 10**8, 0), h200, bf16) == (pytest.approx(1.0), "memory")


def test_shares_and_sums_of_floors(priced):
    assert sum(row.share for row in priced.rows) == pytest.approx(1)
    step = sum(row.floor_ms for row in priced.rows if row.per == "step")
    once = sum(row.floor_ms for row in priced.rows if row.per == "image")
    assert priced.step_ms == pytest.approx(step)
    assert priced.image_ms == pytest.approx(STEPS * step + once)
    up = row(priced, "up 1")
    assert up.share == pytest.approx(STEPS * up.floor_ms / priced.image_ms)


def test_the_table_of_gpus_is_consistent():
    for name, gpu in GPUS.items():
        assert gpu_named(name.upper()) is gpu
        assert gpu_called(gpu.device) is gpu
        assert (gpu.reported_tflops or 0) <= gpu.tflops_fp16
        assert (gpu.reported_bandwidth or 0) <= gpu.bandwidth
        assert gpu.tflops_fp32 <= gpu.tflops_fp16 / 2 + 3  # L40S: its datasheet rounds
    assert gpu_called("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    with pytest.raises(UserError, match="--gpu is 'voodoo'; choose one of h200, h100"):
        gpu_named("voodoo")


def test_the_pipeline_is_left_as_it_was(pipe, priced):
    assert slot_of(pipe.unet) is None
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert "forward" not in vars(pipe.text_encoder)
    assert pipe._progress_bar_config == {"disable": True}
    compiled = fastdiff.compile(copy.deepcopy(pipe))
    again = roofline(compiled, "h200", steps=STEPS)
    assert slot_of(compiled.unet) is not None
    for one, other in zip(again.rows, priced.rows, strict=True):
        assert [getattr(one, p) for p in PARTS] == [getattr(other, p) for p in PARTS]
    images = compiled("red heart", num_inference_steps=2, output_type="pt").images
    assert images.std() > 0  # the kernels compute again


def test_a_request_without_a_roofline_is_refused(pipe):
    with pytest.raises(UserError, match="a Linear has no roofline"):
        roofline(torch.nn.Linear(1, 1))
    with pytest.raises(UserError, match="use bfloat16"):
        roofline(copy.deepcopy(pipe).to(torch.float16))
    thresholding = copy.deepcopy(pipe)
    config = thresholding.scheduler.config
    thresholding.scheduler = DPMSolverMultistepScheduler.from_config(config, thresholding=True)
    with pytest.raises(UserError, match="a roofline needs a loop that runs as a plan"):
        roofline(thresholding, steps=2)
    with pytest.raises(UserError, match="got 0 steps"):
        roofline(pipe, steps=0)


# 10 s and 2 GB; test_graph.py compares the FLOPs of the same step with diffusers' own.
@pytest.mark.product
def test_sd15_at_full_size():
    """The architecture has 1.61 TFLOP; work hoisted or shared by the guidance halves is less."""
    pipe = presets.build("sd15", 1.0, torch.bfloat16, "cpu")
    priced = fastdiff.roofline(fastdiff.compile(pipe), "h200")
    step = sum(row.flops for row in priced.rows if row.per == "step")
    once = sum(row.flops for row in priced.rows if row.block in ("text rows", "time rows"))
    assert step == pytest.approx(1.559e12, rel=0.001)
    assert 0.95 * 1.61e12 < step + once < 1.61e12
    assert priced.step_ms == pytest.approx(1e3 * step / 790e12, rel=0.05)  # bound by compute
    assert all(row.measured_ms is None for row in priced.rows)
    assert "no block was measured" in str(priced)


def test_the_command_writes_the_printed_roofline_as_json(tmp_path, small_folder):
    file = tmp_path / "roofline.json"
    options = ("--gpu", "rtx4090", "--steps", "2", "--rounds", "2", "--measure")
    code, out, err = run("roofline", small_folder, *options, "--json", file)
    assert code == 0, err
    out = " ".join(out.split())  # the terminal's width decides where lines break
    written = json.loads(file.read_text())
    assert written["schema"] == "fastdiff.roofline/1"
    assert written["gpu"]["tflops_fp16"] == 165.2
    assert written["dtype"] == "bfloat16"
    assert written["command"].startswith(f"fastdiff roofline {small_folder} --gpu rtx4090")
    assert {"machine", "versions", "commit"} <= written.keys()
    for row in written["rows"]:
        assert row["block"] in out
        assert f"{row['floor_ms']:.4f}" in out
        assert row["bound"] in ("compute", "memory")
    assert "measured ms" in out
    assert f"measured on {written['measured_on']}: kernels called one by one" in out


def test_rates_name_their_source_and_assumptions_are_listed(tmp_path, small_folder, pipe):
    """The H200's rates are reported, without stored samples; the RTX 4090's are its datasheet's."""
    file = tmp_path / "roofline.json"
    code, out, err = run(
        "roofline", small_folder, "--steps", "2", "--device", "cpu", "--json", file
    )
    assert code == 0, err
    out = " ".join(out.split())
    assert "assumed: h200, because no GPU is here and none was named" in out
    assert "assumed: bfloat16 because no --dtype was given" in out
    assert "790 TFLOP/s reported, 4.3 TB/s reported (reported: a large bfloat16 product" in out
    assert "measured" not in out.replace("no block was measured", "")
    assert len(json.loads(file.read_text())["assumed"]) == 2
    asked = roofline(pipe, "rtx4090", steps=2)
    assert asked.assumed == ()
    text = " ".join(str(asked).split())
    assert "82.6 TFLOP/s specified, 1.008 TB/s specified (specified: NVIDIA Ada GPU" in text
    in_float32 = " ".join(str(roofline(pipe, "h200", steps=2)).split())
    assert "494.7 TFLOP/s specified, 4.3 TB/s reported (specified: NVIDIA H200" in in_float32
    assert "assumed" not in text + in_float32


@pytest.mark.parametrize(
    ("message", "options"),
    {
        "--gpu is 'voodoo'; choose one of h200": ("--gpu", "voodoo"),
        "--rounds is 1; give at least 2": ("--rounds", "1"),
        "--height is 70": ("--height", "70"),
        "use bfloat16": ("--dtype", "fp16", "--device", "cpu"),
        "{tmp}/no does not exist": ("--json", "{tmp}/no/x.json"),
    }.items(),
)
def test_bad_input_is_one_sentence(tmp_path, message, options):
    code, out, err = run("roofline", *(o.replace("{tmp}", str(tmp_path)) for o in options))
    assert code == 2
    assert out == ""
    assert message.replace("{tmp}", str(tmp_path)) in err
