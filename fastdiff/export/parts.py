"""The exported parts of a pipeline: text encoders, and those from the networks' families."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.families import family
from fastdiff.families.part import Part, Port, draw, dtype_name
from fastdiff.recipes import exported, side_of

__all__ = ["Part", "Port", "draw", "left_out", "networks", "parts"]

TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CLIPS = {"CLIPTextModel": "pooler_output", "CLIPTextModelWithProjection": "text_embeds"}
"""CLIP's classes, with their names for the pooled text."""
T5, UMT5, T5_TOKENS = "T5EncoderModel", "UMT5EncoderModel", 256
"""The classes, which take any length, and the length that pipelines use."""

GUIDANCE = "guidance"
"""The input for a distilled guidance."""
MODELS = {
    *("Qwen2_5_VLForConditionalGeneration", "Qwen3Model", "Qwen3ForCausalLM"),
    "Mistral3ForConditionalGeneration",
}
"""Text encoders that are left out: language models, of which a pipeline reads a hidden state."""


class Text(nn.Module):
    """input_ids [B, L], for some attention_mask [B, L] -> the encoder's outputs and, if `states`,
    every hidden state [B, L, D]."""

    def __init__(self, net: nn.Module, first: tuple[str, ...], states: bool) -> None:
        super().__init__()
        self.net, self.first, self.states = net, first, states

    def forward(self, input_ids: Tensor, *mask: Tensor) -> tuple[Tensor, ...]:
        told = {"attention_mask": mask[0]} if mask else {}
        out = self.net(input_ids, output_hidden_states=self.states, return_dict=True, **told)
        more = out.hidden_states if self.states else ()
        return (*(getattr(out, name) for name in self.first), *more)


def parts(pipe: Any, dtype: torch.dtype, timestep: tuple[int, ...] = ()) -> tuple[Part, ...]:
    """The networks of a pipeline, with weights, inputs and outputs in `dtype`.

    timestep: the shape of the denoising network's timestep: () as in Optimum, or (1,).

    If diffusers runs the VAE in float32 beside a float16 U-Net (`force_upcast`, which only its XL
    pipelines read), its part is float32, too. UserError for a network whose forward needs more than
    these inputs.
    """
    masked = _masked(pipe)
    return (
        *(_text(key, module, dtype, masked) for key, module in _texts(pipe).items()),
        *networks(pipe, dtype, timestep),
    )


def networks(pipe: Any, dtype: torch.dtype, timestep: tuple[int, ...] = ()) -> tuple[Part, ...]:
    """The parts of `parts` that are not text encoders, the denoising network first."""
    recipe = exported(pipe, f"{type(pipe).__name__} cannot be exported")
    lengths = map(_length, _texts(pipe).values())
    tokens = [length for length in lengths if length is not None]
    found: list[Part] = []
    side = 0
    for name, own in recipe.networks.items():
        module, of = getattr(pipe, name), family(own)
        if of.denoised is not None:
            found.append(of.denoised.part(name, module, dtype, (tokens or [77])[-1], timestep))
            _check_guidance(pipe, found[-1])
            side = side_of(pipe)
        elif of.parts is not None:
            found += of.parts(module, dtype, side, recipe.upcasts)
    return tuple(found)


def _check_guidance(pipe: Any, part: Part) -> None:
    """UserError if the file takes a distilled guidance that the pipeline does not give."""
    recipe = exported(pipe, f"{type(pipe).__name__} cannot be exported")
    given = any(GUIDANCE in plan.conditions for plan in recipe.plans)
    if not given and any(port.name == GUIDANCE for port in part.inputs):
        raise UserError(
            f"a {type(pipe).__name__} gives its {part.folder} no {GUIDANCE}, which a file of this"
            " one would take; export one whose config has no guidance_embeds"
        )


def _masked(pipe: Any) -> bool:
    """Whether the network takes the text encoder's attention mask."""
    recipe = exported(pipe, f"{type(pipe).__name__} cannot be exported")
    return any("encoder_attention_mask" in plan.conditions for plan in recipe.plans)


def _texts(pipe: Any) -> dict[str, nn.Module]:
    found = {key: getattr(pipe, key, None) for key in TEXTS}
    return {
        key: module
        for key, module in found.items()
        if module is not None and type(module).__name__ not in MODELS
    }


def left_out(pipe: Any) -> tuple[str, ...]:
    """Components with weights that are not exported, such as a safety checker."""
    known = {*_texts(pipe), *exported(pipe, f"{type(pipe).__name__} cannot be exported").networks}
    return tuple(
        name
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module) and name not in known
    )


def _text(folder: str, net: nn.Module, dtype: torch.dtype, masked: bool = False) -> Part:
    kind = type(net).__name__
    config: Any = net.config
    if kind not in (known := (*CLIPS, T5, UMT5)):
        raise UserError(f"{folder} is a {kind}; supported are {', '.join(known)}")
    whole = ("batch_size", "sequence_length", config.hidden_size)
    first: tuple[tuple[str, tuple[int | str, ...]], ...] = (("last_hidden_state", whole),)
    states: list[tuple[str, tuple[int | str, ...]]] = []
    if kind in CLIPS:
        projected = kind == "CLIPTextModelWithProjection"
        width = config.projection_dim if projected else config.hidden_size
        pool = (CLIPS[kind], ("batch_size", width))
        first = (pool, *first) if projected else (*first, pool)
        states = [(f"hidden_states.{i}", whole) for i in range(config.num_hidden_layers + 1)]
    masked = masked or kind == UMT5  # only AuraFlow's, which takes the padding mask
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    length = _length(net) or T5_TOKENS
    sizes = ((2, length - 1), (1, length), (3, 5), (2, length // 2))
    example, *cases = ({"batch_size": b, "sequence_length": tokens} for b, tokens in sizes)
    return Part(
        folder=folder,
        source=net,
        module=Text(net, tuple(name for name, _ in first), states=bool(states)).eval(),
        dtype=dtype,
        inputs=tuple(Port(name, "int64", ("batch_size", "sequence_length")) for name in names),
        outputs=tuple(Port(name, dtype_name(dtype), shape) for name, shape in (*first, *states)),
        example=example,
        cases=tuple(cases),
    )


def _length(net: nn.Module) -> int | None:
    """The number of tokens that a text encoder has positions for; None: any number."""
    config: Any = net.config
    return getattr(config, "max_position_embeddings", None)
