"""A demo folder damaged in each way that is checked: one sentence, before a weight is read."""

import json
import shutil

import pytest
import torch

from fastdiff.bench.pipelines import check_size, load
from fastdiff.bench.saved import check_folder
from fastdiff.demo import DEMO_FOLDER
from fastdiff.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit_index(folder, **values):
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def shard(folder):
    index = {"weight_map": {"a": "part-1.safetensors", "b": WEIGHTS}}
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


DAMAGE = {
    "it has no model_index.json": lambda f: (f / "model_index.json").unlink(),
    "is not readable JSON": lambda f: (f / "model_index.json").write_text("{"),
    "holds a JSON list, not an object": lambda f: (f / "model_index.json").write_text("[]"),
    "holds a SanaPipeline, which fastdiff does not compute": lambda f: edit_index(
        f, _class_name="SanaPipeline"
    ),
    "unet comes from my_code": lambda f: edit_index(f, unet=["my_code", "Net"]),
    "unet/config.json is missing": lambda f: shutil.rmtree(f / "unet"),
    "tokenizer_config.json is missing": lambda f: (f / "tokenizer/tokenizer_config.json").unlink(),
    "scheduler_config.json is missing": lambda f: shutil.rmtree(f / "scheduler"),
    "vae has no .safetensors file": lambda f: (f / "vae" / WEIGHTS).unlink(),
    "only pickled weights": lambda f: (f / "vae" / WEIGHTS).rename(f / "vae/pytorch_model.bin"),
    "part-1.safetensors is missing": shard,
}


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DEMO_FOLDER, tmp_path / "pipe")


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_named(folder, message):
    DAMAGE[message](folder)
    with pytest.raises(UserError, match=message) as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value)


def test_an_undamaged_folder_passes_and_loads(folder, demo):
    check_folder(folder)
    pipe = load(folder, torch.float32, "cpu")
    assert type(pipe) is type(demo)
    for name, weight in demo.unet.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], weight)


def test_sizes_are_multiples_of_the_vae_factor(demo):
    assert check_size(demo, None, None) == (64, 64)
    assert check_size(demo, 72, None) == (72, 64)
    for bad in (0, -8, 4, 70):
        with pytest.raises(UserError, match="--width is .* multiple of 8"):
            check_size(demo, None, bad)
