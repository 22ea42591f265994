"""Dropped pipelines free their memory, and restore finds all that was compiled."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from alive import live_bytes
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn

import fastdiff
from fastdiff.compiler.slot import Slot, kept_slot, slot_of
from fastdiff.compiler.taken import remembered
from fastdiff.errors import UserError
from fastdiff.kernels.dispatch import NATIVE
from fastdiff.models.borrow import Loan
from fastdiff.models.watch import _SlowWatch


@pytest.fixture
def tiny(components):
    """tiny(cls, xl, **parts): a float32 pipeline without a progress bar."""

    def make(cls=StableDiffusionPipeline, xl=False, **parts):
        given = components(xl, torch.float32) | parts
        pipe = cls(**given) if xl else cls(**given, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def draw(pipe, **options):
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"} | options
    if "prompt_embeds" not in given:
        given["prompt"] = "red heart"
    return pipe(**given, generator=torch.Generator().manual_seed(5)).images


def rows(target):
    return {part.name: part for part in fastdiff.report(target).parts}


def nets(pipe):
    return [part for part in vars(pipe).values() if isinstance(part, nn.Module)]


def eager(module):
    """Whether no part is compiled and every weight is contiguous, as in an eager module."""
    return all(weight.is_contiguous() for weight in module.parameters()) and not any(
        isinstance(value, Slot) for part in module.modules() for value in vars(part).values()
    )


def still_alive(refs):
    gc.collect()
    return [name for name, ref in refs.items() if ref() is not None]


def watched(*targets):
    return {f"{type(t).__name__} {i}": weakref.ref(t) for i, t in enumerate(targets)}


@pytest.mark.parametrize("watch", [_SlowWatch, getattr(NATIVE, "Watch", None)], ids=["py", "c"])
def test_a_watch_is_collected_with_its_module(watch):
    if watch is None:
        pytest.skip("built without a compiler")
    module = nn.Linear(2, 2)
    module.kept = watch([(vars(module), "eps", None)], [module], [module._modules])
    assert gc.is_tracked(module.kept)
    assert module in gc.get_referents(module.kept) or watch is _SlowWatch
    ref = weakref.ref(module)
    del module
    gc.collect()
    assert ref() is None


def test_an_uninitialised_watch_is_collected():
    if NATIVE is None:
        pytest.skip("built without a compiler")
    empty = NATIVE.Watch.__new__(NATIVE.Watch)
    gc.collect()
    assert gc.get_referents(empty) == [NATIVE.Watch]
    with pytest.raises(TypeError):
        NATIVE.Watch([], [], [3])
    del empty
    gc.collect()


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_a_dropped_pipeline_is_freed(tiny, xl, restored):
    pipe = fastdiff.compile(tiny(StableDiffusionXLPipeline if xl else StableDiffusionPipeline, xl))
    draw(pipe)
    draw(pipe)  # the second picture is recorded
    refs = watched(pipe, *nets(pipe), pipe.vae.decoder, slot_of(pipe.unet))
    if restored:
        fastdiff.restore(pipe)
    del pipe
    assert not still_alive(refs)


def test_repeated_compiles_leak_no_memory(tiny):
    pattern = tiny()

    def once():
        pipe = fastdiff.compile(copy.deepcopy(pattern))
        draw(pipe, num_inference_steps=1)
        del pipe
        gc.collect()
        return live_bytes(), sum(
            issubclass(type(o), Slot | Loan | nn.Module) for o in gc.get_objects()
        )

    counts = [once() for _ in range(4)]
    assert counts[1:] == [counts[1]] * 3


@pytest.mark.parametrize("which", ["unet", "vae", "controlnet"])
def test_a_dropped_model_is_freed(tiny, which):
    unet, vae = tiny().unet, tiny().vae
    nets = {"unet": unet, "vae": vae}
    if which == "controlnet":
        nets[which] = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    net = fastdiff.compile(nets.pop(which).eval())
    refs = watched(net)
    del net, unet, vae, nets
    assert not still_alive(refs)


def test_copies_are_eager_and_keep_no_reference(tiny):
    pipe = fastdiff.compile(tiny())
    draw(pipe)
    file = io.BytesIO()
    torch.save(pipe.unet, file)
    file.seek(0)
    copies = [
        copy.deepcopy(pipe).unet,
        copy.deepcopy(pipe.unet),
        pickle.loads(pickle.dumps(pipe.unet)),
        torch.load(file, weights_only=False),
    ]
    shallow = copy.copy(pipe.unet)
    assert not any(kept_slot(module) or slot_of(module) for module in (*copies, shallow))
    fastdiff.restore(shallow)
    assert slot_of(pipe.unet) is not None  # restoring a shallow copy leaves the original's slot
    refs = watched(pipe, pipe.unet, pipe.vae.decoder)
    del pipe, shallow
    assert not still_alive(refs)


def test_a_replaced_network_is_freed_while_its_pipeline_lives(tiny):
    pipe = fastdiff.compile(tiny())
    draw(pipe)
    refs = watched(pipe.unet, pipe.vae)
    pipe.unet, pipe.vae = tiny().unet, tiny().vae
    assert not still_alive(refs)
    assert [kept_slot(module) for module in remembered(pipe)] == []


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_compile_that_fails_changes_nothing(tiny, after, monkeypatch):
    """Memory runs out at the first, second or third part."""
    pipe = tiny()
    want, before = (
        draw(pipe),
        {name: set(vars(net)) for name, net in pipe.components.items() if net},
    )
    taken, take = [], Slot.take

    def failing(self, *args):
        if len(taken) == after:
            raise MemoryError(self.name)
        taken.append(self.name)
        take(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "take", failing)
        with pytest.raises(MemoryError):
            fastdiff.compile(pipe)
    assert all(map(eager, nets(pipe)))
    assert {name: set(vars(net)) for name, net in pipe.components.items() if net} == before
    assert type(pipe) is StableDiffusionPipeline
    assert torch.equal(draw(pipe), want)
    fastdiff.compile(pipe)
    refs = watched(pipe, pipe.unet, pipe.vae)
    del pipe
    assert not still_alive(refs)


@pytest.mark.parametrize("taken", ["wrapped", "in place", "replaced", "gone", "set to None"])
def test_restore_finds_all_compiled_parts(tiny, taken):
    pipe = tiny()
    want = draw(pipe)
    fastdiff.compile(pipe)
    unet, decoder, encoder = pipe.unet, pipe.vae.decoder, pipe.vae.encoder
    assert not eager(unet)
    draw(pipe)
    match taken:
        case "wrapped":
            pipe.unet = torch.compile(unet, backend="eager")
            pipe.vae = torch.compile(pipe.vae, backend="eager")
        case "in place":
            for net in (unet, decoder, encoder):
                net.compile(backend="eager")
        case "replaced":
            pipe.unet, pipe.vae = tiny().unet, tiny().vae
        case "gone":
            pipe.unet = pipe.vae = None
        case "set to None":
            for net in (unet, decoder, encoder):
                net._compiled_call_impl = None
    before = rows(pipe)
    if taken == "in place":
        assert before["unet"].runs == before["vae.decoder"].runs == "torch.compile"
        assert "keeps its weights until it is restored" in before["unet"].why
    elif taken in ("replaced", "set to None"):
        assert before["unet"].runs == "eager"
    assert fastdiff.restore(pipe) is pipe
    assert all(map(eager, (unet, decoder, encoder)))
    for net in (unet, decoder, encoder):
        net._compiled_call_impl = None
    pipe.unet, pipe.vae = unet, getattr(pipe.vae, "_orig_mod", pipe.vae)
    if pipe.vae is None:
        pipe.vae = tiny().vae
    pipe.vae.decoder, pipe.vae.encoder = decoder, encoder
    assert torch.equal(draw(pipe), want)
    fastdiff.compile(pipe)
    assert (draw(pipe) - want).abs().max() < 1e-4
    assert rows(pipe)["unet"].runs == rows(pipe)["vae.decoder"].runs == "fastdiff"


def test_a_slot_replaced_by_torch_compile_can_be_compiled_again(tiny):
    pipe = fastdiff.compile(tiny())
    pipe.unet.compile(backend="eager")
    with pytest.raises(UserError, match=r"unet is compiled with torch.compile already; set its"):
        fastdiff.compile(pipe)
    first, pipe.unet._compiled_call_impl = kept_slot(pipe.unet), None
    fastdiff.compile(pipe)
    assert first.ended
    assert slot_of(pipe.unet) is kept_slot(pipe.unet) is not first
    fastdiff.restore(pipe)
    assert eager(pipe.unet)


def test_a_part_compiled_by_torch_is_refused_unless_ignored(tiny):
    pipe = tiny()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(UserError, match=r"_orig_mod.*ignore=\('unet',\)"):
        fastdiff.compile(pipe)
    fastdiff.compile(pipe, fastdiff.Options(ignore=("unet",)))
    found = rows(pipe)
    assert (found["unet"].runs, found["vae.decoder"].runs) == ("torch.compile", "fastdiff")
    fastdiff.restore(pipe)
    assert eager(pipe.vae)
    bare = torch.compile(fastdiff.compile(tiny().unet), backend="eager")
    assert rows(bare)["unet"].runs == "torch.compile"
    assert fastdiff.restore(bare) is bare
    assert eager(bare._orig_mod)


def test_every_component_has_a_row(tiny, controlnet):
    pipe = tiny()
    more = {"controlnet": controlnet(pipe.unet).float()}
    for other in (
        pipe,
        tiny(StableDiffusionXLPipeline, True),
        StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False),
        StableDiffusionControlNetPipeline(**pipe.components, **more, requires_safety_checker=False),
    ):
        for step in (lambda target: None, fastdiff.compile, fastdiff.restore):
            step(other)
            given = {name for name, part in other.components.items() if part is not None}
            found = rows(other)
            assert given <= {name.partition(".")[0] for name in found}
            assert all(part.why for part in found.values())
    pipe.extra = nn.Linear(2, 2)
    assert rows(pipe)["extra"].why == "Linear, which fastdiff does not compute"


MISSING = [("unet",), ("vae",), ("scheduler",), ("text_encoder", "tokenizer"), ("unet", "vae")]


@pytest.mark.parametrize("missing", MISSING, ids=",".join)
@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_missing_parts_are_no_error(tiny, xl, missing):
    """Parts missing before compile, or removed after it, never raise more than one sentence."""
    cls = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    pipe = tiny(cls, xl)
    whole = {name: getattr(pipe, name) for name in missing}
    for name in missing:
        setattr(pipe, name, None)
    assert not set(missing) & {name.partition(".")[0] for name in rows(pipe)}
    fastdiff.restore(pipe)
    if missing == ("unet", "vae"):
        with pytest.raises(UserError, match="nothing in this .* text_encoder: once per prompt"):
            fastdiff.compile(pipe)
    else:
        fastdiff.compile(pipe)
    for name, part in whole.items():
        setattr(pipe, name, part)
    rows(pipe)
    fastdiff.compile(pipe)
    assert rows(pipe)["unet"].runs == rows(pipe)["vae.decoder"].runs == "fastdiff"
    draw(pipe)
    for name in missing:
        setattr(pipe, name, None)
    rows(pipe)
    fastdiff.restore(pipe)
    for part in whole.values():
        assert not isinstance(part, nn.Module) or eager(part)


def test_an_unsupported_autoencoder_is_reported(tiny):
    small = AutoencoderTiny(latent_channels=4, num_encoder_blocks=(1,) * 4).eval()
    pipe = fastdiff.compile(tiny(vae=small))
    assert rows(pipe)["vae"].why == "AutoencoderTiny, which fastdiff does not compute"
    assert isinstance(tiny().vae, AutoencoderKL)
    pipe.vae = tiny().vae
    assert rows(pipe)["vae.decoder"].why == "not compiled"
    pipe.vae = small
    pipe.unet = None
    fastdiff.restore(pipe)
    with pytest.raises(UserError, match="nothing in this StableDiffusionPipeline.*AutoencoderTiny"):
        fastdiff.compile(pipe)
