"""The commands on saved folders of transformer pipelines and of pipelines without a prompt: they
draw what the pipeline draws eagerly, or one sentence says why not."""

import asyncio
from io import BytesIO

import diffusers
import numpy as np
import pytest
import torch
import transformers
from command import run
from covered import first_of_each
from PIL import Image
from small import AURAFLOW, DIT, FLUX, PIXART, QWEN, ZIMAGE, noisy

from fastdiff.bench.preset_parts import clip_tokenizer
from fastdiff.bench.preset_sd3 import t5_tokenizer
from fastdiff.bench.saved import check_folder
from fastdiff.bench.source import Source
from fastdiff.demo import UNCONDITIONAL_FOLDER
from fastdiff.errors import UserError
from fastdiff.serve.drawing import Drawing
from fastdiff.serve.opening import Opening

VAE = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
VAE |= {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
T5 = {"d_model": 20, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def vae(**config):
    return noisy(diffusers.AutoencoderKL(**VAE | {"shift_factor": 0.1} | config))


def words():
    own = t5_tokenizer(clip_tokenizer())
    own.chat_template = "{{ messages[0]['content'] }}"
    return own


def t5(kind, tokenizer):
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **T5)
    return noisy(getattr(transformers, f"{kind}EncoderModel")(config))


def qwen(tokenizer):
    sizes = {"hidden_size": 20, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    return noisy(transformers.Qwen3Model(transformers.Qwen3Config(**sizes, **heads)))


def flux():
    tokenizer, other = clip_tokenizer(), words()
    clip = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 16}
    clip |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    return diffusers.FluxImg2ImgPipeline(
        scheduler=FLOW(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=noisy(transformers.CLIPTextModel(transformers.CLIPTextConfig(**clip))),
        tokenizer=tokenizer,
        text_encoder_2=t5("T5", other),
        tokenizer_2=other,
        transformer=noisy(diffusers.FluxTransformer2DModel(**FLUX | {"guidance_embeds": True})),
    )


def auraflow():
    net = noisy(diffusers.AuraFlowTransformer2DModel(**AURAFLOW))
    return diffusers.AuraFlowPipeline(words(), t5("UMT5", words()), vae(), net, FLOW(shift=1.73))


def pixart():
    net = noisy(diffusers.PixArtTransformer2DModel(**PIXART))
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtSigmaPipeline(words(), t5("T5", words()), vae(), net, scheduler)


def zimage():
    net = noisy(diffusers.ZImageTransformer2DModel(**ZIMAGE))
    return diffusers.ZImagePipeline(FLOW(shift=3.0), vae(), qwen(words()), words(), net)


def qwen_image():
    net = noisy(diffusers.QwenImageTransformer2DModel(**QWEN))
    own = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1}
    own |= {"temperal_downsample": [False], "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    decoder = diffusers.AutoencoderKLQwenImage(**own).eval()
    scheduler = FLOW(use_dynamic_shifting=True)
    return diffusers.QwenImagePipeline(scheduler, decoder, qwen(words()), words(), net)


def dit():
    net = noisy(diffusers.DiTTransformer2DModel(**DIT))
    return diffusers.DiTPipeline(net, vae(), diffusers.DDIMScheduler(clip_sample=False))


DRAWN = {"flux": flux, "auraflow": auraflow, "zimage": zimage, "qwen": qwen_image}
LOADED = {"flux": "FluxPipeline"}
SIZE = {"height": 16, "width": 32}
SIDES = [f"--{side}={pixels}" for side, pixels in SIZE.items()]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(make): the folder into which make()'s pipeline is saved, and the pipeline."""
    kept = {}

    def folder(make):
        if make not in kept:
            pipe, path = make(), tmp_path_factory.mktemp("folders") / make.__name__
            pipe.save_pretrained(path)
            kept[make] = path, pipe
        return kept[make]

    return folder


def timed(folder, *more):
    backends = ("--steps", 1, "--rounds", 2, "--backends", "fastdiff")
    code, out, err = run("bench", folder, *backends, *more)
    assert code == 0, (out, err)


@pytest.mark.parametrize("name", first_of_each(DRAWN, kind=lambda name: name in LOADED))
def test_generate_and_bench_draw_as_diffusers_does(name, saved, tmp_path):
    folder, pipe = saved(DRAWN[name])
    if name in LOADED:
        pipe = getattr(diffusers, LOADED[name])(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call = {"prompt": "red heart", "num_inference_steps": 2, "generator": generator, **SIZE}
    want = np.asarray(pipe(**call).images[0], dtype=int)
    assert want.std() > 1
    asked = ("--prompt", "red heart", "--steps", 2, *SIDES)
    code, _, err = run("generate", folder, *asked, "--out", tmp_path / "x.png")
    assert code == 0, err
    got = np.asarray(Image.open(tmp_path / "x.png"), dtype=int)
    assert np.abs(got - want).max() <= 1
    timed(folder, *SIDES)


def test_pipelines_without_a_prompt_are_timed_and_refuse_one(saved, tmp_path):
    for folder in (saved(dit)[0], UNCONDITIONAL_FOLDER):
        timed(folder)
        out = tmp_path / "x.png"
        code, _, err = run("generate", folder, "--prompt", "sun", "--out", out)
        assert (code, "does not draw from text alone" in err) == (2, True)
        assert not out.exists()


def test_pixart_without_text_encoder(saved, tmp_path):
    folder, pipe = saved(pixart)
    timed(folder, *SIDES)
    pipe.text_encoder = None
    pipe.save_pretrained(tmp_path / "pipe")
    timed(tmp_path / "pipe", *SIDES)
    code, _, err = run(
        "generate", tmp_path / "pipe", "--prompt", "sun", "--out", tmp_path / "x.png"
    )
    assert (code, "has no text_encoder, which reads the prompt" in err) == (2, True)


def test_a_negative_prompt_that_flux_would_ignore_is_refused(saved, tmp_path):
    asked = ("--prompt", "sun", "--negative-prompt", "rain", "--out", tmp_path / "x.png")
    code, _, err = run("generate", saved(flux)[0], *asked)
    assert (code, "a FluxPipeline takes none; leave it out" in err) == (2, True)


def test_a_fill_network_is_refused(saved, tmp_path):
    _, pipe = saved(flux)
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    wide = FLUX | {"in_channels": 28, "out_channels": 16}
    parts["transformer"] = noisy(diffusers.FluxTransformer2DModel(**wide))
    diffusers.FluxPipeline(**parts).save_pretrained(tmp_path / "pipe")
    with pytest.raises(UserError, match="takes 28 channels but latents have 16, so it draws from"):
        check_folder(tmp_path / "pipe")


def test_a_folder_of_flux_is_served(saved):
    folder, pipe = saved(flux)
    own = {"workers": 1, "guidance_scale": None, "pixels": None}
    opening = Opening(Source(str(folder)), "fp32", "cpu", capacity=2, steps=2, **own)
    painter = opening.painter()

    async def drawn():
        asked = Drawing("red heart", seed=0, **SIZE)
        return [event async for event in painter.draw(asked)][-1].png

    try:
        got = np.asarray(Image.open(BytesIO(asyncio.run(drawn()))), dtype=int)
    finally:
        painter.close()
    eager = diffusers.FluxPipeline(**pipe.components)
    eager.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    want = eager("red heart", num_inference_steps=2, generator=generator, **SIZE).images[0]
    assert np.abs(got - np.asarray(want, dtype=int)).max() <= 1
