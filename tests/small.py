"""Real block structures at reduced widths, for tests of networks."""

import torch

CROSS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
SD15 = {
    "block_out_channels": (32, 64, 96, 96),
    "attention_head_dim": 4,
    "cross_attention_dim": 48,
    "norm_num_groups": 16,
    "down_block_types": CROSS,
    "up_block_types": UP,
}
SD21 = SD15 | {
    "attention_head_dim": (2, 4, 6, 6),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "block_out_channels": (32, 64, 96),
    "attention_head_dim": (2, 4, 6),
    "cross_attention_dim": 64,
    "norm_num_groups": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 40,
}
NETWORKS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}


def inputs_for(unet, shape, dtype=torch.float32):
    batch, rows, columns = shape
    sample = torch.randn(batch, 4, rows, columns, dtype=dtype)
    text = torch.randn(batch, 13, unet.config.cross_attention_dim, dtype=dtype)
    added = None
    if unet.config.addition_embed_type:
        added = {
            "text_embeds": torch.randn(batch, 40, dtype=dtype),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(batch, 1).to(dtype),
        }
    return sample, text, added


def noisy(module, seed=0):
    """Random weights under which every layer keeps its input's scale, zero convolutions too."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            fan_in = weight.numel() // weight.shape[0]
            torch.nn.init.normal_(weight, 0.0, fan_in**-0.5, generator)
        else:
            torch.nn.init.normal_(weight, float(not name.endswith("bias")), 0.1, generator)
    return module.eval()
