"""Edits of adapters and dtypes."""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from edits.recorded import networks
from edits.table import Edit, add, edit, edits
from edits.twins import Twin

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv"]


def adapter(pipe: Any, name: str, **options: Any) -> None:
    """Add an adapter with random values to the U-Net, unless it has one of this name."""
    if name in (getattr(pipe.unet, "peft_config", None) or {}):
        return
    torch.manual_seed(len(name))
    config = {"r": 4, "target_modules": ATTENTION, "init_lora_weights": False} | options
    pipe.unet.add_adapter(LoraConfig(**config), name)
    pipe.unet.eval()


def one(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Add an adapter to the U-Net, then make a change."""

    def apply(pipe: Any) -> None:
        adapter(pipe, "one")
        change(pipe)

    return apply


def both(pipe: Any, weights: list[float]) -> None:
    adapter(pipe, "one")
    adapter(pipe, "three", r=2, target_modules=["to_q", "to_v"])
    pipe.unet.set_adapters(["one", "three"], weights)


@torch.no_grad()
def trained(pipe: Any) -> None:
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            parameter.mul_(1.5)


def scaled_layer(pipe: Any) -> None:
    next(m for m in pipe.unet.modules() if hasattr(m, "scale_layer")).scale_layer(2.0)


def ip_adapter(pipe: Any) -> None:
    """Load an IP-Adapter with four tokens per picture."""
    torch.manual_seed(8)
    keys: dict[str, Tensor] = {}
    for at, name in enumerate(pipe.unet.attn_processors):
        if "attn2" in name:
            size = pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.weight.shape[0]
            keys[f"{at}.to_k_ip.weight"] = torch.randn(size, 24) / 5
            keys[f"{at}.to_v_ip.weight"] = torch.randn(size, 24) / 5
    projection = {
        "proj.weight": torch.randn(4 * 24, 16) / 4,
        "proj.bias": torch.zeros(4 * 24),
        "norm.weight": torch.ones(24),
        "norm.bias": torch.zeros(24),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])


@edit("adapter", "IP-Adapter")
def with_picture(twin: Twin) -> None:
    ip_adapter(twin.pipe)
    generator = torch.Generator().manual_seed(6)
    dtype = twin.pipe.unet.dtype
    twin.call["ip_adapter_image_embeds"] = [torch.randn(2, 1, 16, generator=generator).to(dtype)]


@edit("adapter", "scale of a call")
def scale_of_a_call(twin: Twin) -> None:
    adapter(twin.pipe, "one")
    twin.call["cross_attention_kwargs"] = {"scale": 0.5}


edits(
    "adapter",
    {
        "LoRA": one(lambda pipe: None),
        "LoRA on convolutions": lambda pipe: adapter(pipe, "four", target_modules=CONVOLUTIONS),
        "LoRA with rslora": lambda pipe: adapter(pipe, "seven", use_rslora=True),
        "DoRA": lambda pipe: adapter(pipe, "twelve", use_dora=True),
        "LoRA with dropout": lambda pipe: adapter(pipe, "fourteen", lora_dropout=0.3),
        "LoRA with bias": lambda pipe: adapter(pipe, "fifteen", lora_bias=True),
        "two at once": lambda pipe: both(pipe, [0.7, -0.4]),
        "one of two": lambda pipe: both(pipe, [0.0, 1.0]),
        "weighted": one(lambda pipe: pipe.unet.set_adapters(["one"], [0.3])),
        "trained on": one(trained),
        "scaled layer": one(scaled_layer),
        "fused": one(lambda pipe: pipe.unet.fuse_lora(lora_scale=0.8)),
        "unfused": one(lambda pipe: (pipe.unet.fuse_lora(), pipe.unet.unfuse_lora())),
        "disabled": one(lambda pipe: pipe.unet.disable_adapters()),
        "enabled": one(lambda pipe: (pipe.unet.disable_adapters(), pipe.unet.enable_adapters())),
        "deleted": one(lambda pipe: pipe.unet.delete_adapters("one")),
        "unloaded": one(lambda pipe: pipe.unet.unload_lora()),
        "unloaded by the pipeline": one(lambda pipe: pipe.unload_lora_weights()),
        "fused by the pipeline": one(lambda pipe: pipe.fuse_lora(components=["unet"])),
        "IP-Adapter's scale": lambda pipe: pipe.set_ip_adapter_scale(0.4),
        "IP-Adapter unloaded": lambda pipe: pipe.unload_ip_adapter(),
    },
)


# Dtypes


def inference_weights(pipe: Any) -> None:
    """Replace the weights by inference tensors, as `from_pretrained` in `inference_mode` does."""
    with torch.inference_mode():
        state = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
        pipe.unet.load_state_dict(state, assign=True)


def dynamic(pipe: Any) -> None:
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {nn.Linear}, dtype=torch.qint8)


def one_module(twin: Twin) -> Any:
    found = [m for m in networks(twin.pipe).values() if any(True for _ in m.parameters())]
    return twin.dice.choice(found)


edits(
    "dtype",
    {
        "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
        "float16": lambda pipe: pipe.to(torch.float16),
        "float64": lambda pipe: pipe.to(torch.float64),
        "float32": lambda pipe: pipe.to(torch.float32),
        "to bfloat16 and back": lambda pipe: pipe.to(torch.bfloat16).to(torch.float32),
        "to float64 and back": lambda pipe: pipe.to(torch.float64).to(torch.float32),
        "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
        "VAE channels last": lambda pipe: pipe.vae.to(memory_format=torch.channels_last),
        "contiguous": lambda pipe: pipe.unet.to(memory_format=torch.contiguous_format),
        "requires no gradients": lambda pipe: pipe.unet.requires_grad_(False),
        "requires gradients": lambda pipe: pipe.unet.requires_grad_(True),
        "float32 VAE": lambda pipe: pipe.vae.float(),
        "quantize_dynamic": dynamic,
        "float8": lambda pipe: pipe.unet.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
        ),
        "inference tensors": inference_weights,
        "training mode": lambda pipe: pipe.unet.train(),
        "evaluation mode": lambda pipe: pipe.unet.eval(),
        "gradient checkpointing": lambda pipe: pipe.unet.enable_gradient_checkpointing(),
    },
)
add(Edit("dtype", "one module in float16", lambda twin: one_module(twin).half()))
add(Edit("dtype", "one module to bfloat16 and back", lambda t: one_module(t).bfloat16().float()))
add(
    Edit(
        "dtype",
        "autocast",
        lambda twin: twin.around.append(lambda: torch.autocast("cpu", torch.bfloat16)),
    )
)
add(Edit("dtype", "inference mode", lambda twin: twin.around.append(torch.inference_mode)))
add(Edit("dtype", "no autocast", lambda twin: twin.around.clear()))
