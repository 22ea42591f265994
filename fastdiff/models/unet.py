"""The U-Nets of Stable Diffusion, unCLIP, Kandinsky and DeepFloyd IF, and those without a text, on
borrowed weights."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.observe import scope
from fastdiff.models.added_kv import AddedKV
from fastdiff.models.blocks import (
    PERTURBING,
    channels_first,
    channels_last,
    repeated,
    require,
    shared,
)
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.checks import checked
from fastdiff.models.constant_channels import Constant, hoist_constant
from fastdiff.models.hoisted import Hoisted
from fastdiff.models.ip_adapter import IPAdapters, borrow_ip_adapters
from fastdiff.models.perturbed import Perturbed, perturbed_of
from fastdiff.models.resnets import Resnet
from fastdiff.models.stages import ADDED, ALONE, TOLD, Stage
from fastdiff.models.sums import Sum
from fastdiff.models.trunk import Conditions, Trunk, borrow_trunk


class Constants(NamedTuple):
    """What all steps of a picture share, channels last; G·B texts as in `Conditions`."""

    text: Tensor | None
    """[G·B, T, …] result of `Trunk.text_rows`."""
    images: tuple[Tensor, ...] = ()
    """[G·B, tokens, …] for every IP-Adapter, in the text's layout."""
    controls: tuple[Tensor, ...] = ()
    """A ControlNet's residuals: for every skip, then for the middle."""
    inners: tuple[Tensor, ...] = ()
    """A T2I-Adapter's residuals."""
    text_mask: Tensor | None = None
    """[B, 1, 1, T] added to the scores of cross-attention; [B, T] float32 for attention to text and
    pixels at once."""
    constant: Constant | None = None
    """conv_in's output for the constant channels."""
    perturbed: Perturbed | None = None


@dataclass(frozen=True)
class UNet(Trunk):
    """The predicted noise or velocity for noisy latents, [B, C, Y, X] -> the same, or 2C channels
    with the predicted variance; any Y, X."""

    recordable: ClassVar[bool] = True
    own_steps: ClassVar[bool] = True
    ip_adapters: IPAdapters | None
    ups: tuple[Stage, ...]
    norm_out: Norm
    act_out: str
    conv_out: Weights
    at_once: bool = False
    """Whether its attentions are to the text and the pixels at once (`added_kv`)."""
    multiple: int = 1
    """The latents' sides must be multiples of this: diffusers' UNet2DModel, and every resnet that
    enlarges, doubles its picture, so other sides do not meet their skips."""

    @property
    def out_channels(self) -> int:
        """The channels of a prediction: twice the latents' if it includes the variance."""
        return self.conv_out.weight.shape[0]

    def check(self, latents: Tensor, given: Conditions, copies: int = 1) -> None:
        """Raise Unsupported if diffusers itself would refuse a tensor, or convert it."""
        super().check(latents, given, copies)
        sides = tuple(latents.shape[2:])
        whole = all(side % self.multiple == 0 for side in sides)
        require(whole, f"latents of {sides}, which are not multiples of {self.multiple}")
        mask = given.encoder_attention_mask
        require(mask is None or mask.ndim == 2, "a text mask without two dimensions")
        down, middle = given.down_block_additional_residuals, given.mid_block_additional_residual
        if down is not None or middle is not None:
            whole = down is not None and middle is not None and len(down) == self.skips
            require(whole, "it was given only some of the ControlNet residuals")
            self._check_residuals("a ControlNet residual", latents, (*(down or ()), middle))
        inners = given.down_intrablock_additional_residuals
        listed = inners is None or isinstance(inners, list)
        require(listed, f"it was given T2I-Adapter residuals as a {type(inners).__name__}")
        require(inners is None or not self.at_once, "T2I-Adapter residuals, which it does not take")
        self._check_residuals("a T2I-Adapter residual", latents, self._inners(given))

    def _check_residuals(self, what: str, latents: Tensor, given: Iterable[Any]) -> None:
        for residual in given:
            checked(what, residual, self.conv_in.weight, residual.shape[1], dim=4)
            count, pictures = residual.shape[0], latents.shape[0]
            require(count in (1, pictures), f"{what} has {count} entries for {pictures} pictures")

    def _inners(self, given: Conditions) -> Sequence[Tensor]:
        """A T2I-Adapter's residuals, as many as there are places for."""
        return (given.down_intrablock_additional_residuals or ())[: len(self.downs) + 1]

    def hoist(self, given: Conditions, timesteps: Tensor, sides: Sequence[int]) -> Hoisted:
        """Compute everything that does not depend on the latents.

        Args:
            timesteps: [steps, n], n = 1 or one for each picture.
            sides: Y and X of the latents.

        Returns:
            `rows` [steps, n', …] from `time_rows`, n' = G·B if text_embeds or timestep_cond differ;
            `Constants`.

        Raises:
            Unsupported: an IP-Adapter gets inputs that fastdiff does not compute with.
        """
        text = self.text_rows(given)
        down, middle = given.down_block_additional_residuals, given.mid_block_additional_residual
        controls = () if down is None or middle is None else (*down, middle)
        constants = Constants(
            text,
            self._image_rows(given),
            tuple(map(channels_last, controls)),
            tuple(map(channels_last, self._inners(given))),
            self._text_mask(given.encoder_attention_mask, text, sides),
            hoist_constant(self.conv_in, given.constant_channels),
            self.perturbed(given),
        )
        return Hoisted(self.time_rows(timesteps, given), constants)

    def perturbed(self, given: Conditions) -> Perturbed | None:
        """What differs in the last part of the predictions, by the module's processors."""
        text = given.encoder_hidden_states
        found = perturbed_of(self.switches, PERTURBING, text, given.repeats)
        what = "perturbed attention together with a guidance embedding (timestep_cond)"
        require(found is None or given.timestep_cond is None, what)
        return found

    def _text_mask(
        self, mask: Tensor | None, text: Tensor | None, sides: Sequence[int]
    ) -> Tensor | None:
        """What `Constants` keeps of a mask [B, T] of 0 and 1."""
        if mask is None:
            return None
        bias = (1 - mask.to(self.dtype)) * -10000.0
        assert text is not None
        if not self.at_once:
            alike = mask.shape == text.shape[:2]
            require(alike, f"a text mask of {list(mask.shape)} for a text of {list(text.shape)}")
            return bias[:, None, None, :]
        # diffusers lengthens a mask of the text for the pixels, unless there are as many of them
        stages = (*self.downs, *([] if self.mid is None else [self.mid]), *self.ups)
        joined = (a for s in stages for a in s.attentions if isinstance(a, AddedKV))
        require(all(a.own for a in joined), "a text mask where pixels attend to the text alone")
        levels = [tuple(sides)]
        for down in (stage.down for stage in self.downs if stage.down is not None):
            levels.append(tuple(map(down.side, levels[-1])))
        pixels = [*map(math.prod, levels)]
        require(
            mask.shape == text.shape[:2] and mask.shape[1] not in pixels,
            f"a text mask of {list(mask.shape)} for {text.shape[1]} tokens beside {pixels} pixels",
        )
        return bias.float().contiguous()

    def predict(self, x: Tensor, row: Tensor, constants: Constants) -> Tensor:
        """The part that every step repeats, channels last throughout.

        Args:
            x: [B, Y, X, C] noisy latents.
            row: [n, …] of `Hoisted.rows`, n = 1, G·B, or B if each picture is at its own step.
            constants: with guidance, its text and IP-Adapters may have 2B or 3B entries, as may
                `row` if these differ in it; everything before the first difference is computed
                once.

        Returns:
            [B, Y, X, C], or as many as the text has entries.
        """
        text, images, controls, inners, mask, constant, perturbed = constants
        distinct = row.shape[0]
        if text is not None and 1 < distinct == x.shape[0]:
            row = repeated(row, text.shape[0])
        h, skips = self.down(
            *(x, row, text, images, mask),
            *(None, inners, constant, perturbed, distinct),
        )
        if controls:
            skips = [Sum(s.closed() + r) for s, r in zip(skips, controls[:-1], strict=True)]
            h = Sum(h.closed() + controls[-1])
        for i, stage in enumerate(self.ups):
            with scope(f"up {i}"):
                for resnet, attention in zip(stage.resnets, stage.attentions, strict=True):
                    h = resnet(h, row, beside=shared(skips.pop().closed(), h.batch))
                    h = h if attention is None else attention(h, text, images, mask, perturbed)
                if stage.up is not None:  # to the next skips' size, which may be odd
                    _, rows_next, columns_next, _ = skips[-1].closed().shape
                    h = stage.enlarged(h, row, (rows_next, columns_next))
        with scope("out"):
            x = h.group_normed(self.norm_out, self.act_out, last=True)
            return conv2d(x, self.conv_out.weight, self.conv_out.bias)

    def unpack(self, x: Tensor, sides: Sequence[int]) -> Tensor:
        """[B, Y, X, C] -> [B, C, Y, X], contiguous."""
        return channels_first(x)

    def _image_rows(self, given: Conditions) -> tuple[Tensor, ...]:
        """Keys and values for every cross-attention from image prompts; see `IPAdapters.rows`."""
        if self.ip_adapters is None:
            return ()
        what = "image_embeds are missing in added_cond_kwargs, which IP-Adapters need"
        require(given.image_embeds is not None, what)
        rows = self.ip_adapters.rows(given.image_embeds)
        text = given.encoder_hidden_states
        alike = text is not None and all(image.shape[0] == text.shape[0] for image in rows)
        require(alike, "the numbers of image_embeds and texts differ")
        return rows


def borrow_unet(module: Any, loan: Loan) -> UNet:
    """Borrow a UNet2DConditionModel's weights; raises Unsupported for other structures."""
    net, config = loan.open(module, "UNet2DConditionModel"), loan.config(module)
    require(not config.center_input_sample, "center_input_sample")
    projection, told = getattr(net, "encoder_hid_proj", None), config.encoder_hid_dim_type
    named = (projection is None) == (told is None)
    require(named, f"encoder_hid_dim_type {told!r}, which contradicts encoder_hid_proj")
    pictures = projection if told == "ip_image_proj" else None
    require(
        getattr(net, "text_encoder_hid_proj", None) is None,
        "a projection of the text together with IP-Adapters (Kolors)",
    )
    require(getattr(net, "position_net", None) is None, "GLIGEN")
    require(net.conv_norm_out is not None, "a U-Net without a norm before its output")
    blocks = (*loan.each(net.down_blocks), net.mid_block, *loan.each(net.up_blocks))
    at_once = any("Simple" in type(block).__name__ for block in blocks)
    kinds = ADDED if at_once else TOLD
    trunk, ups, text = borrow_trunk(net, config, loan, loan.each(net.up_blocks), kinds)
    require(pictures is None or not at_once, "an IP-Adapter of attention to text and pixels")
    times = sum(stage.up is not None for stage in ups)
    require(net.num_upsamplers == times, f"num_upsamplers {net.num_upsamplers}")
    doubles = any(isinstance(stage.up, Resnet) for stage in ups)
    unet = UNet(
        **trunk,
        ip_adapters=borrow_ip_adapters(pictures, text.attentions, loan),
        ups=ups,
        norm_out=loan.norm(net.conv_norm_out),
        act_out=loan.activation(net.conv_act),
        conv_out=loan.conv(net.conv_out),
        at_once=at_once,
        multiple=2**times if doubles else 1,
    )
    loan.seal()
    return unet


def borrow_picture_unet(module: Any, loan: Loan) -> UNet:
    """Lend a UNet2DModel's weights; raises Unsupported for what this runtime is not."""
    net, config = loan.open(module, "UNet2DModel"), loan.config(module)
    require(not config.center_input_sample, "center_input_sample")
    trunk, ups, _ = borrow_trunk(net, config, loan, loan.each(net.up_blocks), ALONE)
    classes = trunk["classes"]
    if classes is not None and classes.embedding is not None:  # diffusers does not cast them
        single = loan.dtype == torch.float32
        require(single, f"class embeddings of timesteps in {loan.dtype}")
    unet = UNet(
        **trunk,
        ip_adapters=None,
        ups=ups,
        norm_out=loan.norm(net.conv_norm_out),
        act_out=loan.activation(net.conv_act),
        conv_out=loan.conv(net.conv_out),
        multiple=2 ** sum(stage.up is not None for stage in ups),
    )
    loan.seal()
    return unet
