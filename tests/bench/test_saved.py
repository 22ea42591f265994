"""Saved folders with variants, other classes or damaged files load, or a sentence says why not."""

import inspect
import json
import shutil

import diffusers
import pytest
import torch
from command import run
from diffusers import (
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from fastdiff.bench.pipelines import load
from fastdiff.bench.presets import build
from fastdiff.bench.saved import check_folder
from fastdiff.demo import DEMO_FOLDER
from fastdiff.errors import UserError
from fastdiff.recipes import PICTURES, RECIPES

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def rename(folder, *files, variant="fp16"):
    for file in files:
        (folder / file).rename(folder / file.replace(".safe", f".{variant}.safe"))


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(path, name):
    weights = load_file(path)
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEMO_FOLDER, tmp_path / "pipe")


def same_weights(pipe, other):
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(one, name).state_dict() for one in (pipe, other))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.parametrize("files", [(UNET, VAE, TEXT), (UNET,), (VAE, TEXT)], ids=len)
def test_a_variant_is_read_where_there_are_no_plain_weights(folder, demo, files):
    rename(folder, *files)
    same_weights(load(folder, torch.float32, "cpu"), demo)


def test_shards_of_a_variant_load(tmp_path, demo):
    demo.save_pretrained(tmp_path / "pipe", variant="fp16", max_shard_size="4MB")
    assert list((tmp_path / "pipe/unet").glob("*.fp16-00002-of-*.safetensors"))
    same_weights(load(tmp_path / "pipe", torch.float32, "cpu"), demo)


def test_plain_weights_are_read_even_beside_a_damaged_variant(folder, demo):
    for file in (UNET, VAE, TEXT):
        shutil.copy(folder / file, folder / file.replace(".safe", ".fp16.safe"))
    cut(folder / UNET.replace(".safe", ".fp16.safe"))
    same_weights(load(folder, torch.float32, "cpu"), demo)


def test_parts_in_different_variants_are_refused(folder):
    rename(folder, UNET)
    rename(folder, VAE, variant="bf16")
    with pytest.raises(UserError, match="holds unet as fp16, vae as bf16, but no variant"):
        check_folder(folder)


DAMAGED = {
    f"{UNET} is damaged": lambda f: cut(f / UNET),
    f"{VAE} is damaged": lambda f: (f / VAE).write_bytes(b"\xff" * 5000),
    f"{TEXT} is damaged": lambda f: (f / TEXT).write_bytes(b""),
    f"{TEXT} is damaged: .*not fully": lambda f: (f / TEXT).write_bytes(
        (f / TEXT).read_bytes() + b"0"
    ),
    f"{UNET} is a Git LFS pointer": lambda f: (f / UNET).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
    ),
    "unet/config.json is not readable JSON": lambda f: cut(f / "unet/config.json"),
    "scheduler_config.json is not readable JSON": lambda f: cut(
        f / "scheduler/scheduler_config.json"
    ),
    "tokenizer/tokenizer.json is not readable JSON": lambda f: cut(f / "tokenizer/tokenizer.json"),
    "vae has no .safetensors file": lambda f: (f / VAE).unlink(),
    "holds only pickled weights .*never read": lambda f: (f / UNET).rename(
        f / "unet/diffusion_pytorch_model.bin"
    ),
    "unet: its weights lack conv_in.weight": lambda f: without(f / UNET, "conv_in.weight"),
    # transformers would initialise it randomly, with a warning that the command does not show
    "text_encoder: its weights lack .*final_layer_norm.bias": lambda f: without(
        f / TEXT, next(k for k in load_file(f / TEXT) if k.endswith("final_layer_norm.bias"))
    ),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damage_is_one_sentence_and_names_the_file(folder, tmp_path, message):
    DAMAGED[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder, torch.float32, "cpu")
    assert "\n" not in str(caught.value)


def test_commands_name_the_damaged_file(folder, tmp_path):
    cut(folder / UNET)
    for command in (
        ("generate", "--prompt", "sun", "--out", tmp_path / "x.png", folder),
        ("bench", folder),
        ("count", folder),
        ("export", folder, "--onnx", "--out", tmp_path / "onnx"),
    ):
        code, out, err = run(*command)
        assert (code, out) == (2, "")
        assert f"{UNET} is damaged" in err
        assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == [folder]


OTHERS = {
    StableDiffusionImg2ImgPipeline: StableDiffusionPipeline,
    StableDiffusionInpaintPipeline: StableDiffusionPipeline,
}


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_an_image_class_loads_as_its_text_to_image_sibling(kind, demo, tmp_path):
    kind(**demo.components, requires_safety_checker=False).save_pretrained(tmp_path / "pipe")
    pipe = load(tmp_path / "pipe", torch.float32, "cpu")
    assert type(pipe) is OTHERS[kind]
    same_weights(pipe, demo)


def test_an_image_to_image_folder_draws_what_the_text_to_image_one_draws(demo, tmp_path):
    kind = StableDiffusionImg2ImgPipeline
    kind(**demo.components, requires_safety_checker=False).save_pretrained(tmp_path / "pipe")
    pictures = [tmp_path / "ours.png", tmp_path / "theirs.png"]
    for folder, picture in zip((tmp_path / "pipe", DEMO_FOLDER), pictures, strict=True):
        arguments = ("--steps", 2, folder, "--out", picture)
        assert run("generate", "--prompt", "red heart", *arguments)[0] == 0
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_an_sdxl_sibling_loads_and_a_refiner_is_refused(tmp_path):
    pipe = build("sdxl", 0.05, torch.float32, "cpu")
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    StableDiffusionXLImg2ImgPipeline(**parts).save_pretrained(tmp_path / "pipe")
    assert type(load(tmp_path / "pipe", torch.float32, "cpu")) is StableDiffusionXLPipeline
    edit_json(tmp_path / "pipe/model_index.json", requires_aesthetics_score=True)
    with pytest.raises(UserError, match="holds a refiner, which draws from a picture"):
        check_folder(tmp_path / "pipe")


def test_each_class_that_compile_takes_loads_or_is_refused_in_one_sentence(folder):
    edit_json(folder / "unet/config.json", time_cond_proj_dim=32)
    for name, recipe in RECIPES.items():
        edit_json(folder / "model_index.json", _class_name=name)
        drawn, cls = recipe.from_text or name, getattr(diffusers, name, None)
        if cls is None or "Modular" in name:
            refused = f"holds a {name}; load it in Python"
        elif not recipe.from_text and PICTURES & inspect.signature(cls.__call__).parameters.keys():
            refused = f"holds a {name}, which draws from a picture"
        elif missing := set(RECIPES[drawn].networks) - {"unet", "vae"}:
            refused = f"has no {min(missing)}; save or copy the pipeline again"
        else:
            assert check_folder(folder).pipeline == drawn
            continue
        with pytest.raises(UserError, match=refused):
            check_folder(folder)


def test_latent_consistency_models(demo, tmp_path):
    config = dict(demo.unet.config) | {"time_cond_proj_dim": 32}
    unet = UNet2DConditionModel(**config).eval()
    unet.load_state_dict(demo.unet.state_dict(), strict=False)
    parts = demo.components | {"unet": unet, "scheduler": LCMScheduler()}
    kind, folder = LatentConsistencyModelImg2ImgPipeline, tmp_path / "pipe"
    kind(**parts, requires_safety_checker=False).save_pretrained(folder)
    shared = (folder, "--steps", 2, "--device", "cpu", "--out", tmp_path / "x.png")
    assert run("generate", "--prompt", "sun", *shared)[0] == 0
    code, _, err = run("generate", "--prompt", "sun", "--negative-prompt", "rain", *shared)
    assert code == 2
    assert "a LatentConsistencyModelPipeline takes none" in err
    code, out, _ = run("bench", folder, "--steps", 1, "--rounds", 2, "--backends", "fastdiff")
    assert code == 0, out
    edit_json(folder / "unet/config.json", time_cond_proj_dim=None)
    with pytest.raises(UserError, match="its U-Net has no time_cond_proj_dim"):
        check_folder(folder)


def test_an_inpainting_unet_is_refused(folder):
    edit_json(folder / "unet/config.json", in_channels=9)
    edit_json(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")
    with pytest.raises(UserError, match="takes 9 channels but latents have 4, so it draws from"):
        check_folder(folder)


def test_loading_is_silent(folder, capfd):
    load(folder, torch.float32, "cpu")
    assert capfd.readouterr() == ("", "")
