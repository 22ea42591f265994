"""A CPU tape records every case of the ops that make a step of SD3, and repeats it."""

import pytest
import torch

from fastdiff.kernels.dispatch import KERNELS, NATIVE, all_kernels
from fastdiff.kernels.joint_attention import joint_attention
from fastdiff.kernels.observe import counting
from fastdiff.runtime.tape import record

pytestmark = pytest.mark.skipif(NATIVE is None, reason="built without a compiler")

NAMES = ("ada_norm", "attention", "joint_attention", "linear", "qk_norm", "residual")
TAKEN = {  # torch computes the other cases, which no tape can record
    "linear": lambda case: case.get("packed", True),
    "residual": lambda case: case.get("enlarge", 1) == 1 and not case.get("limit"),
    # C++ kernels do not limit sums, as float16 needs, and do not keep a bias for later
    "ada_norm": lambda case: not case.get("limit") and not case.get("later"),
}
PARTS = {"joint_attention": lambda case: case.B if case.get("masked") else 1}
"""How many calls an op takes if not one: attention with a mask for each text is a call a sample."""
CALLS = [
    pytest.param(name, case, id=f"{name}-{case.name}")
    for name in NAMES
    for case in all_kernels()[name].spec.cases
    if TAKEN.get(name, lambda case: True)(case)
]


@pytest.mark.parametrize(("name", "case"), CALLS)
def test_a_tape_holds_the_calls_and_repeats_them(name, case):
    kernel = KERNELS[name]
    inputs = kernel.spec.inputs(case, torch.bfloat16, torch.device("cpu"), torch.Generator())

    def first():
        made = kernel.op(**inputs)
        return made[0] if isinstance(made, tuple) else made

    wanted = first()
    tape = record(first, ())
    assert tape is not None
    (calls,) = tape.sections
    assert len(calls) == PARTS.get(name, lambda case: 1)(case)
    tape.output.fill_(float("nan"))
    assert torch.equal(tape.run(), wanted)


def test_a_tape_holds_a_bfloat16_text_with_a_float32_bias():
    """Memory that a tape allocates has the dtype that was asked for."""
    q, text = torch.randn(2, 9, 2, 16).bfloat16(), torch.randn(2, 5, 2, 16).bfloat16()
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.5])
    wanted, none = joint_attention(q, q, q, None, text, text, text_bias=bias)
    assert none.shape == (0,)
    tape = record(lambda: joint_attention(q, q, q, None, text, text, text_bias=bias)[0], ())
    assert tape is not None
    assert torch.equal(tape.run(), wanted)


def test_joint_attention_is_one_call_without_copies():
    q, text = torch.randn(2, 9, 2, 16), torch.randn(2, 5, 2, 16)
    with counting() as called:
        joint_attention(q, q, q, text, text, text)
        joint_attention(q, q, q, None, text, text, text_bias=torch.zeros(5))
    assert called == ["joint_attention"] * 2
