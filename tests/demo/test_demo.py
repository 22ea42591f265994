"""The embedded pipelines follow their prompts, load without output and fit into the wheel."""

import builtins
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from diffusers.utils import logging as diffusers_log
from PIL import Image
from safetensors.torch import load_file
from transformers.utils import logging as transformers_log

import fastdiff
from fastdiff.bench.pixels import noise_as
from fastdiff.demo import DEMO_FOLDER, PROMPTS, UNCONDITIONAL_FOLDER, load_upscaler
from fastdiff.kernels.contract import judge


@pytest.fixture(scope="module")
def drawn():
    """Prompt → picture [64, 64, 3] in 0…255, each from seed 0."""
    prompts = [*PROMPTS, "blue circle", "green heart"]
    pipe = fastdiff.load_demo()
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(0) for _ in prompts]
    pictures = pipe(prompts, num_inference_steps=12, guidance_scale=3.5, generator=seeds).images
    return {p: np.asarray(picture, float) for p, picture in zip(prompts, pictures, strict=True)}


def test_prompts_decide_the_colour(drawn):
    red, blue, green = (
        drawn[prompt][24:40, 24:40].mean((0, 1))
        for prompt in ("red heart", "blue circle", "green heart")
    )
    assert red[0] > 180
    assert red[0] > 2 * max(red[1], red[2])
    assert blue[2] > 150
    assert blue[2] > 1.5 * max(blue[0], blue[1])
    assert green[1] > 120
    assert green[1] > 1.2 * max(green[0], green[2])


def test_prompts_decide_the_shape(drawn):
    heart, circle = (drawn[prompt].min(2) < 200 for prompt in ("red heart", "blue circle"))
    assert heart[44:].sum() < 0.8 * heart[:20].sum()  # a heart ends in a point
    rows = np.arange(64) - 31.5
    disc = rows[:, None] ** 2 + rows**2 < circle.sum() / np.pi
    assert (disc & circle).sum() / (disc | circle).sum() > 0.9


def test_pictures_stand_on_white(drawn):
    for prompt, picture in drawn.items():
        assert picture[:3, :3].mean() > 235, prompt
        assert picture[-3:, -3:].mean() > 235, prompt
        assert picture[16:56, 16:48].min() < 120, prompt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_on_disk_in_the_dtype_asked_for(dtype):
    pipe = fastdiff.load_demo(dtype)
    files = {
        "unet": "diffusion_pytorch_model.safetensors",
        "vae": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.safetensors",
    }
    for part, file in files.items():
        loaded = getattr(pipe, part).state_dict()
        stored = load_file(DEMO_FOLDER / part / file)
        missing = set(loaded) ^ {name if name in loaded else _bare(name) for name in stored}
        assert not {name for name in missing if "position_ids" not in name}
        for name, tensor in stored.items():
            found = loaded[name if name in loaded else _bare(name)]
            assert torch.equal(found, tensor.to(dtype)), (part, name)


def _bare(name):
    """A CLIP text encoder's weight name without ``text_model.``, which transformers 5 drops."""
    return name.removeprefix("text_model.")


@pytest.mark.parametrize("load", [fastdiff.load_demo, load_upscaler])
def test_loads_in_silence_and_leaves_logging_as_it_was(load, capfd):
    def state():
        logs = (diffusers_log, transformers_log)
        return [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]

    diffusers_log.set_verbosity_info()
    before = state()
    try:
        load()
        assert state() == before
    finally:
        diffusers_log.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


def test_fits_in_the_wheel_and_holds_no_pickle():
    files = [
        path
        for path in DEMO_FOLDER.parent.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py"
    ]
    assert sum(path.stat().st_size for path in files) <= 13.5e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_the_unconditional_pipeline_draws_on_white_and_in_colour():
    pipe = DDPMPipeline.from_pretrained(UNCONDITIONAL_FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    fastdiff.compile(pipe)
    pictures = pipe(16, torch.Generator().manual_seed(0), 100, output_type="np").images
    edges = np.concatenate([pictures[:, 0], pictures[:, -1]], 1)
    assert np.median(edges) > 0.9
    middle = pictures[:, 4:12, 4:12]
    assert np.mean(middle.max(-1) - middle.min(-1)) > 0.15  # grey would be 0
    assert middle.mean((1, 2)).std(0).mean() > 0.1  # the pictures differ


@pytest.fixture(scope="module")
def enlarged(drawn):
    """What the demo drew, shrunk to 16×16; that enlarged eagerly, in float64 and by fastdiff."""
    truth = np.stack([*drawn.values()]) / 255
    small = truth.reshape(-1, 16, 4, 16, 4, 3).mean((2, 4))
    image = torch.from_numpy(small).permute(0, 3, 1, 2).float()

    def call(pipe):
        pipe.set_progress_bar_config(disable=True)
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(image))]
        call = {"num_inference_steps": 2, "guidance_scale": 1.0, "noise_level": 0}
        return pipe([*drawn], image, **call, generator=seeds, output_type="pt").images

    pipe = load_upscaler()
    eager, exact = call(pipe), load_upscaler().to(torch.float64)
    with noise_as(exact, torch.float32):
        exact = call(exact)
    fast = call(fastdiff.compile(pipe))
    told = {part.name: part.why for part in fastdiff.report(pipe).parts}
    return SimpleNamespace(truth=truth, small=small, eager=eager, exact=exact, fast=fast, told=told)


def test_the_upscaler_is_nearer_to_the_truth_than_bicubic_interpolation(enlarged):
    levels = (255 * enlarged.small).round().astype(np.uint8)
    bicubic = [Image.fromarray(p).resize((64, 64), Image.Resampling.BICUBIC) for p in levels]
    far, near = (
        np.sqrt(np.mean((np.stack([np.asarray(p) for p in pictures]) - enlarged.truth) ** 2))
        for pictures in (np.stack(bicubic) / 255, enlarged.eager.permute(0, 2, 3, 1))
    )
    assert near < 0.8 * far


def test_the_upscaler_draws_the_same_on_fastdiff(enlarged):
    assert enlarged.told["loop"] == "1 loop"
    verdict = judge("pictures", enlarged.fast, enlarged.eager, enlarged.exact)
    assert verdict.passed, verdict


def test_without_diffusers_the_error_names_the_extra(monkeypatch):
    really = builtins.__import__

    def without_diffusers(name, *rest, **options):
        if name.split(".")[0] == "diffusers":
            raise ImportError(f"No module named {name!r}")
        return really(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    with pytest.raises(ImportError, match=r"pip install 'fastdiff-engine\[diffusers\]'"):
        fastdiff.load_demo()


NO_PLACE = {
    "device 'toaster' cannot be used here": {"device": "toaster"},
    "device '' cannot": {"device": ""},
    "device 'cuda:99' cannot": {"device": "cuda:99"},
    "device '3.5' cannot": {"device": 3.5},
    "dtype is 'fp16'; give torch.float32": {"dtype": "fp16"},
    "dtype torch.int8 is not supported on cpu": {"dtype": torch.int8},
    "dtype torch.float8_e4m3fn is not supported": {"dtype": torch.float8_e4m3fn},
}


@pytest.mark.parametrize("message", NO_PLACE)
def test_where_it_cannot_run_is_one_sentence(message):
    with pytest.raises(ValueError, match=message) as caught:
        fastdiff.load_demo(**NO_PLACE[message])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_sentence():
    for device in ("cuda", torch.device("cuda", 0)):
        with pytest.raises(ValueError, match=r"device 'cuda(:0)?' cannot be used here") as caught:
            fastdiff.load_demo(device=device)
        assert "\n" not in str(caught.value)
