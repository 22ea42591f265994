"""Perturbed attention and skipped layers, which change the last part of a batch only, against
diffusers' own processors in float64."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGCFGJointAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
)
from small import SD3, SD3_KINDS, inputs_for, noisy, shallow

from fastdiff.compiler.slot import Slot
from fastdiff.families.unet import DENOISED, UNET
from fastdiff.kernels.contract import judge
from fastdiff.models import Loan, Unsupported, borrow_mmdit, borrow_unet
from fastdiff.models.mmdit import Conditions as JointConditions
from fastdiff.models.trunk import Conditions
from fastdiff.runtime.denoiser import denoiser
from fastdiff.runtime.recordings import first_of

PICTURES = 2
SIDES = (9, 5)


def perturb(net, where, processor):
    """Set the processor of the self-attentions whose names contain `where`, as diffusers does."""
    found = [
        module
        for name, module in net.named_modules()
        if where in name and name.endswith(("attn1", ".attn"))
    ]
    assert found
    for module in found:
        module.processor = processor


def extended(tensor, parts):
    """[B, ...] for the text -> [parts·B, ...]: the text's twice; before them, if there are three
    parts, those of another text."""
    return torch.cat([*([torch.randn_like(tensor)] if parts == 3 else []), tensor, tensor])


def stepped(network, latents, timestep, given):
    """The prediction of a loop's step, in which the latents are not repeated."""
    sides = tuple(latents.shape[2:])
    hoisted = network.hoist(given, torch.tensor([[timestep]]), sides)
    x = network.pack(latents).contiguous()
    return network.unpack(network.predict(x, first_of(hoisted.rows), hoisted.constants), sides)


def hold(what, got, eager, call):
    with torch.no_grad():
        single = call(eager, torch.float32)
        verdict = judge(what, got, single, call(copy.deepcopy(eager).double(), torch.float64))
    assert verdict.passed, verdict


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "where", "parts"),
    [
        ("sdxl", "mid_block", 3),
        ("sdxl", "mid_block", 2),
        ("sd15", "down_blocks.0.attentions.0", 3),  # nothing is shared by then
        ("sd15", "up_blocks", 3),
    ],
)
def test_unet(name, where, parts):
    processors = {3: PAGCFGIdentitySelfAttnProcessor2_0(), 2: PAGIdentitySelfAttnProcessor2_0()}
    net = noisy(UNet2DConditionModel(**shallow(name)))
    eager = copy.deepcopy(net)
    ours = denoiser(borrow_unet(net, Loan(net)))
    for module in (net, eager):
        perturb(module, where, processors[parts])
    latents, text, added = inputs_for(net, (PICTURES, *SIDES))
    text, added = extended(text, parts), {k: extended(v, parts) for k, v in (added or {}).items()}
    repeated = torch.cat([latents] * parts)

    def call(module, dtype):
        conditions = {key: value.to(dtype) for key, value in added.items()}
        return module(repeated.to(dtype), 7, text.to(dtype), added_cond_kwargs=conditions).sample

    given = Conditions(text, **added)
    hold("one call", ours(repeated, 7, given), eager, call)
    for repeats in (True, None):
        made = stepped(ours.network, latents, 7, given._replace(repeats=repeats))
        hold("a step", made, eager, call)


def joint(kind):
    net = noisy(SD3Transformer2DModel(**SD3 | SD3_KINDS[kind], in_channels=4, out_channels=4))
    eager = copy.deepcopy(net)
    return net, eager, denoiser(borrow_mmdit(net, Loan(net)))


def joint_inputs(parts):
    text = torch.randn(PICTURES, 9, 72)
    text = extended(text, parts)
    text[:, 6:] = 0  # as without T5: these tokens are merged
    return torch.randn(PICTURES, 4, 6, 10), text, extended(torch.randn(PICTURES, 64), parts)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "block", "parts"),
    [("sd3", 1, 3), ("sd35-large", 0, 3), ("sd35-medium", 2, 2)],
)
def test_mmdit(kind, block, parts):
    """diffusers' perturbing processors leave out the norms of queries and keys."""
    processors = {3: PAGCFGJointAttnProcessor2_0(), 2: PAGJointAttnProcessor2_0()}
    net, eager, ours = joint(kind)
    for module in (net, eager):
        perturb(module, f"transformer_blocks.{block}", processors[parts])
    latents, text, pooled = joint_inputs(parts)
    repeated, times = torch.cat([latents] * parts), torch.full((parts * PICTURES,), 7.0)

    def call(module, dtype):
        return module(*(t.to(dtype) for t in (repeated, text, pooled, times))).sample

    given = JointConditions(text, pooled)
    hold("one call", ours(repeated, times, given), eager, call)
    made = stepped(ours.network, latents, 7.0, given._replace(repeats=True))
    hold("a step", made, eager, call)


@torch.no_grad()
@pytest.mark.parametrize("skipped", [(0,), (1, 2)], ids=str)
@pytest.mark.parametrize("repeats", [True, None])
def test_skipped_layers(skipped, repeats):
    _, eager, ours = joint("sd35-medium")
    latents, text, pooled = joint_inputs(3)
    times = torch.full((PICTURES,), 7.0)

    def call(module, dtype):
        x, t, p, at = (each.to(dtype) for each in (latents, text, pooled, times))
        both, two = torch.cat([x, x]), 2 * PICTURES
        guided = module(both, t[:two], p[:two], torch.cat([at, at])).sample
        rest = module(x, t[two:], p[two:], at, skip_layers=list(skipped)).sample
        return torch.cat([guided, rest])

    given = JointConditions(text, pooled, last_skip_layers=skipped, repeats=repeats)
    hold("a step", stepped(ours.network, latents, 7.0, given), eager, call)


def slot_for(net):
    slot = Slot("unet", net, UNET)
    with torch.no_grad():
        slot.offer()
    return slot


@torch.no_grad()
def test_processors_come_and_go_without_a_new_loan():
    net = UNet2DConditionModel(**shallow("sd15")).eval()
    slot = slot_for(net)
    loan, network, versions = slot.loan, slot.network, {slot.version}
    plain = net.attn_processors
    perturbing = PAGCFGIdentitySelfAttnProcessor2_0()
    for _ in range(3):
        perturb(net, "mid_block", perturbing)
        assert slot.offer() is network
        versions.add(slot.version)
        net.set_attn_processor(dict(plain))
        assert slot.offer() is network
        versions.add(slot.version)
    assert slot.loan is loan
    assert len(versions) == 7  # so that a callback's change is seen


@torch.no_grad()
@pytest.mark.parametrize("what", ["a child", "a hook"])
def test_a_change_beside_that_of_a_processor_is_noticed(what):
    net = UNet2DConditionModel(**shallow("sd15")).eval()
    slot = slot_for(net)
    loan, resnet = slot.loan, net.mid_block.resnets[0]
    perturb(net, "mid_block", PAGCFGIdentitySelfAttnProcessor2_0())
    if what == "a child":
        resnet.conv1 = copy.deepcopy(resnet.conv1)
        slot.offer()
        assert slot.loan is not loan
    else:
        resnet.register_forward_hook(lambda *given: None)
        with pytest.raises(Unsupported, match="hook"):
            slot.offer()


@torch.no_grad()
def test_an_engine_is_checked_again_when_a_processor_changes():
    """An exported network cannot change, so it may not compute what the new processor does."""
    net = UNet2DConditionModel(**shallow("sd15")).eval()
    slot = Slot("unet", net, replace(UNET, frozen=True))
    slot.offer()
    loan = slot.loan
    DENOISED.unexported(slot.network.network)
    perturb(net, "mid_block", PAGIdentitySelfAttnProcessor2_0())
    slot.offer()
    assert slot.loan is not loan
    with pytest.raises(Unsupported, match="perturbed attention"):
        DENOISED.unexported(slot.network.network)


class Loud(PAGCFGIdentitySelfAttnProcessor2_0):
    def __call__(self, *given, **options):
        return 2 * super().__call__(*given, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["of a user's class", "with a call of its own", "patched"])
def test_other_processors_are_refused(kind, monkeypatch):
    net = UNet2DConditionModel(**shallow("sd15")).eval()
    slot, processor = slot_for(net), PAGCFGIdentitySelfAttnProcessor2_0()
    perturb(net, "mid_block", processor)
    slot.offer()
    if kind == "patched":
        monkeypatch.setattr(type(processor), "__call__", Loud.__call__)
    elif kind == "with a call of its own":
        processor.__call__ = Loud().__call__
    else:
        perturb(net, "mid_block", Loud())
    with pytest.raises(Unsupported):
        slot.offer()
    monkeypatch.undo()
    perturb(net, "mid_block", AttnProcessor2_0())
    slot.offer()


@torch.no_grad()
def test_batches_that_do_not_divide_are_refused():
    net, _, ours = joint("sd3")
    perturb(net, "transformer_blocks.1", PAGCFGJointAttnProcessor2_0())
    latents, text, pooled = joint_inputs(2)
    with pytest.raises(Unsupported, match="3 equal parts"):
        ours(torch.cat([latents] * 2), torch.tensor(7.0), JointConditions(text, pooled))
    perturb(net, "transformer_blocks.2", PAGJointAttnProcessor2_0())
    with pytest.raises(Unsupported, match="with and without guidance"):
        ours(torch.cat([latents] * 2), torch.tensor(7.0), JointConditions(text, pooled))
    perturb(net, "transformer_blocks", JointAttnProcessor2_0())
    ours(torch.cat([latents] * 2), torch.tensor(7.0), JointConditions(text, pooled))
