"""The parts that a U-Net and its ControlNets share: embeddings, the down half and the middle."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.linear import linear
from fastdiff.kernels.linear.spec import ACTIVATIONS
from fastdiff.kernels.observe import scope
from fastdiff.models.blocks import repeated, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.checks import check_count, checked, refuse
from fastdiff.models.class_embeddings import Classes, borrow_classes
from fastdiff.models.conditions import (
    Summary,
    TextNorms,
    Tokens,
    Told,
    borrow_summary,
    borrow_tokens,
    keys_and_values,
    told,
)
from fastdiff.models.constant_channels import Constant, check_constant
from fastdiff.models.embeddings import Embedding, Sinusoid, borrow_embedding, borrow_sinusoid
from fastdiff.models.perturbed import Perturbed
from fastdiff.models.reads import Reader
from fastdiff.models.resnets import TimeColumns
from fastdiff.models.stages import ALONE, TOLD, Stage, borrow_stage
from fastdiff.models.sums import Sum, convolved
from fastdiff.models.switches import Switch
from fastdiff.models.transformer import CrossColumns


class Conditions(NamedTuple):
    """The inputs of a U-Net or a ControlNet besides latents and timesteps, by the argument names of
    diffusers' `forward`. G: 2 with guidance, unconditional first; 1 for a single call."""

    encoder_hidden_states: Tensor | None = None
    """[G·B, T, D] the text; None for a U-Net without cross-attention or with tokens of a picture
    alone."""
    text_embeds: Tensor | None = None
    """[G·B, D'] for SDXL and Kandinsky 2.1."""
    time_ids: Tensor | None = None
    """[G·B, 6] for SDXL."""
    timestep_cond: Tensor | None = None
    """[B, D''] guidance embedding of distilled models (LCM); they run without guidance."""
    image_embeds: Any = None
    """For each IP-Adapter [G·B, N, ...], for N pictures; or Kandinsky's [G·B, D]."""
    controlnet_cond: Tensor | None = None
    """[B, channels, rows, columns] a ControlNet's control picture."""
    down_block_additional_residuals: Sequence[Tensor] | None = None
    """A ControlNet's residuals for every skip, channels first."""
    mid_block_additional_residual: Tensor | None = None
    """A ControlNet's residual for the middle."""
    down_intrablock_additional_residuals: Sequence[Tensor] | None = None
    """A T2I-Adapter's residuals, channels first."""
    encoder_attention_mask: Tensor | None = None
    """[B, T] of 0 and 1: 1 for the tokens to attend to."""
    class_labels: Tensor | None = None
    """[n] or [n, D], n = 1 or G·B: what the network's class embedding takes."""
    constant_channels: Tensor | None = None
    """[n, C', Y, X] channels of the network's input that are the same in every step, n = B or G·B.
    They follow the latents' own; in a single call the latents have all of them."""
    repeats: bool | None = None
    """Whether the last predictions have the same conditions as those before them
    (perturbed-attention guidance)."""


@dataclass(frozen=True)
class Trunk:
    sinusoid: Sinusoid
    time: Embedding
    added_sinusoid: Sinusoid | None
    added: Embedding | None
    summary: Summary | None
    """What else is added to the time embedding."""
    acts: tuple[str, ...]
    """The activations of the time embedding, one after the other."""
    classes: Classes | None
    rows: Weights
    """time_emb_proj of every resnet."""
    text: Weights | None
    """to_k and to_v of every cross-attention; None where there is none."""
    text_norms: TextNorms
    tokens: Tokens | None
    """A projection of the text, or of other conditions in its place, before all of them."""
    conv_in: Weights
    downs: tuple[Stage, ...]
    mid: Stage | None
    switches: tuple[Switch, ...]
    """The attention processors of all self-attentions, by their number."""

    @property
    def dtype(self) -> torch.dtype:
        return self.conv_in.weight.dtype

    def check(self, latents: Tensor, given: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it.

        latents: [B, C, Y, X]. copies: texts for each of them, 2 with guidance.
        """
        condition = given.timestep_cond
        projection = self.time.condition
        if self.added is not None:
            missing = given.text_embeds is None or given.time_ids is None
            require(not missing, "text_embeds or time_ids are missing in added_cond_kwargs")
        weight, channels = self.conv_in.weight, self.conv_in.weight.shape[1]
        constant = given.constant_channels
        if constant is not None:
            check_constant(constant, latents, weight, copies)
            channels -= constant.shape[1]
        checked("sample", latents, weight, channels, dim=4)
        if self.text is None:
            refuse(encoder_hidden_states=given.encoder_hidden_states)
        for name, width, dim in self.told():
            value = getattr(given, name)
            single = value is None or isinstance(value, Tensor)
            require(single, f"{name} is a {type(value).__name__}; expected one tensor")
            check_count(name, checked(name, value, weight, width, dim), latents, copies)
        if self.classes is None:
            refuse(class_labels=given.class_labels)
        else:
            self.classes.check(given.class_labels, weight, copies * latents.shape[0])
        if condition is not None:
            what = "it was given timestep_cond, but has no projection for it"
            require(projection is not None, what)
            assert projection is not None
            checked("timestep_cond", condition, weight, projection.weight.shape[1], dim=2)

    def told(self) -> Told:
        """Which conditions of texts and pictures it reads: name, columns, dimensions."""
        return told(self.text, self.tokens, self.summary)

    def pack(self, latents: Tensor) -> Tensor:
        """[B, C, Y, X] -> [B, Y, X, C], in the same memory."""
        return latents.permute(0, 2, 3, 1)

    def down(
        self,
        x: Tensor,
        rows: Tensor,
        text: Tensor | None,
        images: Sequence[Tensor] = (),
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        inner: Sequence[Tensor] = (),
        constant: Constant | None = None,
        perturbed: Perturbed | None = None,
        distinct: int = 0,
    ) -> tuple[Sum, list[Sum]]:
        """The down half and the middle, channels last; arguments as for `UNet.predict`.

        Args:
            condition: added to conv_in's output, and of its shape.
            perturbed: what differs in the last part of the batch.
            inner: residuals of a T2I-Adapter.
            constant: replaces conv_in if x lacks the constant channels.
            distinct: after how many entries the rows repeat; 0: they do not.

        Returns:
            The middle's output, and the skips: every layer's output for the up half.
        """
        inner = list(inner)
        with scope("conv in"):
            h = convolved(x, self.conv_in, condition) if constant is None else constant(x)
            distinct = distinct or rows.shape[0]
            batch = h.batch if distinct == 1 else distinct
            texts = batch if text is None else text.shape[0]
            if perturbed is not None:
                batch = perturbed.first(h.batch, batch, texts)
            elif texts > 2 * batch:  # only halves can share what is before their texts
                batch = texts
            h = h if batch == h.batch else Sum(repeated(h.closed(), batch))
        skips = [h]
        for i, stage in enumerate(self.downs):
            with scope(f"down {i}"):
                for resnet, attention in zip(stage.resnets, stage.attentions, strict=True):
                    h = resnet(h, rows)
                    h = h if attention is None else attention(h, text, images, mask, perturbed)
                    skips.append(h)
                # diffusers adds before the resampler in a block with cross-attention, else after it
                if inner and stage.crossed:
                    h = skips[-1] = Sum(h.closed() + inner.pop(0))
                if stage.down is not None:
                    h = stage.halved(h, rows)
                    skips.append(h)
                if inner and not stage.crossed:
                    h = skips[-1] = Sum(h.closed() + inner.pop(0))
        if self.mid is not None:
            with scope("mid"):
                h = self.mid.resnets[0](h, rows)
                for attention, resnet in zip(
                    self.mid.attentions, self.mid.resnets[1:], strict=True
                ):
                    h = h if attention is None else attention(h, text, images, mask, perturbed)
                    h = resnet(h, rows)
                if inner and inner[0].shape == h.closed().shape:
                    h = Sum(h.closed() + inner.pop(0))
        return h, skips

    @property
    def skips(self) -> int:
        """The number of skips from the down half to the up half."""
        return 1 + sum(len(s.resnets) + (s.down is not None) for s in self.downs)

    def text_rows(self, given: Conditions) -> Tensor | None:
        """Keys and values for every cross-attention, [G·B, T, all their widths]; or None."""
        text = given.encoder_hidden_states
        with scope("text rows"):
            if self.tokens is not None:
                text = self.tokens(text, given.image_embeds)
            if self.text is None or text is None:
                return None
            return keys_and_values(text, self.text, self.text_norms)

    def time_rows(self, timesteps: Tensor, given: Conditions) -> Tensor:
        """The projected time embeddings of every resnet: [steps, n, all their channels].

        `timesteps` [steps, n] broadcast against the conditions' [B, …].
        """
        with scope("time rows"):
            dtype, text_embeds, time_ids = self.dtype, given.text_embeds, given.time_ids
            embedding = self.time(self.sinusoid(timesteps).to(dtype), given.timestep_cond)
            if self.added is not None and self.added_sinusoid is not None:
                assert text_embeds is not None
                assert time_ids is not None
                sizes = self.added_sinusoid(time_ids.flatten()).reshape(len(text_embeds), -1)
                added = torch.cat([text_embeds, sizes], dim=-1).to(dtype)
                embedding = embedding + self.added(added)
            if self.classes is not None and given.class_labels is not None:
                embedding = embedding + self.classes(given.class_labels, dtype)
            if self.summary is not None:
                told = given.encoder_hidden_states if self.summary.pooling else text_embeds
                embedding = sum(self.summary(told, given.image_embeds), embedding)
            for act in self.acts:
                embedding = ACTIVATIONS[act](embedding)
            return linear(embedding, self.rows.weight, self.rows.bias)


def borrow_trunk(
    net: Reader,
    config: Reader,
    loan: Loan,
    ups: Sequence[Any] = (),
    kinds: tuple[str, ...] = TOLD,
) -> tuple[dict[str, Any], tuple[Stage, ...], CrossColumns]:
    """From a Reader of a UNet2DConditionModel, a UNet2DModel or a ControlNetModel.

    kinds: the classes its blocks may have.

    Returns:
        The fields of its Trunk; the stages of the blocks `ups`; its cross-attentions, in the order
        of the text's columns, and the switches of its self-attentions.
    """
    more = getattr(config, "addition_embed_type", None)
    timed, projection = more == "text_time", getattr(net, "encoder_hid_proj", None)
    told = getattr(config, "encoder_hid_dim_type", None)
    own = projection is not None and told != "ip_image_proj"
    rows, text = TimeColumns(loan), CrossColumns(loan)
    blocks, middle = loan.each(net.down_blocks), net.mid_block
    downs = tuple(borrow_stage(block, kinds, loan, rows, text) for block in blocks)
    mid = None if middle is None else borrow_stage(middle, kinds, loan, rows, text)
    stages = tuple(borrow_stage(block, kinds, loan, rows, text) for block in ups)
    require(bool(text.layers) or kinds is ALONE, "a U-Net without cross-attention")
    whole = len(text.norms) in (0, len(text.layers) // 2)
    require(whole, "cross-attentions of which only some normalise the text")
    added, first_act = net.add_embedding if timed else None, getattr(net, "time_embed_act", None)
    acts = [] if first_act is None else [loan.activation(first_act)]
    sinusoid = borrow_sinusoid(net.time_proj, loan)
    time = borrow_embedding(net.time_embedding, loan)
    wide = time.first.weight.shape[1]
    require(sinusoid.width == wide, f"a time embedding of {wide} columns for {sinusoid.width}")
    fields = {
        "sinusoid": sinusoid,
        "time": time,
        "added_sinusoid": None if added is None else borrow_sinusoid(net.add_time_proj, loan),
        "added": None if added is None else borrow_embedding(added, loan),
        "summary": None
        if more is None or timed
        else borrow_summary(getattr(net, "add_embedding", None), more, loan),
        "acts": (*acts, rows.act),
        "classes": borrow_classes(net, config, loan, sinusoid, time),
        "rows": loan.linear(*rows.layers),
        "text": loan.linear(*text.layers) if text.layers else None,
        "text_norms": tuple(text.norms),
        "tokens": borrow_tokens(projection, told, loan) if own else None,
        "conv_in": loan.conv(net.conv_in),
        "downs": downs,
        "mid": mid,
        "switches": tuple(text.switches),
    }
    return fields, stages, text
