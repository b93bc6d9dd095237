"""Norm statistics can be re-estimated temporarily and restored."""

from __future__ import annotations

import torch
from conftest import Batches, ConvNet

from nni_jackpot.modules.batch_norm import preserve_stats, reestimate


def test_statistics_are_kept(batches: Batches) -> None:
    model = ConvNet()
    model(batches[0][0])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with preserve_stats(model):
        reestimate(model, batches)
        assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
        assert model.bn1.num_batches_tracked == len(batches)
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
