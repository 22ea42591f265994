"""Stable Diffusion 3 and 3.5: the published sizes at scale 1, and pictures at smaller scales."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from command import run
from covered import covered
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from fastdiff.bench.blueprints import of_folder, of_preset
from fastdiff.bench.pipelines import check_size, check_steps, load
from fastdiff.bench.presets import PRESETS, autoencoder, blueprint, build
from fastdiff.bench.receipt import find_truth, run_step
from fastdiff.bench.room import least
from fastdiff.bench.saved import check_folder
from fastdiff.bench.timing import GUIDANCE_SCALE, Request, draw
from fastdiff.errors import UserError
from fastdiff.recipes import denoiser

# Parameters of diffusers' SD3Transformer2DModel, and the billions that Stability AI publishes.
PUBLISHED = {
    "sd3": (2_028_328_000, 2.0),
    "sd35-medium": (2_243_171_520, 2.2),
    "sd35-large": (8_056_627_520, 8.1),
}
VAE = 83_819_683
SMALL = 0.04
"""At this scale: one head of 64, pictures of 64 × 64."""


@pytest.fixture(scope="module")
def pipes():
    """pipes(name): the pipeline at scale SMALL, built once; tests must not change it."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = build(name, SMALL, torch.float32, "cpu")
            built[name].set_progress_bar_config(disable=True)
        return built[name]

    return get


def noise(height=64, width=64):
    shape = (1, 16, height // 8, width // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def request_of(height=64, width=64):
    return Request("red heart", 2, height, width, noise(height, width), seed=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_scale_one_has_the_published_sizes(name):
    exact, billions = PUBLISHED[name]
    for kind in (name, f"{name}-t5"):
        net, side = blueprint(kind)
        numbers = sum(weight.numel() for weight in net.parameters())
        assert (numbers, side) == (exact, 128)
        assert round(numbers / 1e9, 1) == billions
        assert net.config.joint_attention_dim == 4096
        assert net.config.pooled_projection_dim == 2048
        assert net.config.caption_projection_dim == 64 * net.config.num_attention_heads
    vae = autoencoder(PRESETS[name])
    assert sum(weight.numel() for weight in vae.parameters()) == VAE
    config = vae.config
    assert (config.latent_channels, config.scaling_factor, config.shift_factor) == (
        *(16, 1.5305),
        0.0609,
    )


def test_the_configs_of_the_three_differ_as_published():
    nets = {name: blueprint(name)[0].config for name in PUBLISHED}
    layouts = {
        name: (c.num_layers, c.num_attention_heads, c.pos_embed_max_size, c.qk_norm)
        for name, c in nets.items()
    }
    assert layouts == {
        "sd3": (24, 24, 192, None),
        "sd35-medium": (24, 24, 384, "rms_norm"),
        "sd35-large": (38, 38, 192, "rms_norm"),
    }
    dual = {name: len(config.dual_attention_layers) for name, config in nets.items()}
    assert dual == {"sd3": 0, "sd35-medium": 13, "sd35-large": 0}


@pytest.mark.parametrize(
    ("name", "scale"),
    covered(PUBLISHED, [1e-6, 0.01, 0.03, 0.1, 0.25, 1 / 3, 0.5, 0.77, 0.999, 1], together=1),
)
def test_any_scale_has_sizes_that_fit_together(name, scale):
    """A step of the network's first layers on the meta device, called as diffusers calls it; all
    layers are alike, but for the second attention of some."""
    cls, config = PRESETS[name].network(scale)
    assert config["num_layers"] == PRESETS[name].layers
    dual = set(config["dual_attention_layers"]) & {0}
    config |= {"num_layers": 3, "dual_attention_layers": tuple(dual)}
    with torch.device("meta"):
        net = cls(**config)
        side = config["sample_size"]
        latents = torch.empty(2, 16, side, side)
        predicted = net(
            hidden_states=latents,
            encoder_hidden_states=torch.empty(2, 77, config["joint_attention_dim"]),
            pooled_projections=torch.empty(2, config["pooled_projection_dim"]),
            timestep=torch.empty(2),
        ).sample
    assert predicted.shape == latents.shape
    assert config["pooled_projection_dim"] <= config["joint_attention_dim"]


@pytest.mark.parametrize("name", [*PUBLISHED, "sd3-t5"])
def test_diffusers_draws_finite_pictures_of_the_presets_size(name, pipes):
    pipe = pipes(name)
    outputs = []
    hook = pipe.transformer.register_forward_hook(lambda *call: outputs.append(call[-1][0]))
    picture = pipe(
        "red heart", num_inference_steps=2, guidance_scale=GUIDANCE_SCALE, output_type="pt"
    ).images
    hook.remove()
    assert picture.shape == (1, 3, 64, 64)
    assert torch.isfinite(picture).all()
    assert picture.std() > 0.01
    assert [output.shape for output in outputs] == [(2, 16, 8, 8)] * 2
    assert all(0.2 < output.std() < 5 for output in outputs)
    assert pipe.scheduler.config.shift == 3.0


def test_a_tenth_of_the_width_draws():
    pipe = build("sd35-medium", 0.1, torch.float32, "cpu")
    assert pipe.transformer.config.num_attention_heads == 2
    assert check_size(pipe, None, None) == (128, 128)
    assert torch.isfinite(draw(pipe, request_of(48, 80)).image).all()


def test_positions_are_those_that_diffusers_computes(pipes):
    """They are a buffer, unlike the weights, which are random."""
    ours = pipes("sd35-medium").transformer
    with torch.random.fork_rng():
        theirs = SD3Transformer2DModel(**dict(ours.config) | {"num_layers": 1})
    assert [name for name, _ in ours.named_buffers()] == ["pos_embed.pos_embed"]
    assert torch.equal(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)


def test_text_is_padded_as_diffusers_pads_it(pipes):
    def texts(pipe, prompt):
        return pipe.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)[0]

    without, with_t5 = pipes("sd3"), pipes("sd3-t5")
    clips = sum(e.config.hidden_size for e in (without.text_encoder, without.text_encoder_2))
    for pipe in (without, with_t5):
        embeds = texts(pipe, "red heart")
        assert embeds.shape == (1, 77 + 256, pipe.transformer.config.joint_attention_dim)
        assert embeds[:, :77, :clips].all()
        assert not embeds[:, :77, clips:].any()
    assert not texts(without, "red heart")[:, 77:].any()
    red, dog = (texts(with_t5, prompt)[:, 77:] for prompt in ("red heart", "dog face"))
    assert 0.1 < red.std() < 5
    assert not torch.equal(red, dog)
    ids = with_t5.tokenizer_3(["red heart", ""], padding="max_length", max_length=5).input_ids
    assert ids[0][2:] == ids[1][:3] == [1, 0, 0]  # </s>, then <pad>


def test_the_timed_picture_is_the_pipelines_own(pipes):
    pipe, asked = pipes("sd3"), request_of()
    expected = pipe(
        asked.prompt,
        height=64,
        width=64,
        num_inference_steps=asked.steps,
        guidance_scale=GUIDANCE_SCALE,
        latents=asked.latents.clone(),
        output_type="np",
    ).images[0]
    np.testing.assert_allclose(draw(pipe, asked).image.numpy(), expected, atol=1e-6)


def test_the_same_seed_builds_the_same_weights(pipes):
    first, second = pipes("sd35-large"), build("sd35-large", SMALL, torch.float32, "cpu")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (first, second))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sides_are_whole_patches_within_the_position_table(pipes):
    pipe = pipes("sd3")
    assert denoiser(pipe) is pipe.transformer
    assert check_size(pipe, None, 3072) == (64, 3072)
    for side in (0, -16, 8, 72, 1000):
        with pytest.raises(UserError, match=f"--height is {side}; .* positive multiple of 16"):
            check_size(pipe, side, None)
    for side, message in ((72, "divisible by 16"), (3088, "cannot be greater than")):
        with pytest.raises(ValueError, match=message):  # diffusers itself
            pipe("sun", height=side, width=16, num_inference_steps=1)
    with pytest.raises(UserError, match="--width is 3088; .* draws at most 3072 pixels"):
        check_size(pipe, 64, 3088)
    check_steps(pipe, 1000)
    with pytest.raises(
        UserError, match="--steps is 1001; this scheduler allows at most 1000 steps"
    ):
        check_steps(pipe, 1001)


def test_the_least_memory_of_a_picture_is_one_layer(pipes):
    tokens = torch.empty(2, (128 // 16) * (64 // 16), pipes("sd3").transformer.inner_dim)
    assert least(pipes("sd3"), 128, 64) == 2 * tokens.nbytes


def test_the_truth_of_a_step_is_the_transformers(pipes):
    pipe = copy.deepcopy(pipes("sd35-medium"))
    truth = find_truth(pipe, request_of())
    assert truth.output.shape == (2, 16, 8, 8)
    assert set(truth.step.kwargs) >= {"hidden_states", "encoder_hidden_states", "timestep"}
    assert torch.equal(run_step(pipe.transformer, truth.step), truth.outputs_eager[0])
    worst = (truth.outputs_eager[0] - truth.output).abs().max()
    assert 0 < worst < 1e-5 * truth.output.abs().max()


@pytest.mark.parametrize("name", ["sd35-medium", "sd3-t5"])
def test_a_saved_pipeline_loads_and_draws_the_same(name, pipes, tmp_path):
    pipe = pipes(name)
    pipe.save_pretrained(tmp_path / "pipe")
    again = load(tmp_path / "pipe", torch.float32, "cpu")
    again.set_progress_bar_config(disable=True)
    assert type(again) is StableDiffusion3Pipeline
    assert (again.text_encoder_3 is None) == (pipe.text_encoder_3 is None)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(one, part).state_dict() for one in (pipe, again))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part
    # the alignment of weights in memory changes rounding
    pictures = (draw(one, request_of()).image.numpy() for one in (again, pipe))
    np.testing.assert_allclose(*pictures, atol=1e-4)
    plan = of_folder(tmp_path / "pipe")
    planned, real = (
        {key: weight.shape for key, weight in net.state_dict().items()}
        for net in (plan.denoiser, again.transformer)
    )
    assert planned == real
    assert all(weight.is_meta for weight in plan.denoiser.parameters())
    assert (plan.side, plan.factor, plan.upcasts) == (8, 8, (False,))


def test_the_blueprint_of_a_preset_has_its_sizes():
    plan = of_preset("sd35-medium")
    assert isinstance(plan.denoiser, SD3Transformer2DModel)
    assert plan.vae.config.latent_channels == 16
    assert (plan.side, plan.factor, plan.upcasts) == (128, 8, (False,))


WEIGHTS = "diffusion_pytorch_model.safetensors"


def without(path, name):
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


DAMAGED = {
    "transformer has no .safetensors file": lambda f: (f / "transformer" / WEIGHTS).unlink(),
    "transformer/config.json is missing": lambda f: shutil.rmtree(f / "transformer"),
    "transformer: its weights lack proj_out.weight": lambda f: without(
        f / "transformer" / WEIGHTS, "proj_out.weight"
    ),
    "text_encoder_2: its weights lack text_projection.weight": lambda f: without(
        f / "text_encoder_2/model.safetensors", "text_projection.weight"
    ),
}


@pytest.fixture(scope="module")
def saved(pipes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3") / "pipe"
    pipes("sd3").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("message", DAMAGED)
def test_damage_is_one_sentence(message, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "pipe")
    DAMAGED[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder, torch.float32, "cpu")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_transformer_or_with_more_channels_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "pipe")
    config, index = folder / "transformer/config.json", folder / "model_index.json"
    config.write_text(config.read_text().replace('"in_channels": 16', '"in_channels": 33'))
    with pytest.raises(UserError, match="its transformer takes 33 channels but latents have 16"):
        check_folder(folder)
    index.write_text(index.read_text().replace('"transformer"', '"unet"'))
    shutil.move(folder / "transformer", folder / "unet")
    with pytest.raises(UserError, match="has no transformer; save or copy the pipeline again"):
        check_folder(folder)


def test_bench_draws_the_preset(tmp_path):
    options = ("--scale", SMALL, "--steps", 1, "--rounds", 2, "--device", "cpu")
    file = tmp_path / "bench.json"
    code, out, err = run(
        "bench", "--preset", "sd3", *options, "--backends", "eager", "--json", file
    )
    assert code == 0, (out, err)
    (row,) = json.loads(file.read_text())["rows"]
    assert row["case"] == f"sd3 scale {SMALL}, float32, cpu, 64×64, 1 steps"
    assert row["receipt"]["passed"]
    assert np.isfinite([row["steps_per_s"], row["images_per_s"], *row["samples_ms"]]).all()


def test_the_command_line_draws_a_folder(saved, tmp_path):
    picture = tmp_path / "x.png"
    options = (saved, "--steps", 1, "--device", "cpu", "--eager", "--out", picture)
    code, out, err = run("generate", "--prompt", "sun", *options)
    assert (code, out.strip()) == (0, str(picture)), err
    code, _, err = run("generate", "--prompt", "sun", *options, "--height", 72)
    assert code == 2
    assert "--height is 72; this pipeline needs a positive multiple of 16" in err
