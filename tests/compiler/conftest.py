"""One small U-Net for all tests of compile."""

import pytest
import torch
from diffusers import UNet2DConditionModel


@pytest.fixture
def small():
    return {
        "block_out_channels": (32, 64),
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }


@pytest.fixture
def unet(small):
    torch.manual_seed(3)
    return UNet2DConditionModel(**small).eval()
