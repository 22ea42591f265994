"""Which pipelines decode in float32 with a float16 U-Net: those whose class reads force_upcast."""

from types import SimpleNamespace

import pytest

from fastdiff.recipes import decodes_in_float32


@pytest.mark.parametrize(
    ("name", "force_upcast", "decodes"),
    [
        ("StableDiffusionXLPipeline", True, True),
        ("StableDiffusionXLPipeline", False, False),
        ("StableDiffusionPipeline", True, False),  # the default of a VAE's config
        ("StableDiffusion3Pipeline", True, False),
        ("SomebodysPipeline", True, False),
    ],
)
def test_only_sdxl_reads_force_upcast(name, force_upcast, decodes):
    pipe = type(name, (), {})()
    pipe.vae = SimpleNamespace(config=SimpleNamespace(force_upcast=force_upcast))
    assert decodes_in_float32(pipe) is decodes
