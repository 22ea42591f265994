"""LoRA adapters made with PEFT: merged into the compiled weights, and switched in place."""

import copy
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import (
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from torch import Tensor, nn

import fastdiff
from fastdiff.compiler.slot import slot_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter . was active which is now deleted:UserWarning"),
]

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
CONV = ["conv_in", "proj_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "conv_out"]
FILE = {"prefix": None, "weight_name": "pytorch_lora_weights.safetensors"}
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture
def unet(small):
    torch.manual_seed(3)
    return UNet2DConditionModel(**small, layers_per_block=1).eval()


def add(model, name, seed=0, rank=8, targets=(*LINEAR, *CONV), **options):
    torch.manual_seed(seed)
    options = {"lora_alpha": rank, "target_modules": list(targets), **options}
    model.add_adapter(LoraConfig(r=rank, init_lora_weights=False, **options), name)


def call(unet, run=None, **options):
    """A call of the U-Net, or of `run` in its place, on the same inputs every time."""
    generator = torch.Generator().manual_seed(0)
    sample, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 7, 24)))
    with torch.no_grad():
        sample, text = sample.to(unet.dtype), text.to(unet.dtype)
        return (run or unet)(sample, torch.tensor(7), text, **options)[0]


def as_eager(unet, **options):
    """The result of a compiled call, compared with an eager one; no call may have run eagerly."""
    got = call(unet, **options)
    expected = call(unet, unet._call_impl, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    part = fastdiff.report(unet).parts[0]
    assert (part.runs, "eagerly" in part.why) == ("fastdiff", False), part
    return got


def addresses(network):
    """The addresses of all weights of a compiled network."""
    if isinstance(network, Tensor):
        return [network.data_ptr()]
    if isinstance(network, tuple):
        return [address for part in network for address in addresses(part)]
    named = fields(network) if is_dataclass(network) else ()
    return [address for field in named for address in addresses(getattr(network, field.name))]


def memory(model):
    slot = slot_of(model)
    return id(slot.network), addresses(slot.network.network)


@pytest.fixture
def styled(unet):
    """A compiled U-Net with adapters "a" (active) and "b" on all kinds of layers."""
    add(unet, "b", seed=2, rank=64)
    add(unet, "a", seed=1)
    return fastdiff.compile(unet)


def layer(unet):
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v


def hotswap(unet, tmp_path):
    """Replace adapter "a" by another one for the same layers, with hotswap."""
    other = copy.deepcopy(unet)
    for name in ("a", "b"):
        other.delete_adapters(name)
    other.unload_lora()
    add(other, "c", seed=3)
    other.save_lora_adapter(tmp_path, adapter_name="c")
    unet.load_lora_adapter(tmp_path, adapter_name="a", hotswap=True, **FILE)


def through_data(tensor, factor):
    tensor.data.mul_(factor)


def reassigned(unet):
    weight = layer(unet).lora_B["a"].weight
    weight.data = weight.data * 3


def fused_and_disabled(unet):
    unet.fuse_lora()
    call(unet)
    unet.disable_lora()


def fused_again(unet):
    unet.fuse_lora(adapter_names=["a"])
    call(unet)
    unet.unfuse_lora()
    unet.fuse_lora(adapter_names=["b"])


def names_edited_in_place(unet):
    for module in unet.modules():
        if hasattr(module, "lora_A"):
            module._active_adapter = ["a"]
    as_eager(unet)
    for module in unet.modules():
        if hasattr(module, "lora_A"):
            module._active_adapter.append("b")


IN_PLACE = {
    "weights": lambda unet, _: unet.set_adapters(["a", "b"], [0.7, -0.3]),
    "the other": lambda unet, _: unet.set_adapters("b"),
    "the scale of a layer": lambda unet, _: layer(unet).set_scale("a", -5.0),
    "disable": lambda unet, _: unet.disable_lora(),
    "fuse": lambda unet, _: unet.fuse_lora(lora_scale=0.5),
    "fuse both": lambda unet, _: (unet.set_adapters(["a", "b"]), unet.fuse_lora()),
    "fuse safely": lambda unet, _: unet.fuse_lora(lora_scale=-0.5, safe_fusing=True),
    "fuse another": lambda unet, _: fused_again(unet),
    "disable what is fused": lambda unet, _: fused_and_disabled(unet),
    "delete": lambda unet, _: unet.delete_adapters("a"),
    "delete all": lambda unet, _: unet.delete_adapters(["a", "b"]),
    "one more": lambda unet, _: add(unet, "c", seed=3, rank=4),
    "one more, few layers": lambda unet, _: add(unet, "c", seed=3, targets=("to_v",)),
    "hotswap": hotswap,
    "names in place": lambda unet, _: names_edited_in_place(unet),
    "an edit of B": lambda unet, _: layer(unet).lora_B["a"].weight[3, 5].add_(9.0),
    "an edit of A": lambda unet, _: layer(unet).lora_A["a"].weight[3, 5].add_(9.0),
    "an edit of B by .data": lambda unet, _: through_data(layer(unet).lora_B["a"].weight, 3),
    "another B by .data": lambda unet, _: reassigned(unet),
    "an edit of W": lambda unet, _: layer(unet).base_layer.weight[3, 5].add_(9.0),
    "an edit of W by .data": lambda unet, _: through_data(layer(unet).base_layer.weight, 3),
}
ANEW = {
    "more layers": lambda unet: add(unet, "c", seed=3, targets=("upsamplers.0.conv", "to_v")),
    "unload": lambda unet: unet.unload_lora(),
    "unload what is fused": lambda unet: (unet.fuse_lora(lora_scale=0.5), unet.unload_lora()),
    "another dtype": lambda unet: unet.to(torch.float64),
    "another W": lambda unet: setattr(layer(unet), "base_layer", nn.Linear(24, 64, bias=False)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
def test_changes_that_are_made_in_place(styled, change, tmp_path):
    before, where, epoch = as_eager(styled), memory(styled), slot_of(styled).epoch
    as_eager(styled)
    assert slot_of(styled).epoch == epoch
    change(styled, tmp_path)
    assert not torch.allclose(as_eager(styled), before, atol=1e-3), "the change had no effect"
    assert memory(styled) == where
    assert slot_of(styled).epoch > epoch


@torch.no_grad()
@pytest.mark.parametrize("change", ANEW.values(), ids=ANEW)
def test_changes_that_need_new_weights(styled, change):
    before, epoch = as_eager(styled), slot_of(styled).epoch
    change(styled)
    as_eager(styled)
    if next(styled.parameters()).dtype == before.dtype:
        assert not torch.allclose(call(styled), before, atol=1e-3), "the change had no effect"
    assert slot_of(styled).epoch > epoch


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_within_the_error_budget(unet, budget, rank):
    add(unet, "a", rank=rank, use_rslora=True)
    plain = copy.deepcopy(unet)
    fastdiff.compile(unet)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 7, 24)
    budget(unet, plain, *inputs)


def test_half_precision_is_rounded_once(unet):
    """After each switch a merged bfloat16 weight is the value nearest to the exact sum."""
    add(unet, "a")
    unet.to(torch.bfloat16)
    fastdiff.compile(unet)
    call(unet)
    unet.set_adapters("a", 0.5)
    call(unet)
    merged, parts = slot_of(unet).network.network.conv_in.weight, unet.conv_in
    exact = parts.base_layer.weight.double() + 0.5 * torch.einsum(
        "orxy,riuv->oiuv", parts.lora_B["a"].weight.double(), parts.lora_A["a"].weight.double()
    )
    torch.testing.assert_close(merged.float(), exact.bfloat16().float(), rtol=2**-8, atol=1e-7)
    assert (merged == exact.bfloat16()).float().mean() > 0.99  # ties of float32 sums may differ


def test_switching_back_restores_the_same_bits(unet):
    fastdiff.compile(unet)
    bare = call(unet)
    add(unet, "b", seed=2, rank=4)
    add(unet, "a", seed=1)
    a = call(unet)
    for detour in (
        lambda: unet.set_adapters("b"),
        lambda: unet.set_adapters(["a", "b"], [2.0, 1e4]),
    ):
        detour()
        assert not torch.equal(call(unet), a)
        unet.set_adapters("a")
        assert torch.equal(call(unet), a)
    unet.disable_lora()
    assert torch.equal(call(unet), bare)
    unet.enable_lora()
    assert torch.equal(call(unet), a)
    unet.delete_adapters(["a", "b"])
    assert torch.equal(call(unet), bare)
    unet.unload_lora()
    assert torch.equal(call(unet), bare)
    add(unet, "a", seed=1)
    assert torch.equal(call(unet), a)


def test_compile_and_restore_change_no_weight(unet):
    add(unet, "a")
    before, state = call(unet), {name: p.clone() for name, p in unet.state_dict().items()}
    fastdiff.compile(unet)
    for again in (call, fastdiff.restore):
        again(unet)
        after = unet.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], value) for name, value in state.items())
    assert torch.equal(call(unet), before)
    assert all(p.is_contiguous() for p in unet.parameters())


@torch.no_grad()
def test_a_hotswap_prepared_for_larger_ranks(unet, tmp_path):
    for name, rank in (("big", 16), ("small", 4)):
        other = copy.deepcopy(unet)
        add(other, name, seed=rank, rank=rank)
        other.save_lora_adapter(tmp_path / name, adapter_name=name)
    fastdiff.compile(unet)
    unet.enable_lora_hotswap(target_rank=16)
    unet.load_lora_adapter(tmp_path / "small", adapter_name="a", **FILE)
    small, where = as_eager(unet), memory(unet)
    assert isinstance(layer(unet).scaling["a"], Tensor)
    for name in ("big", "small"):
        unet.load_lora_adapter(tmp_path / name, adapter_name="a", hotswap=True, **FILE)
        as_eager(unet)
        assert memory(unet) == where
    assert torch.equal(call(unet), small)


@torch.no_grad()
def test_a_hotswap_to_a_larger_rank_without_preparation(unet, tmp_path):
    other = copy.deepcopy(unet)
    add(other, "a", seed=5, rank=16)
    other.save_lora_adapter(tmp_path, adapter_name="a")
    add(unet, "a", rank=4)
    fastdiff.compile(unet)
    before = as_eager(unet)
    unet.load_lora_adapter(tmp_path, adapter_name="a", hotswap=True, **FILE)
    assert not torch.allclose(as_eager(unet), before, atol=1e-3)


def test_adapters_loaded_under_inference_mode(unet):
    fastdiff.compile(unet)
    call(unet)
    with torch.inference_mode():
        add(unet, "b", seed=1)
        got = call(unet)
    as_eager(unet)
    assert torch.equal(as_eager(unet), got)
    with torch.no_grad(), torch.inference_mode():
        layer(unet).lora_B["b"].weight.mul_(-3)
    assert not torch.allclose(as_eager(unet), got, atol=1e-3)


def with_saved_module(unet):
    add(unet, "a", targets=["to_q"], modules_to_save=["conv_norm_out"])


def with_hook(unet):
    add(unet, "a")
    layer(unet).lora_A["a"].register_forward_hook(lambda module, args, output: output * 2)


REFUSED = {
    "DoRA": (lambda unet: add(unet, "a", use_dora=True), "'a', which is not plain LoRA"),
    "bias": (lambda unet: add(unet, "a", lora_bias=True), "'a' with a bias"),
    "dropout": (lambda unet: add(unet, "a", lora_dropout=0.5), "'a' with dropout in training"),
    "hook": (with_hook, "a hook that wraps"),
    "modules_to_save": (with_saved_module, "peft.utils.other.ModulesToSaveWrapper"),
    "LoHa": (
        lambda unet: inject_adapter_in_model(LoHaConfig(target_modules=["to_q"]), unet, "a"),
        "peft.tuners.loha.layer.Linear",
    ),
    "OFT": (
        lambda unet: inject_adapter_in_model(OFTConfig(target_modules=["to_q"]), unet, "a"),
        "peft.tuners.oft.layer.Linear",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("adapt", "reason"), REFUSED.values(), ids=REFUSED)
def test_adapters_that_are_not_plain_lora_run_eagerly(unet, adapt, reason):
    fastdiff.compile(unet)
    call(unet)
    adapt(unet)
    torch.manual_seed(0)
    expected = call(copy.deepcopy(unet))
    torch.manual_seed(0)
    with pytest.warns(RuntimeWarning, match=reason):
        got = call(unet)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert reason in fastdiff.report(unet).parts[0].why


def test_inactive_unsupported_adapters_do_not_matter(unet):
    add(unet, "dora", use_dora=True)
    add(unet, "wet", lora_dropout=0.5)
    add(unet, "a")
    fastdiff.compile(unet)
    got = as_eager(unet)
    unet.set_adapters("dora")
    with pytest.warns(RuntimeWarning, match="'dora', which is not plain"):
        call(unet)
    unet.set_adapters("wet")
    with pytest.warns(RuntimeWarning, match="'wet' with dropout"):
        call(unet)
    unet.eval()
    slot_of(unet).eager.clear()
    as_eager(unet)
    unet.set_adapters("a")
    assert torch.equal(as_eager(unet), got)


def test_the_scale_of_a_call(styled):
    plain, epoch = as_eager(styled), slot_of(styled).epoch
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    scaled = as_eager(styled, **half)
    assert not torch.allclose(scaled, plain, atol=1e-3)
    assert slot_of(styled).epoch > epoch
    epoch = slot_of(styled).epoch
    assert torch.equal(as_eager(styled, **half), scaled)
    assert slot_of(styled).epoch == epoch, "the scale is merged once for all steps"
    assert torch.equal(as_eager(styled), plain)
    styled.fuse_lora()
    as_eager(styled, **half)  # does not scale fused adapters
    with pytest.warns(RuntimeWarning, match="scale"):  # scale 0 resets adapter weights in diffusers
        call(styled, cross_attention_kwargs={"scale": 0.0})


# Whole pipelines


@pytest.fixture
def loras(demo, tmp_path):
    """A folder of two LoRAs of U-Net and text encoder, as training scripts save them."""
    for seed, name in enumerate(("first", "second")):
        pipe = copy.deepcopy(demo)
        add(pipe.unet, name, seed, rank=4)
        add(pipe.text_encoder, name, seed, rank=4, targets=TEXT)
        pipe.save_lora_weights(
            tmp_path / name,
            unet_lora_layers=get_peft_model_state_dict(pipe.unet, adapter_name=name),
            text_encoder_lora_layers=get_peft_model_state_dict(
                pipe.text_encoder, adapter_name=name
            ),
        )
    return tmp_path


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"} | options
    return pipe("red heart", generator=generator, **options).images


def load(pipe, loras, *names, **options):
    for name in names:
        pipe.load_lora_weights(loras / name, adapter_name=name, **options)


STEPS = {
    "load": lambda pipe, loras: load(pipe, loras, "first"),
    "load a second": lambda pipe, loras: load(pipe, loras, "second"),
    "mix": lambda pipe, loras: pipe.set_adapters(["first", "second"], [0.6, 0.4]),
    "one": lambda pipe, loras: pipe.set_adapters("first"),
    "disable": lambda pipe, loras: pipe.disable_lora(),
    "enable": lambda pipe, loras: pipe.enable_lora(),
    "fuse": lambda pipe, loras: pipe.fuse_lora(components=["unet", "text_encoder"]),
    "unfuse": lambda pipe, loras: pipe.unfuse_lora(components=["unet", "text_encoder"]),
    "delete": lambda pipe, loras: pipe.delete_adapters("second"),
    "unload": lambda pipe, loras: pipe.unload_lora_weights(),
}


def test_all_lora_methods_of_a_pipeline_in_turn(demo, loras):
    pipe, eager = fastdiff.compile(copy.deepcopy(demo)), copy.deepcopy(demo)
    first = draw(pipe)
    pictures = {}
    for name, step in STEPS.items():
        for each in (pipe, eager):
            step(each, loras)
        pictures[name] = draw(pipe)
        np.testing.assert_allclose(pictures[name], draw(eager), atol=2e-3, err_msg=name)
    assert np.abs(pictures["load"] - first).max() > 0.05, "the LoRA had no effect"
    assert np.array_equal(pictures["load"], pictures["one"])
    assert np.array_equal(pictures["load"], pictures["enable"])
    assert np.array_equal(first, pictures["disable"])
    assert not any("eagerly" in part.why for part in fastdiff.report(pipe).parts)


def test_the_scale_of_a_pipelines_call(demo, loras):
    pipe, eager = fastdiff.compile(copy.deepcopy(demo)), copy.deepcopy(demo)
    for each in (pipe, eager):
        load(each, loras, "first")
    whole = draw(pipe)
    half = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    expected = draw(eager, cross_attention_kwargs={"scale": 0.5})
    np.testing.assert_allclose(half, expected, atol=2e-3)
    assert np.abs(half - whole).max() > 0.02
    assert np.array_equal(draw(pipe), whole)
    assert not any("eagerly" in part.why for part in fastdiff.report(pipe).parts)
