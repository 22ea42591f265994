"""The worker of a comparison on pipelines without a U-Net."""

import sys
from dataclasses import replace

import pytest
import torch

from fastdiff.bench import preset_flow, preset_sd3, presets
from fastdiff.regression.suite_pipelines import Suite


def suite(preset):
    """On its smallest pictures."""
    of_pipeline = {"preset": preset, "scale": 0.05, "folder": None, "dtype": "float32"}
    of_picture = {"height": None, "width": None, "steps": 2, "device": "cpu"}
    return Suite({"backends": ["eager", "fastdiff"], **of_pipeline, **of_picture})


def test_sd3_is_drawn_checked_and_decoded_as_by_its_pipeline(monkeypatch):
    few = tuple(replace(text, layers=1) for text in preset_sd3.TEXTS)
    monkeypatch.setattr(preset_sd3, "TEXTS", few)
    monkeypatch.setattr(presets, "PRESETS", {"sd3": replace(presets.SD3, layers=1)})
    worker = suite("sd3")
    worker.start()
    assert worker.size == {"height": 64, "width": 64}
    assert worker.check() == {}
    pipe = worker.pipes["eager"]
    given, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **how: given.append(z) or decode(z, **how))
    worker.draw(pipe)
    pipe("red heart", output_type="pt", **worker.call())
    assert torch.equal(*given)


@pytest.fixture
def small_flux(monkeypatch):
    def config(heads):
        return preset_flow._flux(heads) | {"num_layers": 1, "num_single_layers": 1}

    monkeypatch.setattr(presets, "PRESETS", {"flux": replace(presets.FLUX, config=config)})


@pytest.mark.usefixtures("small_flux")
def test_flux_is_drawn_and_checked_as_by_the_bench():
    """Its config tells no size, its latents are packed, and its texts are embeddings."""
    worker = suite("flux")
    rows = [[f"{name} · step", f"{name} · decode"] for name in ("eager", "fastdiff")]
    assert worker.start()["groups"] == rows
    assert worker.size == {"height": 64, "width": 64}
    steps, decoded = [], []
    worker.pipes["eager"].transformer.register_forward_hook(lambda *call: steps.append(call[-1]))
    worker.pipes["eager"].vae.decoder.register_forward_hook(lambda *call: decoded.append(call[-1]))
    assert worker.run(0).keys() == {*rows[0]}
    assert [out[0].shape for out in steps] == [(1, 16, 64)] * 2
    assert [out.shape for out in decoded] == [(1, 3, 64, 64)]
    assert worker.check() == {}
    worker.pipes["fastdiff"].transformer.proj_out.weight.data[0] *= 1.01
    assert worker.check().keys() == {"fastdiff"}


@pytest.mark.usefixtures("small_flux")
def test_a_state_that_cannot_draw_flux_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdiff.bench.calls", None)
    told = "a FluxPipeline is drawn by the state's own fastdiff.bench, which is missing or too old"
    with pytest.raises(ValueError, match=told):
        suite("flux").start()
