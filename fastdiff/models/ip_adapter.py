"""IP-Adapters: image prompts as extra tokens that every cross-attention reads beside the text, or
that the picture attends to in FLUX's blocks of two streams."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.kernels.linear import linear
from fastdiff.models.blocks import Columns, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.reads import Reader
from fastdiff.models.watch import kind

PROCESSOR = "IPAdapterAttnProcessor2_0"
"""diffusers' attention processor for a cross-attention with IP-Adapters."""


@dataclass(frozen=True)
class IPAdapters:
    """A network's IP-Adapters; the scales are read from diffusers' processors at every use."""

    projection: Any
    """diffusers' MultiIPAdapterImageProjection, which is called rather than borrowed."""
    processors: tuple[Any, ...]
    """One for every attention, in the order of the columns."""
    widths: tuple[int, ...]
    """Columns of K, and as many of V, for every cross-attention; in the text's layout."""
    packed: tuple[Weights, ...]
    """to_k_ip and to_v_ip of every cross-attention, by adapter."""

    def rows(self, image_embeds: Any) -> tuple[Tensor, ...]:
        """Keys and scaled values for every cross-attention, by adapter.

        Args:
            image_embeds: as `added_cond_kwargs["image_embeds"]`: for each adapter [B, N, ...], for
                N pictures.

        Returns:
            For each adapter [B, N·tokens, all columns]; no tokens if all its scales are 0.

        Raises:
            Unsupported: scales or tokens that fastdiff does not compute with.
        """
        pictures = self.projection(image_embeds)
        return tuple(self._rows(i, tokens) for i, tokens in enumerate(pictures))

    def _rows(self, adapter: int, tokens: Tensor) -> Tensor:
        weight, bias = self.packed[adapter].weight, self.packed[adapter].bias
        require(
            tokens.ndim == 4
            and tokens.shape[-1] == weight.shape[1]
            and (tokens.dtype, tokens.device) == (weight.dtype, weight.device),
            f"an IP-Adapter's pictures are {tokens.dtype} {list(tokens.shape)} on {tokens.device}",
        )
        tokens = tokens.flatten(1, 2)
        scales = self._scales(adapter)
        if not any(scales):
            return tokens.new_empty(tokens.shape[0], 0, weight.shape[0])
        # attention is linear in V, so V can carry the scale; then no recording depends on it
        factors = [(float(scale != 0), float(scale)) for scale in scales]
        exact = torch.promote_types(weight.dtype, torch.float32)
        column = torch.repeat_interleave(
            torch.tensor(factors, dtype=exact).flatten(),
            torch.tensor(self.widths).repeat_interleave(2),
        ).to(weight.device)
        rows = (linear(tokens, weight, bias) * column).to(weight.dtype)
        # diffusers skips these blocks, even if they hold NaN
        return rows.masked_fill_(column == 0, 0)

    def _scales(self, adapter: int) -> list[float]:
        count = len(self.packed)
        require(
            all(len(processor.scale) == count for processor in self.processors),
            "not one IP-Adapter scale for each adapter",
        )
        scales = [processor.scale[adapter] for processor in self.processors]
        require(
            all(isinstance(scale, int | float) for scale in scales),
            "an IP-Adapter scale that is not a number, as with masks",
        )
        return scales


def borrow_ip_adapters(
    projection: Any, attentions: Sequence[Reader], loan: Loan, name: str = PROCESSOR
) -> IPAdapters | None:
    """From a network's encoder_hid_proj and its attentions, with processors of the class `name`;
    None if it has no IP-Adapters."""
    carried = [kind(attention.processor) == name for attention in attentions]
    if projection is None:
        require(not any(carried), "IP-Adapter processors without a projection (encoder_hid_proj)")
        return None
    require(isinstance(projection, nn.Module), f"encoder_hid_proj {projection!r}")
    projecting = loan.open(loan.called(projection), "MultiIPAdapterImageProjection")
    require(all(carried), "IP-Adapters in only some of the cross-attentions")
    count = len(projecting.image_projection_layers)
    packed = [Columns(loan) for _ in range(count)]
    for attention in attentions:
        processor = loan.open(attention.processor, name)
        both = loan.each(processor.to_k_ip), loan.each(processor.to_v_ip)
        require(
            all(len(layers) == count for layers in both),
            "IP-Adapter processors and projection for different numbers of adapters",
        )
        for columns, *layers in zip(packed, *both, strict=True):
            require(
                all(loan.width(layer) == attention.inner_dim for layer in layers),
                "IP-Adapter keys and values of a width other than the text's",
            )
            columns.take(*layers)
    weights = tuple(loan.linear(*columns.layers) for columns in packed)
    widths = tuple(attention.inner_dim for attention in attentions)
    processors = tuple(attention.processor for attention in attentions)
    return IPAdapters(projection, processors, widths, weights)
