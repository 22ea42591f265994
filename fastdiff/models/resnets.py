"""Resnets and what resamples pictures, in U-Nets and autoencoders, on borrowed weights."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastdiff.kernels.concat import concat
from fastdiff.kernels.conv2d import conv2d
from fastdiff.kernels.linear import linear
from fastdiff.kernels.mean_pool import mean_pool
from fastdiff.kernels.residual import residual
from fastdiff.kernels.where import on_gpu
from fastdiff.models.blocks import Columns, require
from fastdiff.models.borrow import Loan, Norm, Weights
from fastdiff.models.reads import Reader
from fastdiff.models.sums import Sum, convolved
from fastdiff.models.watch import kind


@dataclass(frozen=True)
class Resnet:
    """Two norms, each with an activation and a convolution, around which the picture is added."""

    norm1: Norm
    conv1: Weights
    norm2: Norm
    conv2: Weights
    shortcut: Weights | None
    row: slice | None
    """The columns of this block in the projected time embeddings of all blocks."""
    act: str = "silu"
    """After each norm: "silu" or "gelu"."""
    modulates: bool = False
    """Whether its columns are scale and offset after norm2; otherwise they are added before it."""
    resample: str = ""
    """"down" halves the picture by pooling, "up" doubles it, both after the first activation."""
    scale: float = 1.0
    """The factor of the result: 1 / output_scale_factor."""

    def __call__(self, x: Sum, rows: Tensor | None, beside: Tensor | None = None) -> Sum:
        """x with the channels of `beside`, a skip connection, appended. `beside` may have half as
        many pictures, if both halves of guidance share it; a resnet that resamples takes none.
        `rows` may have more than x, which is then the first pictures of the batch."""
        row = None
        if rows is not None and self.row is not None:
            row = rows[: x.batch, self.row].expand(x.batch, -1)
        if beside is not None and not on_gpu(beside):  # our CPU kernels take one tensor
            x, beside = Sum(concat(x.closed(), beside)), None
        told = {"scale_shift" if self.modulates else "row": row}
        h = x.group_normed(self.norm1, self.act, beside=beside)  # x has both from here on
        h = mean_pool(h) if self.resample == "down" else h
        size = x.twice if self.resample == "up" else None
        between = convolved(h, self.conv1, size=size)
        h = between.group_normed(self.norm2, self.act, **told, last=True)
        around = self._resampled(x.closed())
        if self.scale == 1.0:
            return convolved(h, self.conv2, around)
        h = conv2d(h, self.conv2.weight)
        return Sum(residual(h, around, self.conv2.bias, scale=self.scale))

    def _resampled(self, x: Tensor) -> Tensor:
        """The residual at the result's size. The shortcut sees the smaller of the two pictures: it
        commutes with pooling and with enlarging."""
        around = self.around(mean_pool(x) if self.resample == "down" else x)
        return residual(around, enlarge=2) if self.resample == "up" else around

    def around(self, x: Tensor) -> Tensor:
        """x or its shortcut."""
        if self.shortcut is None:
            return x
        return linear(x, self.shortcut.weight, self.shortcut.bias)

    def side(self, side: int) -> int:
        """The rows (or columns) of the result for a picture of `side` rows (or columns)."""
        return {"down": side // 2, "up": 2 * side}.get(self.resample, side)


class TimeColumns(Columns):
    """Collects time_emb_proj of resnets, which all read the same activation of the embedding."""

    act: str | None = None
    """"silu", "gelu" or "none"; None as long as there is no resnet."""

    def take_time(self, layer: Any, act: str) -> slice:
        require(self.act in (None, act), "resnets whose time embeddings differ in their activation")
        self.act = act
        return self.take(layer)


def borrow_resnet(
    module: Any, loan: Loan, rows: TimeColumns | None = None, resample: str = ""
) -> Resnet:
    """From a ResnetBlock2D that resamples its picture as `resample` says (see `Resnet`).

    `rows` assigns columns of the packed time-embedding projection; None: there is no embedding.
    """
    resnet = loan.open(module, "ResnetBlock2D")
    projection, shortcut = resnet.time_emb_proj, resnet.conv_shortcut
    norm, factor = resnet.time_embedding_norm, resnet.output_scale_factor
    modulates = norm == "scale_shift"
    embedded, unactivated = projection is not None, resnet.skip_time_act
    known = ("default", "scale_shift") if embedded else ("default", "group")
    require(norm in known, f"time embeddings of kind {norm!r}")
    require(embedded == (rows is not None), "a resnet with a missing or unexpected time embedding")
    require(isinstance(factor, (int, float)) and factor != 0, f"an output_scale_factor of {factor}")
    act = loan.activation(resnet.nonlinearity)
    loan.inert(resnet.dropout)
    conv1, conv2 = loan.conv(resnet.conv1), loan.conv(resnet.conv2)
    same = conv1.weight.shape[1] == conv2.weight.shape[0]
    require(same or shortcut is not None, "a resnet that changes its channels without a shortcut")
    _check_resampling(resnet, loan, resample, conv1.weight.shape[1])
    row = None
    if rows is not None:
        wide = loan.width(projection) == conv1.weight.shape[0] * (1 + modulates)
        require(wide, "a time embedding of another width than the resnet's")
        row = rows.take_time(projection, "none" if unactivated else act)
    return Resnet(
        norm1=loan.norm(resnet.norm1),
        conv1=conv1,
        norm2=loan.norm(resnet.norm2),
        conv2=conv2,
        shortcut=None if shortcut is None else loan.linear(shortcut),
        row=row,
        act=act,
        modulates=modulates,
        resample=resample,
        scale=1.0 / factor,
    )


def _check_resampling(resnet: Reader, loan: Loan, resample: str, channels: int) -> None:
    """Raise Unsupported unless the resnet pools ("down"), enlarges ("up") or does neither ("")."""
    up, down = resnet.upsample, resnet.downsample
    found = "" if up is None and down is None else "up" if down is None else "down"
    require(found == resample, f"a resnet that resamples {found or 'nothing'} there")
    if found == "up":
        up = loan.open(up, "Upsample2D")
        plain = up.interpolate and not up.use_conv and not up.use_conv_transpose
        require(plain and up.norm is None, "enlarging in a resnet other than by nearest pixels")
        require(up.channels == channels, f"upsampling of {up.channels} channels")
    elif found == "down":
        require(up is None, "a resnet that enlarges and halves")
        down = loan.open(down, "Downsample2D")
        require(
            not down.use_conv and down.norm is None, "halving in a resnet other than by pooling"
        )
        require(down.channels == channels, f"downsampling of {down.channels} channels")
        mean = loan.open(down.conv, nn.AvgPool2d)
        window = (mean.kernel_size, mean.stride, mean.padding, mean.ceil_mode)
        plain = window == (2, 2, 0, False) and mean.divisor_override is None
        require(plain, f"pooling by kernel, stride, padding and ceil_mode {window}")


@dataclass(frozen=True)
class Down:
    """Halve the picture: a convolution of stride 2, padded on all sides or only at the end."""

    conv: Weights
    padding: tuple[int, int]

    def __call__(self, x: Sum) -> Sum:
        return convolved(x.closed(), self.conv, stride=2, padding=self.padding)

    def side(self, side: int) -> int:
        """The rows (or columns) of the result for a picture of `side` rows (or columns)."""
        return (side + sum(self.padding) - 1) // 2


@dataclass(frozen=True)
class Up:
    """Enlarge the picture to `size` (by default twice its size), then convolve."""

    conv: Weights

    def __call__(self, x: Sum, size: tuple[int, int] | None = None) -> Sum:
        twice = x.twice
        size = twice if size is None else size
        if size == twice and x.waits:
            return convolved(x.enlarged(), self.conv)
        return convolved(x.closed(), self.conv, size=size)


def borrow_down(module: Any, loan: Loan) -> Down:
    """From a Downsample2D."""
    down = loan.open(module, "Downsample2D")
    require(down.use_conv and down.norm is None, "downsampling without a plain convolution")
    require(down.padding in (0, 1), f"downsampling padded by {down.padding}")
    weights = loan.conv(down.conv, stride=2, padding=down.padding)
    require(down.channels == weights.weight.shape[1], f"downsampling of {down.channels} channels")
    return Down(weights, (1, 1) if down.padding else (0, 1))


def borrow_up(module: Any, loan: Loan) -> Up:
    """From an Upsample2D."""
    up = loan.open(module, "Upsample2D")
    require(
        up.use_conv and not up.use_conv_transpose and up.interpolate and up.norm is None,
        "upsampling without a plain convolution",
    )
    weights = loan.conv(up.conv if up.name == "conv" else up.Conv2d_0)
    require(up.channels == weights.weight.shape[1], f"upsampling of {up.channels} channels")
    return Up(weights)


def borrow_resamplers(
    block: Reader, loan: Loan, rows: TimeColumns | None = None
) -> tuple[Down | Resnet | None, Up | Resnet | None]:
    """From a block's downsamplers and upsamplers, at most one of each; resnets need `rows`."""
    found = (getattr(block, name, None) for name in ("downsamplers", "upsamplers"))
    downs, ups = ([] if modules is None else loan.each(modules) for modules in found)
    require(len(downs) <= 1 and len(ups) <= 1, "several resamplers in a row")
    down: Down | Resnet | None = None
    up: Up | Resnet | None = None
    for module in downs:
        resnet = _is_resnet(block, "downsample_type", module, rows)
        down = borrow_resnet(module, loan, rows, "down") if resnet else borrow_down(module, loan)
    for module in ups:
        resnet = _is_resnet(block, "upsample_type", module, rows)
        up = borrow_resnet(module, loan, rows, "up") if resnet else borrow_up(module, loan)
    return down, up


def _is_resnet(block: Reader, name: str, module: Any, rows: TimeColumns | None) -> bool:
    """Whether a resampler is a resnet. A block's attribute `name` says whether its forward
    passes the time embedding on."""
    resnet, told = kind(module) == "ResnetBlock2D", getattr(block, name, None)
    require(told is None or resnet == (told == "resnet"), f"a resampler unlike its block's {name}")
    return resnet and rows is not None
