"""Several LoRA adapters in half precision: the merged weight is rounded once, at the end."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from small import TINY

import fastdiff
from fastdiff.compiler.slot import slot_of


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@torch.no_grad()
def test_the_sum_of_two_adapters_is_rounded_once():
    torch.manual_seed(0)
    net = UNet2DConditionModel(**TINY).eval()
    weights = {"a": 0.3, "b": 0.7}  # neither is exact in bfloat16
    for name in weights:
        config = LoraConfig(r=8, lora_alpha=8, target_modules=["conv_in"], init_lora_weights=False)
        net.add_adapter(config, name)
    net.set_adapters(list(weights), list(weights.values()))
    net.to(torch.bfloat16)
    fastdiff.compile(net)
    net(torch.randn(1, 4, 8, 8).bfloat16(), 7, torch.randn(1, 7, 24).bfloat16())
    layer = net.conv_in
    exact = layer.base_layer.weight.double()
    for name, weight in weights.items():
        up, down = layer.lora_B[name].weight.double(), layer.lora_A[name].weight.double()
        exact = exact + weight * torch.einsum("orxy,riuv->oiuv", up, down)
    merged = slot_of(net).network.network.conv_in.weight
    assert (merged == exact.bfloat16()).float().mean() > 0.99  # ties of float32 sums may differ
