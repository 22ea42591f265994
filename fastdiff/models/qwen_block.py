"""The blocks of Qwen-Image, which are computed as SD3's with rotated heads."""

from typing import Any

from fastdiff.models.blocks import Columns, require
from fastdiff.models.borrow import Loan
from fastdiff.models.joint import JointBlock, Modulated, borrow_mlp
from fastdiff.models.joint_attention import JointAttention, TextAttention, borrow_head_norms
from fastdiff.models.watch import kind

PROCESSOR = "QwenDoubleStreamAttnProcessor2_0"


def borrow_block(module: Any, loan: Loan, rows: Columns, width: int) -> JointBlock:
    """From a QwenImageTransformerBlock; `rows` assigns columns of the packed modulations."""
    block = loan.open(module, "QwenImageTransformerBlock")
    require(not block.zero_cond_t, "a block with two timesteps")
    held = loan.open(block.attn, "Attention")
    processor = kind(held.processor)
    require(processor == PROCESSOR, f"the attention processor {processor}")
    told = loan.open(held.processor, processor)
    require(told._attention_backend is None, "an attention backend that was set")
    require(told._parallel_config is None, "attention that several GPUs share")
    heads, inner = held.heads, held.inner_dim
    require(inner == width and width % heads == 0, f"{heads} heads of {inner} columns")
    out, dropout = loan.each(held.to_out, 2)
    loan.inert(dropout)
    return JointBlock(
        norm=_modulated(block.img_mod, block.img_norm1, loan, rows, width),
        attention=JointAttention(
            heads=heads,
            qkv=loan.linear(held.to_q, held.to_k, held.to_v),
            norms=borrow_head_norms(held.norm_q, held.norm_k, loan),
            out=loan.linear(out),
            text=TextAttention(
                loan.linear(held.add_q_proj, held.add_k_proj, held.add_v_proj),
                borrow_head_norms(held.norm_added_q, held.norm_added_k, loan),
                loan.linear(held.to_add_out),
            ),
            image_norms=None,
        ),
        own=None,
        mlp=borrow_mlp(block.img_norm2, block.img_mlp, loan, width),
        text_norm=_modulated(block.txt_mod, block.txt_norm1, loan, rows, width),
        text_mlp=borrow_mlp(block.txt_norm2, block.txt_mlp, loan, width),
    )


def _modulated(layers: Any, norm: Any, loan: Loan, rows: Columns, width: int) -> Modulated:
    """From a SiLU and the layer behind it, and the norm that they modulate."""
    silu, layer = loan.each(layers, 2)
    loan.silu(silu)
    columns = rows.take(layer)
    require(columns.stop - columns.start == 6 * width, "a modulation of another width")
    return Modulated(loan.bare_norm(norm, width), columns, 6)
