"""The faster search for hooks finds what diffusers' own does."""

import hooked
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook, apply_group_offloading, group_offloading
from small import ONE_LEVEL

# while tests are collected this is still diffusers' own
OFFLOADING = group_offloading._get_top_level_group_offload_hook


@pytest.fixture
def net():
    assert group_offloading._get_top_level_group_offload_hook is not OFFLOADING
    return UNet2DConditionModel(**ONE_LEVEL)


def offloading(module):
    found = group_offloading._get_top_level_group_offload_hook(module)
    assert found is OFFLOADING(module)
    return found


def slowly(module):
    return [vars(part)[hooked.HOOK] for part in module.modules() if hooked.HOOK in vars(part)]


def test_all_hooks_are_found_in_the_order_of_the_modules(net):
    assert [*hooked.hooks(net)] == slowly(net) == []
    for part in (net, net.mid_block, net.mid_block.resnets[0].conv1, net.conv_out):
        HookRegistry.check_if_exists_or_initialize(part).register_hook(ModelHook(), "own")
    assert [*hooked.hooks(net)] == slowly(net)
    assert len(slowly(net)) == 4
    assert offloading(net) is None


def test_a_network_that_is_offloaded_in_groups_says_so(net):
    cpu = torch.device("cpu")
    assert offloading(net) is None
    apply_group_offloading(net, cpu, cpu, offload_type="leaf_level")
    assert offloading(net) is not None
