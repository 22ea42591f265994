"""The parts of tiny pipelines with a prior, in float64."""

import torch
from diffusers import (
    DDPMScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
from small import noisy
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDE, SIZE = 32, 16
PRIOR = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "embedding_dim": WIDE,
}
SCHEDULER = {
    "variance_type": "fixed_small_log",
    "prediction_type": "sample",
    "clip_sample_range": 2.0,
    "num_train_timesteps": 1000,
}
DECODER = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 1,
    "cross_attention_dim": WIDE,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "class_embed_type": "identity",
    "resnet_time_scale_shift": "scale_shift",
}
SUPER_RES = {
    "sample_size": SIZE,
    "block_out_channels": (32, 64),
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "in_channels": 6,
    "out_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "add_attention": False,
}


def text_encoder(tokenizer):
    sizes = {"hidden_size": WIDE, "intermediate_size": 48, "projection_dim": WIDE}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": len(tokenizer) - 1}
    config = CLIPTextConfig(vocab_size=len(tokenizer), **sizes, **depth)
    return noisy(CLIPTextModelWithProjection(config)).double()


def prior(**more):
    net = noisy(PriorTransformer(**PRIOR | more))
    net.clip_std.data.fill_(1.3)
    return net.double()


def scheduler(**more):
    return UnCLIPScheduler(**SCHEDULER | more)


def image_encoder():
    sizes = {"hidden_size": WIDE, "intermediate_size": 48, "projection_dim": WIDE}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
    return noisy(CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **depth))).double()


def kandinsky_parts(tokenizer):
    """The parts of KandinskyV22PriorPipeline and of its image-to-image variant."""
    return {
        "prior": prior(norm_in_type="layer", embedding_proj_norm_type="layer"),
        "image_encoder": image_encoder(),
        "text_encoder": text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": scheduler(),
        "image_processor": CLIPImageProcessor(size=SIZE, crop_size=SIZE),
    }


def unclip_parts(tokenizer):
    """The parts of UnCLIPPipeline."""
    wide = 4 * DECODER["block_out_channels"][0]
    project = UnCLIPTextProjModel(
        clip_embeddings_dim=WIDE, time_embed_dim=wide, cross_attention_dim=WIDE
    )
    learned = {"variance_type": "learned_range", "prediction_type": "epsilon"}
    return {
        "prior": prior(),
        "decoder": noisy(UNet2DConditionModel(**DECODER)).double(),
        "text_encoder": text_encoder(tokenizer),
        "tokenizer": tokenizer,
        "text_proj": noisy(project).double(),
        "super_res_first": noisy(UNet2DModel(**SUPER_RES), 1).double(),
        "super_res_last": noisy(UNet2DModel(**SUPER_RES), 2).double(),
        "prior_scheduler": scheduler(),
        "decoder_scheduler": scheduler(**learned, clip_sample_range=1.0),
        "super_res_scheduler": scheduler(prediction_type="epsilon", clip_sample_range=1.0),
    }


def variation_parts(tokenizer):
    """The parts of UnCLIPImageVariationPipeline."""
    parts = unclip_parts(tokenizer)
    for name in ("prior", "prior_scheduler"):
        del parts[name]
    return parts | {
        "feature_extractor": CLIPImageProcessor(size=SIZE, crop_size=SIZE),
        "image_encoder": image_encoder(),
    }


def stable_parts(tokenizer, components):
    """The parts of StableUnCLIPPipeline; its prior uses DDPM, as in diffusers' documentation."""
    config = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * WIDE}
    own = components(unet=config)
    return {
        "prior_tokenizer": tokenizer,
        "prior_text_encoder": text_encoder(tokenizer),
        "prior": prior(),
        "prior_scheduler": DDPMScheduler(
            prediction_type="sample", clip_sample_range=2.0, variance_type="fixed_small_log"
        ),
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDE).double(),
        "image_noising_scheduler": DDPMScheduler(),
        **{name: own[name] for name in ("tokenizer", "text_encoder", "unet", "scheduler", "vae")},
    }


def drawn(pipe, **call):
    """The outputs of a call, as one tensor."""
    given = {"prompt": "red heart", "generator": torch.Generator().manual_seed(3)} | call
    given = {name: value for name, value in given.items() if value is not None}
    made = pipe(**given, return_dict=False)
    return torch.cat([torch.as_tensor(part) for part in made])
