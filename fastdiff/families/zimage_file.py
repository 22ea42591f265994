"""Z-Image's transformer as an exported file, which takes tensors: pictures of one size, captions of
several lengths, and a mask. diffusers takes lists, and turns its heads by complex numbers, which
ONNX Runtime does not compute."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import UserError
from fastdiff.families.part import Frequencies, Part, Port, dtype_name, exportable, sides
from fastdiff.families.positions import Turns, attending
from fastdiff.models.blocks import require
from fastdiff.models.zimage import MULTIPLE, Conditions, padded

TOKENS = 64
"""Tokens of a prompt of some forty words; diffusers takes up to 512."""


class Captions(NamedTuple):
    """Captions as a file takes them."""

    cap_feats: Tensor
    """[B, T, D']; T is a multiple of `MULTIPLE`."""
    cap_attention_mask: Tensor
    """[B, T] int64: 1 for the tokens of a caption, then 0."""


class _Times(nn.Module):
    """diffusers' TimestepEmbedder [B] -> [B, C] with its frequencies as a constant."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.mlp = source.mlp
        self.waves = Frequencies(Timesteps(source.frequency_embedding_size, True, 0))

    def forward(self, times: Tensor) -> Tensor:
        embedded: Tensor = self.mlp(self.waves(times).to(self.mlp[0].weight.dtype))
        return embedded


class _Attending:
    """ZSingleStreamAttnProcessor with the turns as cosines and sines [B, S, K]."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        *,
        freqs_cis: Turns,
    ) -> Tensor:
        layers = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in layers)
        q, k = _turned(attn.norm_q(q), freqs_cis), _turned(attn.norm_k(k), freqs_cis)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v, attention_mask)
        made: Tensor = attn.to_out[0](seen.transpose(1, 2).flatten(2))
        return made


class _Places(nn.Module):
    """diffusers' RopeEmbedder: positions [..., 3] int64 -> cosines and sines [..., K] with its
    bits."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        told = rope.axes_dims, rope.axes_lens, rope.theta
        tables = rope.freqs_cis or rope.precompute_freqs_cis(*told)  # made by its first call
        for axis, table in enumerate(tables):
            self.register_buffer(f"table_{axis}", torch.view_as_real(table).flatten(1))

    def forward(self, positions: Tensor) -> Turns:
        pairs = zip(positions.unbind(-1), self.buffers(), strict=True)
        both = torch.cat([F.embedding(at, table) for at, table in pairs], dim=-1)
        cos, sin = both.unflatten(-1, (-1, 2)).unbind(-1)
        return cos, sin


class _Exported(nn.Module):
    """hidden_states [B, C, Y, X], timestep [] or [1], cap_feats [B, T, D'], their mask [B, T] of
    ones, then zeros -> out_sample [B, C, Y, X].

    As in diffusers, a caption and a picture end in tokens that pad them to a multiple of `MULTIPLE`
    and take part like all others. A shorter caption of a batch then has tokens that are never
    attended to.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        replaced = {
            "TimestepEmbedder": _Times,
            "Attention": lambda module: attending(_Attending(), module),
        }
        self.net = exportable(net, replaced)
        self.places = _Places(net.rope_embedder)
        (self.patch,) = net.all_patch_size

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, captions: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        net: Any = self.net
        many, channels, height, width = hidden_states.shape
        size, layers = self.patch, f"{self.patch}-1"
        rows, columns = height // size, width // size
        tokens = rows * columns
        times = timestep.reshape(-1).expand(many) * net.t_scale
        told = net.t_embedder(times).type_as(hidden_states)

        counts = mask.sum(1, keepdim=True)
        lengths = _whole(counts)
        at = torch.arange(_whole(captions.shape[1]), device=mask.device)
        text = _filled(net.cap_embedder(captions), at, at < counts, net.cap_pad_token)
        first = torch.stack((at + 1, *[torch.zeros_like(at)] * 2), dim=-1)
        text_turns = self.places(first.expand(many, -1, -1))
        seen = at < lengths
        for layer in net.context_refiner:
            text = layer(text, seen[:, None, None, :], text_turns)

        x = hidden_states.reshape(many, channels, rows, size, columns, size)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(many, tokens, size * size * channels)
        at = torch.arange(_whole(tokens), device=mask.device)
        own = at < tokens
        x = _filled(net.all_x_embedder[layers](x), at, own, net.x_pad_token)
        down = at // columns
        places = (lengths + 1, down, at - down * columns)
        spread = [one.expand(many, at.shape[0]) for one in places]
        turns = self.places(torch.stack(spread, dim=-1) * own[:, None])
        for layer in net.noise_refiner:
            x = layer(x, None, turns, told)

        x = torch.cat((x, text), dim=1)
        seen = torch.cat((torch.ones_like(spread[0], dtype=torch.bool), seen), dim=1)
        cos, sin = (torch.cat(both, dim=1) for both in zip(turns, text_turns, strict=True))
        for layer in net.layers:
            x = layer(x, seen[:, None, None, :], (cos, sin), told)
        x = net.all_final_layer[layers](x[:, :tokens], c=told)
        x = x.reshape(many, rows, columns, size, size, channels).permute(0, 5, 1, 3, 2, 4)
        return (x.reshape(many, channels, height, width),)


class _Own(nn.Module):
    """The same with diffusers' own call, which the file is compared with."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        (self.patch,) = net.all_patch_size

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, captions: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        net: Any = self.net
        pictures, counts = hidden_states[:, :, None], mask.sum(1).tolist()
        told = [text[:count] for text, count in zip(captions, counts, strict=True)]
        times = timestep.reshape(-1).expand(len(told))
        made = net([*pictures], times, told, return_dict=False, patch_size=self.patch)[0]
        return (torch.stack(made)[:, :, 0],)


def part(
    folder: str, net: nn.Module, dtype: torch.dtype, _: int = 0, timestep: tuple[int, ...] = ()
) -> Part:
    """Its file. UserError for a network that takes reference pictures or patches of several
    sizes."""
    config: Any = net.config
    if config.siglip_feat_dim is not None:
        raise UserError(f"{folder} has siglip_feat_dim, which cannot be exported")
    if not config.qk_norm:
        raise UserError(f"{folder} has no qk_norm, without which it cannot be exported")
    if len(config.all_patch_size) != 1 or tuple(config.all_f_patch_size) != (1,):
        raise UserError(f"{folder} has patches of several sizes or frames; supported is one size")
    free, kind, (patch,) = "batch_size", dtype_name(dtype), config.all_patch_size
    latents = (free, config.in_channels, "height", "width")
    text = (free, "sequence_length")
    # rows, columns and the tokens of a text; only 8×8 and TOKENS need no tokens that pad them
    sizes = ((2, 4, 6, 40), (1, 8, 8, TOKENS), (3, 5, 3, 5), (2, 7, 4, 33))
    example, *cases = (
        sides(batch, y * patch, x * patch) | {"sequence_length": tokens}
        for batch, y, x, tokens in sizes
    )
    return Part(
        folder=folder,
        source=net,
        module=_Exported(net).eval(),
        dtype=dtype,
        inputs=(
            Port("hidden_states", kind, latents),
            Port("timestep", "float32", timestep),
            Port("cap_feats", kind, (*text, config.cap_feat_dim)),
            Port("cap_attention_mask", "int64", text),
        ),
        outputs=(Port("out_sample", kind, latents),),
        example=example,
        cases=tuple(cases),
        most=most(net),
        unit=0.001,
        own=_Own(net).eval(),
        told=_told,
        returned=lambda sample: [*sample[:, :, None]],
    )


def for_file(net: Any, given: Conditions) -> Captions:
    """A loop's captions as its file takes them. Unsupported for more tokens than it has positions
    for."""
    captions = given.cap_feats
    require(captions is not None and len(captions) > 0, "cap_feats is missing")
    assert captions is not None
    kinds = {(one.ndim, one.shape[-1:], one.dtype, one.device) for one in captions}
    require(len(kinds) == 1 and captions[0].ndim == 2, "captions that are no [T, D] of one dtype")
    require(min(map(len, captions)) > 0, "a caption without tokens")
    longest, last = max(padded(len(one)) for one in captions), net.axes_lens[0] - 2
    require(longest <= last, f"a caption of {longest} tokens; there are positions for {last}")
    return _joined(captions)


def most(net: Any) -> int:
    """The largest height and width: those that it has positions for."""
    largest: int = net.all_patch_size[0] * min(net.axes_lens[1:])
    return largest


def _told(given: dict[str, Any]) -> dict[str, Any]:
    """From the arguments of the network's own call."""
    latents = torch.stack([*given["x"]])[:, :, 0]
    return {
        "hidden_states": latents,
        "timestep": given["t"],
        **_joined(given["cap_feats"])._asdict(),
    }


def _joined(captions: Sequence[Tensor]) -> Captions:
    """Captions [T, D'] of any lengths as tensors."""
    longest = max(padded(len(one)) for one in captions)
    text = captions[0].new_zeros(len(captions), longest, captions[0].shape[1])
    mask = text.new_zeros(text.shape[:2], dtype=torch.int64)
    for i, one in enumerate(captions):
        text[i, : len(one)] = one
        mask[i, : len(one)] = 1
    return Captions(text, mask)


def _whole(count: Any) -> Any:
    """`padded` with a quotient of positive numbers: ONNX rounds negative ones to zero."""
    return (count + MULTIPLE - 1) // MULTIPLE * MULTIPLE


def _filled(x: Tensor, at: Tensor, own: Tensor, pad: Tensor) -> Tensor:
    """Tokens [B, L, D] as [B, S, D]: those of `own` [S] or [B, S], else `pad` [1, D]; `at`: the
    numbers below S."""
    spread = x.index_select(1, at.clamp(max=x.shape[1] - 1))
    return torch.where(own[..., None], spread, pad)


def _turned(x: Tensor, turns: Turns) -> Tensor:
    """Heads [B, S, H, 2·K] with each pair of columns turned, in float32 as diffusers does."""
    cos, sin = (table[:, :, None] for table in turns)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    both = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    return torch.stack(both, dim=-1).flatten(3).type_as(x)
