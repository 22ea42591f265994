"""The worker of a comparison on a pipeline without a U-Net."""

from dataclasses import replace

import torch

from fastdiff.bench import preset_sd3, presets
from fastdiff.regression.worker import Pipelines


def test_sd3_is_drawn_checked_and_decoded_as_by_its_pipeline(monkeypatch):
    few = tuple(replace(text, layers=1) for text in preset_sd3.TEXTS)
    monkeypatch.setattr(preset_sd3, "TEXTS", few)
    monkeypatch.setattr(presets, "PRESETS", {"sd3": replace(presets.SD3, layers=1)})
    of_pipeline = {"preset": "sd3", "scale": 0.05, "folder": None, "dtype": "float32"}
    of_picture = {"height": None, "width": None, "steps": 2, "device": "cpu"}
    worker = Pipelines({"backends": ["eager", "fastdiff"], **of_pipeline, **of_picture})
    worker.start()
    assert worker.size == {"height": 64, "width": 64}
    assert worker.check() == {}
    pipe = worker.pipes["eager"]
    given, decode = [], pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **how: given.append(z) or decode(z, **how))
    worker.draw(pipe)
    pipe("red heart", output_type="pt", **worker.call())
    assert torch.equal(*given)
