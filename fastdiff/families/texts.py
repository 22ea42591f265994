"""Texts as embeddings, for the calls of pipelines without text encoders."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fastdiff.recipes import denoiser

ENCODERS = ("text_encoder", "bert")
WIDTHS = ("caption_channels", "joint_attention_dim", "encoder_hid_dim", "cap_feat_dim")
"""The config entries of networks that tell the width of a text's embedding."""


def embedded(
    pipe: Any, takes: Collection[str], tokens: int, negative: int | None = None
) -> dict[str, Any]:
    """Noise for a text and a negative text, under those names of its call that it `takes`; {} if it
    has a text encoder, or its network takes no text.

    Embeddings are [1, tokens, D] and, if pooled, [1, P], in the network's dtype on its device;
    masks are [1, tokens] int64, all ones. Z-Image takes lists, here of one [tokens, D], and so a
    negative text of its own length: `negative`, by default `tokens`.
    """
    net = denoiser(pipe)
    width = next((net.config[name] for name in WIDTHS if net.config.get(name)), None)
    if width is None or any(getattr(pipe, name, None) is not None for name in ENCODERS):
        return {}
    pooled, listed = net.config.get("pooled_projection_dim") or 0, "cap_feat_dim" in net.config

    def noise(*shape: int, seed: int) -> Tensor:
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return made.to(net.device, net.dtype)

    given: dict[str, Any] = {}
    for seed, name in enumerate(("prompt", "negative_prompt"), 1):
        length = negative if seed == 2 and listed and negative else tokens
        text, mask = noise(1, length, width, seed=seed), torch.ones(1, length, dtype=torch.long)
        given |= {name: None, f"{name}_embeds": [*text] if listed else text}
        pool = name.replace("prompt", "pooled_prompt_embeds")
        given[pool] = noise(1, pooled, seed=seed + 2)
        for kind in ("attention", "embeds"):
            given[f"{name}_{kind}_mask"] = mask.to(net.device)
    return {name: value for name, value in given.items() if name in takes}
