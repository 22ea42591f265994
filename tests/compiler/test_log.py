"""Each reason for an eager call is logged once, through the standard logging module."""

import logging

import pytest
import torch

import fastdiff

CALL = """
vae = fastdiff.compile(fastdiff.load_demo().vae)
for _ in range(2):
    vae.decoder(torch.zeros(1, 4, 2, 2))
"""
REASON = "gradients are enabled; call it under torch.no_grad()"


def call(unet):
    unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, 24))


@pytest.mark.filterwarnings("ignore:fastdiff. unet runs eagerly")
def test_each_reason_is_logged_once_by_the_fastdiff_logger(unet, caplog):
    fastdiff.compile(unet)
    for _ in range(3):
        call(unet)
    (entry,) = caplog.records
    assert entry.name.startswith("fastdiff.")
    assert entry.levelno == logging.WARNING
    assert entry.getMessage().startswith("fastdiff: unet runs eagerly: gradients are enabled")
    assert "3 calls ran eagerly" in str(fastdiff.report(unet))


def test_a_higher_level_silences_it(unet, caplog):
    fastdiff.compile(unet)
    with caplog.at_level(logging.ERROR, "fastdiff"):
        call(unet)
    assert caplog.records == []


def test_without_configuration_it_is_a_line_on_stderr(forked):
    code, _, err = forked(CALL)
    assert (code, err) == (0, f"fastdiff: vae.decoder runs eagerly: {REASON}\n")
