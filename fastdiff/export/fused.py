"""Fuses GroupNorm and SiLU into the single operator of ONNX Runtime's CUDA provider."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from fastdiff.errors import UserError
from fastdiff.export.parts import Part

DOMAIN = "com.microsoft"
OPERATOR = f"{DOMAIN}::GroupNorm"
"""One of ONNX Runtime's own operators: it takes NHWC, and gamma and beta always in float32."""
OPSETS = range(18, 21)
MOST_GROUPS, MOST_CHANNELS = 32, 512
"""The CUDA kernel's limits: groups, and channels per group, which it reads in pairs."""
REFERENCE_DOMAIN = "fastdiff.reference"
REFERENCE = """
<domain: "fastdiff.reference", opset_import: ["" : OPSET]>
GroupNorm <epsilon, groups, activation, channels_last> (x, gamma, beta) => (y)
{
    one = Constant <value_ints = [1]> ()
    places = Constant <value_ints = [0, -1]> ()
    axes = Constant <value_ints = [1, 3]> ()
    group_count = Constant <value_int: int = @groups> ()
    groups_1d = Reshape (group_count, one)
    shape = Shape (x)
    channels = Shape <start = 3> (x)
    of_each = Div (channels, groups_1d)
    grouped_shape = Concat <axis = 0> (places, groups_1d, of_each)
    single = Cast <to = 1> (x)
    grouped = Reshape (single, grouped_shape)
    mean = ReduceMean (grouped, axes)
    centred = Sub (grouped, mean)
    squared = Mul (centred, centred)
    variance = ReduceMean (squared, axes)
    least = Constant <value_float: float = @epsilon> ()
    padded = Add (variance, least)
    deviation = Sqrt (padded)
    normal = Div (centred, deviation)
    flat = Reshape (normal, shape)
    scaled = Mul (flat, gamma)
    affine = Add (scaled, beta)
    sigmoid = Sigmoid (affine)
    silu = Mul (affine, sigmoid)
    activated = Constant <value_int: int = @activation> ()
    is_activated = Cast <to = 9> (activated)
    chosen = Where (is_activated, silu, affine)
    y = CastLike (chosen, x)
}
"""
"""The operator's published definition, in standard operators that every provider has."""


def check(opset: int, dtype: torch.dtype) -> None:
    """UserError unless graphs of this opset and dtype have something to fuse."""
    if dtype not in (torch.float32, torch.float16):
        raise UserError("--ort-fused needs fp32 or fp16: ONNX Runtime's GroupNorm takes no bf16")
    if opset not in OPSETS:
        raise UserError(
            f"--ort-fused needs --opset {OPSETS[0]} to {OPSETS[-1]}, got {opset}: from 21 on a "
            "GroupNorm is an operator of its own"
        )


def fuse(model: Any) -> tuple[str, ...]:
    """Fuse each GroupNorm on 4-D tensors in an onnx_ir Model, with the SiLU after it if any.

    Each is put between two transposes, since it takes NHWC. What the CUDA kernel does not support
    is not fused. Returns the names of the new nodes.
    """
    from onnxscript import ir
    from onnxscript.rewriter import pattern, rewrite

    number = count()
    # SiLU first, before its norm is fused alone
    for activation, found in ((1, _norm_silu), (0, _norm)):
        rule = pattern.RewriteRule(found, _replacement(ir, number, activation), _fits)
        rewrite(model, pattern.RewriteRuleSet([rule], commute=True))
    fused = [node for node in model.graph if node.domain == DOMAIN]
    for i, node in enumerate(fused):
        node.name = f"GroupNorm_{i}"
    if fused:
        model.opset_imports[DOMAIN] = 1
    return tuple(node.name for node in fused)


@contextmanager
def spelled_out(folder: Path, parts: Sequence[Part]) -> Iterator[Path]:
    """A temporary folder with the files of `parts`, and fused operators in standard ones.

    So a provider without the fused kernel can run them in the same graph. UserError if the disk has
    no room for it.
    """
    with TemporaryDirectory(prefix="fastdiff-") as made:
        try:
            for part in parts:
                _spell_out(folder / part.file, Path(made, part.file))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"--verify cannot write the files that it runs to {made}: {reason}"
            ) from error
        yield Path(made)


def _spell_out(file: Path, out: Path) -> None:
    import onnx
    from onnxscript import ir

    model = ir.load(file)
    text = REFERENCE.replace("OPSET", str(model.opset_imports[""]))
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function
    model.opset_imports[REFERENCE_DOMAIN] = 1
    for node in model.graph:
        if node.domain == DOMAIN:
            node.domain = REFERENCE_DOMAIN
    out.parent.mkdir()
    ir.save(model, out, external_data="model.onnx_data")


def _norm(
    op: Any, x: Any, split: Any, ones: Any, zeros: Any, shape: Any, gamma: Any, beta: Any, eps: Any
) -> Any:
    """GroupNorm as torch exports it: an instance norm over each group, then weight and bias."""
    normal = op.InstanceNormalization(op.Reshape(x, split), ones, zeros, epsilon=eps)
    return op.Add(op.Mul(op.Reshape(normal, shape), gamma), beta)


def _norm_silu(
    op: Any, x: Any, split: Any, ones: Any, zeros: Any, shape: Any, gamma: Any, beta: Any, eps: Any
) -> Any:
    y = _norm(op, x, split, ones, zeros, shape, gamma, beta, eps)
    return op.Mul(y, op.Sigmoid(y))


def _fits(
    context: Any,
    x: Any,
    split: Any,
    ones: Any,
    zeros: Any,
    shape: Any,
    gamma: Any,
    beta: Any,
    **_: Any,
) -> bool:
    """Whether the match is a GroupNorm on a 4-D tensor, within the CUDA kernel's limits."""
    known = [_constant(value) for value in (split, ones, zeros, gamma, beta)]
    if any(value is None for value in known):
        return False
    parts, scale, shift, weight, bias = known
    groups, channels = scale.size, weight.size
    restored = shape.producer()
    return bool(
        parts.tolist() == [0, groups, -1]
        and (scale == 1).all()
        and (shift == 0).all()
        and weight.shape == bias.shape == (channels, 1, 1)
        and restored is not None
        and restored.op_type == "Shape"
        and restored.inputs[0] is x
        and not any(restored.attributes.get_int(side, 0) for side in ("start", "end"))
        and channels % (2 * groups) == 0
        and groups <= MOST_GROUPS
        and channels // groups <= MOST_CHANNELS
    )


def _replacement(ir: Any, number: Iterator[int], activation: int) -> Callable[..., Any]:
    def fused(op: Any, x: Any, ones: Any, gamma: Any, beta: Any, eps: Any, **_: Any) -> Any:
        i = next(number)
        weights = [
            op.initializer(ir.tensor(_constant(value).reshape(-1).astype(np.float32)), name=name)
            for value, name in ((gamma, f"gamma_nhwc_{i}"), (beta, f"beta_nhwc_{i}"))
        ]
        y = op.GroupNorm(
            op.Transpose(x, perm=[0, 2, 3, 1]),
            *weights,
            epsilon=eps,
            groups=_constant(ones).size,
            activation=activation,
            channels_last=1,
            _domain=DOMAIN,
            _version=1,
        )
        return op.Transpose(y, perm=[0, 3, 1, 2])

    return fused


def _constant(value: Any) -> Any:
    """The numpy array of a constant onnx_ir Value; None if it is not constant."""
    return None if value.const_value is None else value.const_value.numpy()
