"""fastdiff.Options: wrong values are one sentence at once, and `ignore` takes any reported name."""

import dataclasses
import pydoc
from pathlib import Path

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
)

import fastdiff
from fastdiff.compiler.slot import slot_of
from fastdiff.errors import UserError

WRONG = {
    "backend is 'trt'; choose fastdiff, ort, openvino, tensorrt": {"backend": "trt"},
    "backend is 'onnx'; choose": {"backend": "onnx"},
    "backend is None; choose": {"backend": None},
    "backend is \\['ort'\\]; choose": {"backend": ["ort"]},
    "ignore is 'vae'; give a tuple of names": {"ignore": "vae"},
    "ignore is None; give a tuple": {"ignore": None},
    "ignore is \\(1,\\); give a tuple": {"ignore": (1,)},
    "engines is 3; give the folder": {"engines": 3, "backend": "ort"},
    "engines is ''; give the folder": {"engines": "", "backend": "ort"},
    "engines is x; give the backend that runs it": {"engines": "x"},
    "ort_graphs is 'yes'; give True or False": {"ort_graphs": "yes", "backend": "ort"},
    "tactics is 'on'; give True or False": {"tactics": "on"},
    "vae_tiling is 'blended'; choose auto, exact": {"vae_tiling": "blended"},
    "text_cache is -1; give the number": {"text_cache": -1},
    "text_cache is True; give the number": {"text_cache": True},
    "offload_hoisted is 1; give True or False": {"offload_hoisted": 1},
    'offload_hoisted needs the backend "fastdiff"; got': {
        "offload_hoisted": True,
        "backend": "ort",
    },
    "ort_graphs is 1; give True or False": {"ort_graphs": 1, "backend": "ort"},
    "ort_graphs needs the backend \"ort\"; got 'tensorrt'": {
        "ort_graphs": True,
        "backend": "tensorrt",
    },
}


@pytest.fixture
def pipe(components):
    pipe = StableDiffusionPipeline(**components(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_value_is_one_sentence_at_once(message, pipe):
    with pytest.raises(UserError, match=message) as caught:
        fastdiff.Options(**WRONG[message])
    with pytest.raises(UserError, match=message) as by_keyword:
        fastdiff.compile(pipe, **WRONG[message])
    assert str(caught.value) == str(by_keyword.value)
    assert "\n" not in str(caught.value)
    assert slot_of(pipe.unet) is None


def test_paths_and_lists_are_accepted():
    assert fastdiff.Options(ignore=["vae", "loop"]) == fastdiff.Options(ignore=("vae", "loop"))
    fastdiff.Options(backend="ort", engines=Path("x"), ort_graphs=True)
    fastdiff.Options(backend="tensorrt", engines="x")


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (({"backend": "ort"},), {}, "options are a dict; give fastdiff.Options.*ignore, backend"),
        (("ort",), {}, "options are a str; give"),
        (((),), {}, "options are a tuple; give"),
        ((fastdiff.Options(),), {"backend": "ort"}, "given options and the keyword backend"),
        (
            (),
            {"mode": "max-autotune"},
            "no option 'mode'; its options are ignore, backend, engines, ort",
        ),
    ],
)
def test_other_arguments_of_compile_are_refused(pipe, arguments, keywords, message):
    with pytest.raises(UserError, match=message) as caught:
        fastdiff.compile(pipe, *arguments, **keywords)
    assert "\n" not in str(caught.value)
    assert slot_of(pipe.unet) is None


def test_every_name_of_the_report_can_be_ignored(components, controlnet):
    def make():
        torch.manual_seed(0)
        parts = components()
        nets = [controlnet(parts["unet"], seed) for seed in (1, 2)]
        assert isinstance(nets[0], ControlNetModel)
        return StableDiffusionControlNetPipeline(
            **parts, controlnet=nets, requires_safety_checker=False
        )

    names = [part.name for part in fastdiff.report(make()).parts]
    assert {"unet", "vae.encoder", "vae.decoder", "controlnet.0", "controlnet.1", "loop"} <= {
        *names
    }
    before = fastdiff.report(fastdiff.compile(make())).parts
    for name in names:
        after = fastdiff.report(fastdiff.compile(make(), ignore=(name,))).parts
        lost = {one.name for one, other in zip(before, after, strict=True) if one != other}
        # the loop may change, too: it needs a compiled U-Net
        assert lost - {"loop"} <= {name}
        assert not any(part.name == name and part.runs == "fastdiff" for part in after)


def test_ignoring_a_component_ignores_all_its_parts(pipe):
    fastdiff.compile(pipe, ignore=("vae",))
    runs = {part.name: part.runs for part in fastdiff.report(pipe).parts}
    assert (runs["unet"], runs["vae.encoder"], runs["vae.decoder"]) == (
        "fastdiff",
        "eager",
        "eager",
    )


def test_an_unknown_name_lists_the_known_ones(pipe):
    with pytest.raises(UserError, match=r"'vae.decodr'; .* has loop, .*unet, vae, vae.decoder, "):
        fastdiff.compile(pipe, ignore=("vae.decodr",))
    with pytest.raises(UserError, match="'loop'; UNet2DConditionModel has unet"):
        fastdiff.compile(pipe.unet, ignore=("loop",))


def test_help_explains_every_field_with_gain_and_cost():
    text = pydoc.plain(pydoc.render_doc(fastdiff.Options))
    names = [field.name for field in dataclasses.fields(fastdiff.Options)]
    starts = [text.index(f"\n |      {name}: ") for name in names]
    assert starts == sorted(starts)
    for name, start, end in zip(names, starts, [*starts[1:], text.index("Raises:")], strict=True):
        assert "Gain" in text[start:end], name
        assert "Cost" in text[start:end], name
