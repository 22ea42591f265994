"""What is exported: each network with its inputs and outputs, named as Optimum names them."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.export.modules import Decoder, Encoder, Text, UNet
from fastdiff.recipes import exported

XL_TIME_IDS = 6
TEXTS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


@dataclass(frozen=True)
class Port:
    """One input or output: a torch dtype's name and a shape whose named sides are free.

    A side of an output may be a multiple of a free one, "8*height", or a fraction, "height//8".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the free sides are `sizes`."""
        return tuple(_side(side, sizes) for side in self.shape)


@dataclass(frozen=True)
class Part:
    """One ONNX file. `module` takes `inputs` by position and returns a tuple of `outputs`.

    example: the free sides it is traced at; cases: the other sides it is verified at.
    Free sides are latents of a U-Net or VAE decoder, pixels of a VAE encoder, tokens of text.
    """

    folder: str
    source: nn.Module
    """The pipeline's own, of which `module` may be a copy in another dtype."""
    module: nn.Module
    dtype: torch.dtype
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    example: dict[str, int]
    cases: tuple[dict[str, int], ...]

    @property
    def net(self) -> Any:  # diffusers' or transformers' own
        return self.module.net

    @property
    def file(self) -> str:
        return f"{self.folder}/model.onnx"

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """The free sides, read off the shapes of inputs by name."""
        return {
            side: size
            for port in self.inputs
            for side, size in zip(port.shape, shapes.get(port.name, ()), strict=False)
            if isinstance(side, str)
        }


def parts(pipe: Any, dtype: torch.dtype, timestep: tuple[int, ...] = ()) -> tuple[Part, ...]:
    """The networks of a Stable Diffusion (XL) pipeline, weights and traffic in `dtype`.

    timestep: the shape of that input of the U-Net, () as Optimum has it or (1,).

    Where diffusers itself runs the VAE in float32 beside a float16 U-Net (`force_upcast`, which
    only its XL pipelines look at), so does its part. UserError for a network whose forward needs
    what these inputs do not carry.
    """
    recipe = exported(pipe, f"{type(pipe).__name__} cannot be exported")
    texts = {key: module for key in TEXTS if (module := getattr(pipe, key, None)) is not None}
    tokens = [module.config.max_position_embeddings for module in texts.values()]
    unet = unet_part(pipe.unet, dtype, tokens[-1] if tokens else 77, timestep)
    if not isinstance(side := unet.net.config.sample_size, int):
        raise _no_number("sample_size", unet.net.config)
    return (
        *(_text(key, module, dtype) for key, module in texts.items()),
        unet,
        *_vae(pipe.vae, dtype, side, recipe.upcasts),
    )


def left_out(pipe: Any) -> tuple[str, ...]:
    """Components that hold weights of their own and are not exported, such as a safety checker."""
    known = {*TEXTS, "unet", "vae"}
    return tuple(
        name
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module) and name not in known
    )


def draw(port: Port, sizes: dict[str, int], config: Any, generator: torch.Generator) -> Tensor:
    """A random input of `port` at the free sides `sizes`, of the scale a pipeline gives it."""
    shape = port.at(sizes)
    if port.name == "input_ids":
        ids = torch.randint(0, config.vocab_size, shape, generator=generator)
        ids[:, -1] = config.eos_token_id  # where the pooled output is taken
        return ids
    dtype = getattr(torch, port.dtype)
    if port.name == "timestep":
        return torch.full(shape, 500.0, dtype=dtype)
    if port.name == "time_ids":  # height, width, top, left, height, width in pixels
        return torch.randint(0, 1024, shape, generator=generator).to(dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _side(side: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(side, int):
        return side
    times, _, whole = side.rpartition("*")
    name, _, parts = whole.partition("//")
    return int(times or 1) * sizes[name] // int(parts or 1)


def _text(folder: str, net: nn.Module, dtype: torch.dtype) -> Part:
    kind = type(net).__name__
    config: Any = net.config
    if kind not in TEXTS.values():
        raise UserError(f"{folder} is a {kind}; supported are {', '.join(TEXTS.values())}")
    projected = kind == "CLIPTextModelWithProjection"
    pooled = "text_embeds" if projected else "pooler_output"
    whole = ("batch_size", "sequence_length", config.hidden_size)
    width = config.projection_dim if projected else config.hidden_size
    last, pool = ("last_hidden_state", whole), (pooled, ("batch_size", width))
    first = (pool, last) if projected else (last, pool)
    states = ((f"hidden_states.{i}", whole) for i in range(config.num_hidden_layers + 1))
    length = config.max_position_embeddings
    sizes = ((2, length - 1), (1, length), (3, 5), (2, length // 2))
    example, *cases = ({"batch_size": b, "sequence_length": tokens} for b, tokens in sizes)
    return Part(
        folder=folder,
        source=net,
        module=Text(net, (first[0][0], first[1][0])).eval(),
        dtype=dtype,
        inputs=(Port("input_ids", "int64", ("batch_size", "sequence_length")),),
        outputs=tuple(Port(name, _name(dtype), shape) for name, shape in (*first, *states)),
        example=example,
        cases=tuple(cases),
    )


def unet_part(
    net: nn.Module, dtype: torch.dtype, tokens: int = 77, timestep: tuple[int, ...] = ()
) -> Part:
    """A UNet2DConditionModel, traced and verified at texts of `tokens`; else as of `parts`."""
    kind = type(net).__name__
    if kind != "UNet2DConditionModel":
        raise UserError(f"unet is a {kind}; supported is UNet2DConditionModel")
    config: Any = net.config
    for key, supported in {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None,),
    }.items():
        if (value := getattr(config, key, None)) not in supported:
            raise UserError(f"unet has {key} {value!r}, whose inputs no exported U-Net has")
    if not isinstance(config.cross_attention_dim, int):
        raise _no_number("cross_attention_dim", config)
    free, kind = ("batch_size",), _name(dtype)
    extra: list[Port] = []
    if config.time_cond_proj_dim is not None:
        extra.append(Port("timestep_cond", kind, (*free, config.time_cond_proj_dim)))
    if config.addition_embed_type == "text_time":
        ids = XL_TIME_IDS * config.addition_time_embed_dim
        width = config.projection_class_embeddings_input_dim - ids
        extra.append(Port("text_embeds", kind, (*free, width)))
        extra.append(Port("time_ids", kind, (*free, XL_TIME_IDS)))
    context = (*free, "sequence_length", config.cross_attention_dim)
    # float32 in every dtype: half keeps no fraction of a timestep above 512 but 0.5.
    step = Port("timestep", "float32", timestep)
    least = 2 ** (len(config.block_out_channels) - 1)
    side = config.sample_size
    sizes = ((1, side, side), (3, 3 * least, 2 * least), (2, 4 * least, 2 * least))
    return Part(
        folder="unet",
        source=net,
        module=UNet(net, tuple(port.name for port in extra)).eval(),
        dtype=dtype,
        inputs=(
            Port("sample", kind, (*free, config.in_channels, "height", "width")),
            step,
            Port("encoder_hidden_states", kind, context),
            *extra,
        ),
        outputs=(Port("out_sample", kind, (*free, config.out_channels, "height", "width")),),
        example=_sides(2, 2 * least, 3 * least) | {"sequence_length": tokens},
        cases=tuple(
            _sides(*size) | {"sequence_length": length}
            for size, length in zip(sizes, (tokens, tokens, 2 * tokens), strict=True)
        ),
    )


def _vae(net: nn.Module, dtype: torch.dtype, side: int, upcasts: bool) -> tuple[Part, Part]:
    kind = type(net).__name__
    if kind != "AutoencoderKL":
        raise UserError(f"vae is a {kind}; supported is AutoencoderKL")
    config: Any = net.config
    source = net
    if upcasts and dtype is torch.float16 and config.force_upcast:
        dtype = torch.float32
    if next(net.parameters()).dtype != dtype:
        net = copy.deepcopy(net).to(dtype)
    factor = 2 ** (len(config.block_out_channels) - 1)
    free, kind, latent = "batch_size", _name(dtype), config.latent_channels
    sizes = ((2, 6, 8), (1, side, side), (3, 5, 7), (2, 9, 4))
    example, *cases = (_sides(*size) for size in sizes)
    pixels, *pixel_cases = (_sides(b, factor * y, factor * x) for b, y, x in sizes)
    picture = (f"{factor}*height", f"{factor}*width")
    return (
        Part(
            folder="vae_decoder",
            source=source,
            module=Decoder(net).eval(),
            dtype=dtype,
            inputs=(Port("latent_sample", kind, (free, latent, "height", "width")),),
            outputs=(Port("sample", kind, (free, config.out_channels, *picture)),),
            example=example,
            cases=tuple(cases),
        ),
        Part(
            folder="vae_encoder",
            source=source,
            module=Encoder(net).eval(),
            dtype=dtype,
            inputs=(Port("sample", kind, (free, config.in_channels, "height", "width")),),
            outputs=(
                Port(
                    "latent_parameters",
                    kind,
                    (free, 2 * latent, f"height//{factor}", f"width//{factor}"),
                ),
            ),
            example=pixels,
            cases=tuple(pixel_cases),
        ),
    )


def _sides(batch: int, height: int, width: int) -> dict[str, int]:
    return {"batch_size": batch, "height": height, "width": width}


def _no_number(key: str, config: Any) -> UserError:
    return UserError(f"unet has {key} {getattr(config, key)!r}; supported is one number")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
