"""What the hashes of an exported file cover."""

import copy
import hashlib

import pytest
import torch
from diffusers import UNet2DConditionModel
from small import TINY

from fastdiff.engines import exported, fingerprint
from fastdiff.errors import UserError


def test_weights_beside_a_file_are_compared_with_it(tmp_path):
    file, data = tmp_path / "model.onnx", tmp_path / "model.onnx_data"
    file.write_bytes(b"graph")
    data.write_bytes(b"weights")
    digest = hashlib.sha256(b"graphweights").hexdigest()
    part = {"file": file.name, "sha256": digest}
    exported.check_part(tmp_path, part)
    data.write_bytes(b"weighty")
    with pytest.raises(UserError, match="differs from what was written"):
        exported.check_part(tmp_path, part)


def test_equal_weights_with_other_heads_are_another_network():
    torch.manual_seed(0)
    net = UNet2DConditionModel(**TINY).eval()
    other = UNet2DConditionModel(**TINY | {"attention_head_dim": 2}).eval()
    other.load_state_dict(net.state_dict())
    assert fingerprint.of_network(copy.deepcopy(net)) == fingerprint.of_network(net)
    assert fingerprint.of_network(other) != fingerprint.of_network(net)
