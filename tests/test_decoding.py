"""Which pipelines decode in float32 beside a U-Net in float16: those whose class looks at it."""

from types import SimpleNamespace

import pytest

from fastdiff.recipes import decodes_in_float32


@pytest.mark.parametrize(
    ("name", "force_upcast", "decodes"),
    [
        ("StableDiffusionXLPipeline", True, True),
        ("StableDiffusionXLPipeline", False, False),
        ("StableDiffusionPipeline", True, False),  # what a VAE's config says unless told otherwise
        ("StableDiffusion3Pipeline", True, False),
        ("SomebodysPipeline", True, False),
    ],
)
def test_only_xl_looks_at_force_upcast(name, force_upcast, decodes):
    pipe = type(name, (), {})()
    pipe.vae = SimpleNamespace(config=SimpleNamespace(force_upcast=force_upcast))
    assert decodes_in_float32(pipe) is decodes
