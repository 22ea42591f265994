"""The blocks of SD3's MM-DiT, on borrowed weights: picture and text attend to each other.

A block's norms are modulated by vectors that depend only on the timestep and the pooled text. The
vectors of all norms are side by side in `row`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdiff.kernels.geglu import geglu
from fastdiff.kernels.linear import linear
from fastdiff.kernels.residual import residual
from fastdiff.models.blocks import Columns, require
from fastdiff.models.borrow import Loan, Weights
from fastdiff.models.joint_attention import Image, JointAttention, borrow_joint_attention
from fastdiff.models.rotary import Turns
from fastdiff.models.stream import Stream
from fastdiff.models.switches import Switch

_VECTORS = {
    **{"AdaLayerNormZero": 6, "AdaLayerNormZeroSingle": 3},
    **{"SD35AdaLayerNormZeroX": 9, "AdaLayerNormContinuous": 2},
}
"""The number of vectors that a norm of each class takes."""


Branch = Callable[[Stream, Tensor, Tensor, Tensor], Stream]
"""A stream and [B, D] shift, scale and gate -> the stream after the branch."""


@dataclass(frozen=True)
class MLP:
    eps: float
    up: Weights
    """Where it is `gated`, of the gate, then of the value."""
    down: Weights
    gated: bool = False
    """Whether a value times the SiLU of a gate takes the place of GELU."""

    def __call__(self, x: Stream, shift: Tensor, scale: Tensor, gate: Tensor) -> Stream:
        h = x.normed(self.eps, shift, scale)
        if self.gated:
            h = geglu(h, self.up.weight, self.up.bias, act="silu_first")
        else:
            h = linear(h, self.up.weight, self.up.bias, act="gelu_tanh")
        return Stream(linear(h, self.down.weight, self.down.bias), gate, x.closed())


@dataclass(frozen=True)
class Modulated:
    """A LayerNorm without weights, and the position of its vectors in `row`."""

    eps: float
    columns: slice
    count: int

    def vectors(self, row: Tensor) -> tuple[Tensor, ...]:
        """[B, D] each. If there are two, the scale comes first; otherwise the shift."""
        return row[:, self.columns].chunk(self.count, 1)


@dataclass(frozen=True)
class JointBlock:
    """One layer; without `text`, only the picture's part."""

    norm: Modulated
    attention: JointAttention
    own: JointAttention | None
    """SD3.5-medium's second attention: the picture attends only to itself."""
    mlp: Branch
    text_norm: Modulated | None
    text_mlp: Branch | None
    """None if the text's result is not used."""

    def __call__(
        self,
        picture: Stream,
        text: Stream | None,
        row: Tensor,
        text_bias: Tensor | None = None,
        images: tuple[Image | None, ...] = (None, None),
        perturbed: int = 0,
        turns: tuple[Turns | None, Turns | None] = (None, None),
        pictures: Sequence[Tensor] = (),
    ) -> tuple[Stream, Stream | None]:
        """`row`: [B, all vectors]. `images`: for `attention` and `own`. `perturbed`, `turns` and
        `pictures`: for `attention`. The returned text is None if its result is not used."""
        shift, scale, gate, *vectors = self.norm.vectors(row)
        h = picture.normed(self.norm.eps, shift, scale)
        h_text, text_vectors = None, list[Tensor]()
        if text is not None and self.text_norm is not None:
            first, second, *text_vectors = self.text_norm.vectors(row)
            shift, scale = (first, second) if text_vectors else (second, first)
            h_text = text.normed(self.text_norm.eps, shift, scale)
        seen, told, apart = self.attention(
            h, h_text, text_bias, images[0], perturbed, turns, pictures
        )
        x = picture.closed()
        if self.own is not None:
            own_shift, own_scale, own_gate = vectors[3:]
            h = picture.normed(self.norm.eps, own_shift, own_scale)
            x, gate = residual(x, seen, gate=gate), own_gate
            seen, *_ = self.own(h, image=images[1])
        picture = self.mlp(Stream(seen, gate, x), *vectors[:3])
        if apart is not None:
            picture = picture.plus(apart)
        if text is None or told is None or self.text_mlp is None:
            return picture, None
        gate, *rest = text_vectors
        return picture, self.text_mlp(Stream(told, gate, text.closed()), *rest)


def borrow_modulated(module: Any, loan: Loan, rows: Columns, width: int, name: str) -> Modulated:
    """From the norm of class `name`; `rows` assigns columns of the packed modulations."""
    norm, count = loan.open(module, name), _VECTORS[name]
    require(getattr(norm, "emb", None) is None, "a norm with an embedding of its own")
    loan.silu(norm.silu)
    columns = rows.take(norm.linear)
    require(
        columns.stop - columns.start == count * width, "a norm whose width differs from its block's"
    )
    return Modulated(loan.bare_norm(norm.norm, width), columns, count)


def borrow_mlp(norm: Any, module: Any, loan: Loan, width: int) -> MLP:
    """From a LayerNorm and the FeedForward after it."""
    gelu, dropout, down = loan.each(loan.open(module, "FeedForward").net, 3)
    loan.inert(dropout)
    up = loan.open(gelu, "GELU")
    require(up.approximate == "tanh", f"a GELU of kind {up.approximate!r}")
    return MLP(loan.bare_norm(norm, width), loan.linear(up.proj), loan.linear(down))


def borrow_joint_block(
    module: Any,
    loan: Loan,
    rows: Columns,
    width: int,
    asked: bool,
    switches: list[Switch] | None = None,
) -> JointBlock:
    """From a JointTransformerBlock; `asked`: whether the text's result is used; `switches`: see
    `open_joint_attention`."""
    block = loan.open(module, "JointTransformerBlock")
    require(block._chunk_size is None, "a feed-forward layer in chunks")
    last = bool(block.context_pre_only)
    require(not (last and asked), "a block before the last that drops its text")
    dual = bool(block.use_dual_attention)
    zero = "SD35AdaLayerNormZeroX" if dual else "AdaLayerNormZero"
    context = "AdaLayerNormContinuous" if last else "AdaLayerNormZero"
    if not asked:
        loan.unused(block.norm2_context)
        loan.unused(block.ff_context)
    return JointBlock(
        norm=borrow_modulated(block.norm1, loan, rows, width, zero),
        attention=borrow_joint_attention(block.attn, loan, True, asked, switches),
        own=borrow_joint_attention(block.attn2, loan) if dual else None,
        mlp=borrow_mlp(block.norm2, block.ff, loan, width),
        text_norm=borrow_modulated(block.norm1_context, loan, rows, width, context),
        text_mlp=borrow_mlp(block.norm2_context, block.ff_context, loan, width) if asked else None,
    )
