"""The pipeline of a command: folder, variant, hub id or single file, with scheduler and LoRAs."""

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from command import run, run_json
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdiff.bench.pipelines import schedulers
from fastdiff.bench.source import Source, fused, opened, reschedule
from fastdiff.demo import DEMO_FOLDER, load_demo
from fastdiff.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
FAST = ("--steps", 2, "--device", "cpu", "--eager")


def generated(path, *arguments):
    """The picture that `fastdiff generate` makes with these arguments."""
    code, _, err = run("generate", "--prompt", "red heart", "--out", path, *FAST, *arguments)
    assert code == 0, err
    return np.asarray(Image.open(path))


def drawn(pipe):
    """The picture that diffusers draws for the same request."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return np.asarray(
        pipe("red heart", num_inference_steps=2, guidance_scale=4.0, generator=generator).images[0]
    )


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEMO_FOLDER, tmp_path / "pipe")


@pytest.fixture
def other_unet(folder):
    """A second U-Net in the demo's folder, as the variant "odd"."""
    weights = {name: -weight for name, weight in load_file(folder / UNET).items()}
    save_file(weights, folder / UNET.replace(".safe", ".odd.safe"), metadata={"format": "pt"})
    return weights


def test_a_variant_is_read_on_request(folder, other_unet):
    plain, odd = (
        opened(Source(str(folder), variant=v), torch.float16, "cpu") for v in (None, "odd")
    )
    for name, weight in odd.unet.state_dict().items():
        assert torch.equal(weight, other_unet[name])
        assert torch.equal(weight, -plain.unet.state_dict()[name])
    assert torch.equal(plain.vae.decoder.conv_in.weight, odd.vae.decoder.conv_in.weight)


def test_a_scheduler_draws_as_in_diffusers(tmp_path):
    pipe = load_demo()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    picture = generated(tmp_path / "x.png", "--scheduler", "EulerDiscreteScheduler")
    np.testing.assert_array_equal(picture, drawn(pipe))


@pytest.mark.parametrize(
    ("source", "without"),
    [
        (Source(), "EDMEulerScheduler"),
        (Source(preset="sd3", scale=0.05), "EulerDiscreteScheduler"),
    ],
    ids=["demo", "sd3"],
)
def test_each_offered_scheduler_draws_a_picture(source, without):
    pipe = opened(source, torch.float32, "cpu")
    pipe.set_progress_bar_config(disable=True)
    offered = schedulers(pipe)
    assert type(pipe.scheduler).__name__ in offered
    assert without not in offered
    for name in offered:
        reschedule(pipe, name)
        assert type(pipe.scheduler).__name__ == name
        latents = pipe(
            "sun", num_inference_steps=2, guidance_scale=1.0, output_type="latent"
        ).images
        assert latents.isfinite().all(), name


@pytest.fixture
def lora(tmp_path):
    """make(name, seed): the file of an adapter of the demo's U-Net and text encoder."""

    def make(name, seed=0):
        pipe = load_demo()
        torch.manual_seed(seed)
        config = LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
        pipe.unet.add_adapter(config)
        file = tmp_path / f"{name}.safetensors"
        pipe.save_lora_weights(
            tmp_path, get_peft_model_state_dict(pipe.unet), weight_name=file.name
        )
        return file

    return make


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_loras_draw_as_in_diffusers(tmp_path, lora):
    first, second = lora("a", 1), lora("b=2", 2)
    pipe = load_demo()
    pipe.load_lora_weights(load_file(first), adapter_name="a")
    pipe.load_lora_weights(load_file(second), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    path = tmp_path / "x.png"
    both = generated(path, "--lora", f"{first}=0.5", "--lora", second)
    np.testing.assert_array_equal(both, drawn(pipe))
    none = drawn(load_demo())
    assert (both != none).any()
    np.testing.assert_array_equal(generated(path, "--lora", f"{first}=0"), none)


def test_a_lora_is_added_to_the_weights_that_are_exported(tmp_path, lora):
    file = lora("a")
    pipe, plain = fused(Source(lora=(f"{file}=0.5",)), torch.float64), load_demo(torch.float64)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    weights = load_file(file)
    (up,) = (w for key, w in weights.items() if key.startswith(f"unet.{name[:-7]}.lora_B"))
    (down,) = (w for key, w in weights.items() if key.startswith(f"unet.{name[:-7]}.lora_A"))
    added = 0.5 * up.double() @ down.double()
    torch.testing.assert_close(
        pipe.unet.state_dict()[name], plain.unet.state_dict()[name] + added, rtol=0, atol=1e-6
    )
    assert set(pipe.unet.state_dict()) == set(plain.unet.state_dict())


def test_a_hub_id_is_asked_for_its_safetensors(tmp_path, monkeypatch, folder, other_unet):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    read, own = [], diffusers.StableDiffusionPipeline.from_pretrained

    def from_pretrained(place, **options):
        read.append((Path(place), options["variant"], options["use_safetensors"]))
        return own(place, **options)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", from_pretrained)
    generated(tmp_path / "x.png", "someone/emoji", "--variant", "odd")
    assert asked == [("someone/emoji", {"variant": "odd", "use_safetensors": True})]
    assert read == [(folder, "odd", True)]
    assert Source("someone/emoji").name == "someone/emoji"


def test_a_refusal_of_the_hub_is_one_sentence(monkeypatch):
    def download(name, **options):
        raise OSError("401 Client Error.\n\nRepository Not Found")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    for command in (["bench"], ["graph"], ["warm", "--arch", "90", "--out", "x"], ["compare"]):
        code, out, err = run(*command, "someone/nothing")
        assert (code, out) == (2, ""), err
        assert err.splitlines()[-1] == (
            "fastdiff: someone/nothing is not a folder here, and the Hugging Face hub did not"
            " deliver it: 401 Client Error. Repository Not Found"
        )


BLOCKS = {  # names in a single file, and diffusers' names of the same blocks
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.3.0": "down_blocks.1.resnets.0",
    "input_blocks.3.1": "down_blocks.1.attentions.0",
    "input_blocks.4.0.op": "down_blocks.1.downsamplers.0.conv",
    "input_blocks.5.0": "down_blocks.2.resnets.0",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.1.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.2.0": "up_blocks.1.resnets.0",
    "output_blocks.2.1": "up_blocks.1.attentions.0",
    "output_blocks.3.0": "up_blocks.1.resnets.1",
    "output_blocks.3.1": "up_blocks.1.attentions.1",
    "output_blocks.3.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.4.0": "up_blocks.2.resnets.0",
    "output_blocks.4.1": "up_blocks.2.attentions.0",
    "output_blocks.5.0": "up_blocks.2.resnets.1",
    "output_blocks.5.1": "up_blocks.2.attentions.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
}
LAYERS = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
LEVELS = 3
"""Levels of the demo's VAE."""


def unet_name(key):
    """The name of a U-Net's weight in Stability's own code."""
    theirs, ours = max(
        ((a, b) for a, b in BLOCKS.items() if key.startswith(f"{b}.")),
        key=lambda pair: len(pair[1]),
    )
    rest = key.removeprefix(ours)
    if ".resnets." in key:
        for a, b in LAYERS.items():
            rest = rest.replace(f".{b}.", f".{a}.")
    return f"model.diffusion_model.{theirs}{rest}"


def vae_name(key):
    """The name of a VAE's weight in Stability's own code."""
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    up = r"up_blocks\.(\d)\."
    key = re.sub(up, lambda found: f"up.{LEVELS - 1 - int(found[1])}.", key)
    key = key.replace("upsamplers.0", "upsample").replace("conv_shortcut", "nin_shortcut")
    if key.startswith("decoder.up."):
        key = key.replace(".resnets.", ".block.")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda f: f"mid.block_{int(f[1]) + 1}", key)
    return "first_stage_model." + key.replace("conv_norm_out", "norm_out")


@pytest.fixture
def single(tmp_path, demo):
    """The demo as a single file in the layout of Stable Diffusion 1."""
    weights = {unet_name(key): weight for key, weight in demo.unet.state_dict().items()}
    weights |= {vae_name(key): weight for key, weight in demo.vae.state_dict().items()}
    text = "cond_stage_model.transformer.text_model."
    for key, weight in demo.text_encoder.state_dict().items():
        weights[text + key.removeprefix("text_model.")] = weight
    file = tmp_path / "demo.safetensors"
    save_file({key: weight.half().contiguous() for key, weight in weights.items()}, file)
    return file


def test_a_single_file_draws_the_same_as_its_folder(single, tmp_path):
    config = ("--config", DEMO_FOLDER)
    ours = generated(tmp_path / "x.png", single, *config, "--guidance-scale", 4)
    np.testing.assert_array_equal(ours, drawn(load_demo()))
    assert Source(str(single)).name == "demo"


def test_the_config_of_a_single_file_may_be_a_hub_id(single, monkeypatch):
    """Without one, diffusers guesses the id from the weights, here Stable Diffusion 1.5's."""
    asked = []

    def load_config(name, **options):
        asked.append((name, options))
        return json.loads((DEMO_FOLDER / "model_index.json").read_text())

    def from_single_file(file, **options):
        asked.append((file, options))
        raise OSError("no network here")

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_single_file", from_single_file)
    sd15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    for config, name in (("someone/emoji", "someone/emoji"), (None, sd15)):
        with pytest.raises(UserError, match=f"cannot be loaded with the configs of {name}: no net"):
            opened(Source(str(single), config=config), torch.float32, "cpu")
        online = {"local_files_only": False}
        options = {"config": name, "dtype": torch.float32} | online
        assert asked == [(name, online), (str(single), options)]
        asked.clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.diffusion_model.out.2.weight", "lacks weights that they ask for"),
        ("first_stage_model.decoder.conv_in.bias", "lacks weights that they ask for"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "text_encoder: its weights lack .*final_layer_norm.bias",
        ),
    ],
)
def test_a_single_file_with_missing_weights_is_refused(single, name, message):
    weights = load_file(single)
    del weights[name]
    save_file(weights, single)
    with pytest.raises(UserError, match=message):
        opened(Source(str(single), config=str(DEMO_FOLDER)), torch.float32, "cpu")


REFUSED = {
    "{tmp}/pipe.ckpt is not a .safetensors file; other files of weights are pickles": (
        "{tmp}/pipe.ckpt",
    ),
    "{tmp}/cut.safetensors is damaged": ("{tmp}/cut.safetensors",),
    "no.safetensors is neither an existing folder or .safetensors file": ("no.safetensors",),
    "models/no.safetensors is neither an existing folder": ("models/no.safetensors",),
    "https://huggingface.co/a/b/x.ckpt is not a .safetensors file": (
        "https://huggingface.co/a/b/x.ckpt",
    ),
    "red heart is neither an existing folder or .safetensors file nor a hub id (owner/name)": (
        "red heart",
    ),
    "--variant needs a folder or a hub id": ("--variant", "fp16"),
    "--variant is 'fp16'; {tmp}/pipe holds files without a variant only": (
        *("{tmp}/pipe", "--variant", "fp16"),
    ),
    "--config needs a .safetensors file": ("{tmp}/pipe", "--config", "x"),
    "--scheduler is 'euler'; a StableDiffusionPipeline with a DDIMScheduler takes DDIMScheduler,": (
        *("--scheduler", "euler"),
    ),
    "--lora {tmp}/no.safetensors is neither an existing folder or .safetensors file": (
        *("--lora", "{tmp}/no.safetensors"),
    ),
    "--lora {tmp}/pipe.ckpt is not a .safetensors file; pickles are never read": (
        *("--lora", "{tmp}/pipe.ckpt"),
    ),
    "--lora a/b=much: 'much' is not a number": ("--lora", "a/b=much"),
    "--lora {tmp}/cut.safetensors cannot be loaded": ("--lora", "{tmp}/cut.safetensors"),
    "--lora {tmp}/other.safetensors cannot be loaded": ("--lora", "{tmp}/other.safetensors"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_source_that_cannot_be_opened_is_one_sentence(message, folder, tmp_path):
    (tmp_path / "pipe.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "cut.safetensors").write_bytes((folder / UNET).read_bytes()[:100_000])
    save_file({"lora.of.another": torch.zeros(2)}, tmp_path / "other.safetensors")
    arguments = [word.replace("{tmp}", str(tmp_path)) for word in REFUSED[message]]
    code, out, err = run("count", *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert message.replace("{tmp}", str(tmp_path)) in err.splitlines()[-1]


def test_the_graph_of_a_folder_equals_the_demos(tmp_path, folder):
    documents = []
    for place in ((), (folder,)):
        code, document, err = run_json("graph", *place)
        assert code == 0, err
        documents.append(document)
    demo, own = documents
    assert (demo["case"].split(",")[0], own["case"].split(",")[0]) == ("demo", "pipe")
    assert demo["rows"] == own["rows"]
    assert demo["launches"] > 50


def test_a_single_file_is_refused_where_a_folder_is_needed(single):
    for command in (["graph"], ["warm", "--arch", "90", "--out", "x"], ["compare"]):
        code, _, err = run(*command, single)
        assert code == 2
        assert f"{command[0]} takes a folder or a hub id; load {single} with" in err
