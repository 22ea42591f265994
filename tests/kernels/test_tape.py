"""What a step of SD3 is made of goes onto a CPU's tape in every form, and the tape repeats it."""

import pytest
import torch

from fastdiff.kernels.dispatch import KERNELS, NATIVE, all_kernels
from fastdiff.kernels.joint_attention import joint_attention
from fastdiff.kernels.observe import counting
from fastdiff.runtime.tape import record

pytestmark = pytest.mark.skipif(NATIVE is None, reason="built without a compiler")

NAMES = ("ada_norm", "attention", "joint_attention", "linear", "qk_norm", "residual")
TAKEN = {  # the others are the library's, which no tape holds
    "linear": lambda case: case.get("packed", True),
    "residual": lambda case: case.get("enlarge", 1) == 1 and not case.get("limit"),
    # no CPU limits sums, which is for float16, or keeps a bias for later
    "ada_norm": lambda case: not case.get("limit") and not case.get("later"),
}
PARTS = {"joint_attention": lambda case: case.B if case.get("masked") else 1}
"""Calls of an op that takes more than one: a mask of each text is one for each sample."""
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


def test_a_weighted_text_of_bfloat16_goes_onto_a_tape():
    """Its bias is float32 all the same; memory that a tape gives out is of the dtype asked for."""
    q, text = torch.randn(2, 9, 2, 16).bfloat16(), torch.randn(2, 5, 2, 16).bfloat16()
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 5.5])
    wanted, none = joint_attention(q, q, q, None, text, text, text_bias=bias)
    assert none.shape == (0,)
    tape = record(lambda: joint_attention(q, q, q, None, text, text, text_bias=bias)[0], ())
    assert tape is not None
    assert torch.equal(tape.run(), wanted)


def test_joint_attention_is_one_call_that_moves_nothing():
    q, text = torch.randn(2, 9, 2, 16), torch.randn(2, 5, 2, 16)
    with counting() as called:
        joint_attention(q, q, q, text, text, text)
        joint_attention(q, q, q, None, text, text, text_bias=torch.zeros(5))
    assert called == ["joint_attention"] * 2
