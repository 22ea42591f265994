"""Real block structures at reduced widths, for tests of networks."""

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    ControlNetModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    PriorTransformer,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.embeddings import IPAdapterTimeImageProjection

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

TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""The smallest U-Net with two levels, one of them with attention: a call takes milliseconds."""
ONE_LEVEL = {
    "sample_size": 8,
    "block_out_channels": (16,),
    "attention_head_dim": 2,
    "cross_attention_dim": 24,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
"""A U-Net of one level, with as few layers as possible."""
SIMPLE = ONE_LEVEL | {
    "block_out_channels": (32,),
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "down_block_types": ("SimpleCrossAttnDownBlock2D",),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D",),
}
"""A U-Net whose pixels attend to the text and to each other in one attention; heads of 8
columns."""
IF = {
    "encoder_hid_dim_type": "text_proj",
    "encoder_hid_dim": 24,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "time_embedding_act_fn": "gelu",
}
KANDINSKY22 = {
    "encoder_hid_dim_type": "image_proj",
    "encoder_hid_dim": 20,
    "addition_embed_type": "image",
}
KANDINSKY21 = {
    "encoder_hid_dim_type": "text_image_proj",
    "encoder_hid_dim": 24,
    "addition_embed_type": "text_image",
}
"""How DeepFloyd IF and Kandinsky embed their conditions: texts, image embeddings, or both."""


SD3 = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 72,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 8,
}
SD3_KINDS = {
    "sd3": {},
    "sd35-medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "sd35-large": {"qk_norm": "rms_norm"},
}
"""The architectures of Stable Diffusion 3, 3.5-medium and 3.5-large."""


PRIOR = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 3,
    "embedding_dim": 24,
    "num_embeddings": 7,
}
PRIORS = {
    "karlo": {},
    "normed": {
        "norm_in_type": "layer",
        "embedding_proj_norm_type": "layer",
        "embedding_proj_dim": 20,
    },
    "without prd": {"added_emb_type": None, "additional_embeddings": 3},
    "a text of its width": {"encoder_hid_proj_type": None, "clip_embed_dim": 40},
}
"""unCLIP's prior, and other configurations of its class."""


DIT = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": 1000,
}
PIXART = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 24,
    "caption_channels": 20,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (2, 4, 2),
}
"""FLUX.1-schnell's architecture; dev and others also have an input for guidance."""
AURAFLOW = {
    "sample_size": 8,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 20,
    "caption_projection_dim": 24,
    "pos_embed_max_size": 81,
}

ZIMAGE = {
    "in_channels": 4,
    "dim": 24,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "cap_feat_dim": 20,
    "axes_dims": [4, 2, 2],
    "axes_lens": [96, 16, 16],
}
QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "axes_dims_rope": (4, 2, 2),
}


FLUX2 = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 8,
    "axes_dims_rope": (4, 4, 4, 4),
}
"""FLUX.2's architecture."""
SMALL_VAE = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
"""An autoencoder of two levels."""


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


def shallow(name):
    """A network's config with two blocks of one layer on each side."""
    config = NETWORKS[name]
    two = {key: value[:2] for key, value in config.items() if isinstance(value, tuple)}
    kinds = config["down_block_types"]
    two["down_block_types"] = kinds[:2] if kinds[0] != kinds[1] else (kinds[0], kinds[-1])
    two["up_block_types"] = tuple(
        kind.replace("Down", "Up") for kind in reversed(two["down_block_types"])
    )
    return config | two | {"layers_per_block": 1, "transformer_layers_per_block": 1}


def unet(name, **more):
    """(model to compile, the module of it to call, arguments, keyword arguments)."""
    torch.manual_seed(0)
    net = UNet2DConditionModel(**shallow(name), **more).eval()
    sample, text, added = inputs_for(net, (2, 8, 8))
    return net, net, (sample, 7, text), {"added_cond_kwargs": added} if added else {}


def simple(config, widths):
    """`SIMPLE` with another config. widths: the columns of each of its conditions."""
    net = noisy(UNet2DConditionModel(**SIMPLE | config))
    given = {key: torch.randn(2, width) for key, width in widths.items() if key != "text"}
    text = torch.randn(2, 5, widths["text"]) if "text" in widths else None
    return net, net, (torch.randn(2, 4, 8, 8), 7, text), {"added_cond_kwargs": given or None}


def upscaler(name):
    """A U-Net with class embeddings and blocks that attend only to the text, like Stable
    Diffusion's upscaler, and with diffusers' classic attention."""
    more = {"num_class_embeds": 9, "only_cross_attention": (True, False)}
    net, called, given, options = unet(name, **more)
    net.set_attn_processor(AttnProcessor())
    return net, called, given, options | {"class_labels": torch.tensor([2, 7])}


def controlnet(name):
    _, _, (sample, step, text), options = unet(name)
    config = {key: value for key, value in shallow(name).items() if key != "up_block_types"}
    net = noisy(ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32)))
    return net, net, (sample, step, text, torch.rand(2, 3, 16, 16)), options


def coder(part):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).eval()
    shape = (1, 3, 16, 16) if part == "encoder" else (1, 4, 8, 8)
    return vae, getattr(vae, part), (torch.randn(shape),), {}


def sd3(kind):
    net = noisy(SD3Transformer2DModel(**SD3 | SD3_KINDS[kind], in_channels=4, out_channels=4))
    given = {"encoder_hidden_states": torch.randn(2, 7, 72), "timestep": torch.tensor([7.0, 7.0])}
    return net, net, (torch.randn(2, 4, 8, 8),), given | {"pooled_projections": torch.randn(2, 64)}


def sd3_with_ip_adapter(kind):
    net, _, given, options = sd3(kind)
    add_ip_adapter_sd3(net)
    pictures = {"ip_adapter_image_embeds": torch.randn(2, 3, 20)}
    return net, net, given, options | {"joint_attention_kwargs": pictures}


def add_ip_adapter_sd3(net, channels=20, seed=1):
    """An IP-Adapter of random weights, as diffusers puts it into an SD3Transformer2DModel."""
    width, head = net.inner_dim, net.config.attention_head_dim
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(width, width, head, 32)
        for name in net.attn_processors
    }
    parts = [*processors.values()]
    net.set_attn_processor(processors)  # empties the dictionary
    sizes = {"dim_head": 8, "heads": 4, "num_queries": 5, "timestep_in_dim": 16}
    net.image_proj = IPAdapterTimeImageProjection(channels, width, 32, depth=1, **sizes)
    for i, part in enumerate((net.image_proj, *parts)):
        noisy(part, seed + i).to(net.dtype)


def controlnet_sd3(**config):
    _, _, given, options = sd3("sd3")
    net = noisy(SD3ControlNetModel(**SD3 | {"num_layers": 2, "in_channels": 4} | config))
    return net, net, (*given, torch.randn(2, 4, 8, 8)), options


def controlnet_sd3_alone():
    net, _, given, options = controlnet_sd3(joint_attention_dim=None, use_pos_embed=False)
    del options["encoder_hidden_states"]
    return net, net, (torch.randn(2, 16, 24), given[1]), options


def prior(kind):
    net = noisy(PriorTransformer(**PRIOR | PRIORS[kind]))
    given = {"proj_embedding": torch.randn(2, 24), "encoder_hidden_states": torch.randn(2, 7, 24)}
    mask = {"attention_mask": torch.arange(7)[None] < torch.tensor([[3], [7]])}
    return net, net, (torch.randn(2, 24), 7), given | mask


def dit():
    net = noisy(DiTTransformer2DModel(**DIT))
    given = {"timestep": torch.tensor([7, 7]), "class_labels": torch.tensor([3, 1000])}
    return net, net, (torch.randn(2, 4, 8, 8),), given


def pixart():
    net = noisy(PixArtTransformer2DModel(**PIXART, use_additional_conditions=True))
    given = {"encoder_hidden_states": torch.randn(2, 7, 20), "timestep": torch.tensor([7, 7])}
    sizes = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    mask = torch.arange(7)[None] < torch.tensor([[3], [7]])
    more = {"added_cond_kwargs": sizes, "encoder_attention_mask": mask}
    return net, net, (torch.randn(2, 4, 8, 8),), given | more


def flux():
    net = noisy(FluxTransformer2DModel(**FLUX, guidance_embeds=True))
    ids = torch.tensor([[0.0, i // 3, i % 3] for i in range(6)])
    given = {"encoder_hidden_states": torch.randn(2, 5, 20), "timestep": torch.tensor([0.5, 0.5])}
    given |= {"pooled_projections": torch.randn(2, 32), "guidance": torch.full((2,), 2.0)}
    return (
        net,
        net,
        (torch.randn(2, 6, 16),),
        given | {"img_ids": ids, "txt_ids": torch.zeros(5, 3)},
    )


def auraflow():
    one = {"num_mmdit_layers": 1, "num_single_dit_layers": 1}
    net = noisy(AuraFlowTransformer2DModel(**AURAFLOW | one))
    given = {"encoder_hidden_states": torch.randn(2, 7, 20), "timestep": torch.tensor([0.5, 0.5])}
    return net, net, (torch.randn(2, 4, 8, 8),), given


def flux2():
    net = noisy(Flux2Transformer2DModel(**FLUX2))
    ids = torch.tensor([[0.0, i // 3, i % 3, 0] for i in range(6)])
    given = {"encoder_hidden_states": torch.randn(2, 5, 24), "timestep": torch.tensor([0.5, 0.5])}
    given |= {"guidance": torch.full((2,), 2.0), "img_ids": ids, "txt_ids": torch.zeros(5, 4)}
    return net, net, (torch.randn(2, 6, 16),), given


def zimage():
    net = noisy(ZImageTransformer2DModel(**ZIMAGE | {"n_layers": 1}))
    latents, captions = torch.randn(2, 4, 1, 8, 8), torch.randn(2, 7, 20)
    return net, net, ([*latents], torch.tensor([0.5, 0.5]), [*captions]), {"return_dict": False}


def qwen():
    net = noisy(QwenImageTransformer2DModel(**QWEN | {"num_layers": 1}))
    mask = torch.arange(7)[None] < torch.tensor([[3], [7]])
    given = {"encoder_hidden_states": torch.randn(2, 7, 20), "timestep": torch.tensor([0.5, 0.5])}
    given |= {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, 2, 3)]] * 2}
    return net, net, (torch.randn(2, 6, 16),), given


NETS = {
    "sd15 of LCM": lambda: unet("sd15", time_cond_proj_dim=16),
    "upscaler, classic attention": lambda: upscaler("sd21"),
    "sdxl": lambda: unet("sdxl"),
    "IF": lambda: simple(IF, {"text": 24}),
    "Kandinsky 2.2": lambda: simple(KANDINSKY22, {"image_embeds": 20}),
    "controlnet": lambda: controlnet("sd15"),
    "sd35-medium": lambda: sd3("sd35-medium"),
    "sd3 with an IP-Adapter": lambda: sd3_with_ip_adapter("sd3"),
    "controlnet of sd3": lambda: controlnet_sd3(),
    "controlnet of sd35-large": lambda: controlnet_sd3_alone(),
    "prior": lambda: prior("karlo"),
    "dit": dit,
    "pixart": pixart,
    "flux": flux,
    "auraflow": auraflow,
    "flux2": flux2,
    "zimage": zimage,
    "qwen": qwen,
    "encoder": lambda: coder("encoder"),
    "decoder": lambda: coder("decoder"),
}
"""Every class and attention processor that fastdiff borrows, in networks with one layer a block."""
