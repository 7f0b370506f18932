"""Weights whose names and shapes fit but whose values can't be used."""

import pytest
import torch
from torch import nn

from pro2sam_fast.errors import CheckpointError
from pro2sam_fast.models.checkpoints import load_into


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    state["1.running_var"][2] = value
    before = model[0].weight.clone()
    with pytest.raises(CheckpointError, match=r"file\.pth holds NaN or infinite values in 1\.running_var"):
        load_into(model, state, "file.pth")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_weights_that_are_not_dense(change):
    model = nn.Linear(2, 3)
    state = dict(model.state_dict())
    state["weight"] = change(state["weight"])
    with pytest.raises(CheckpointError, match=r"file\.pth is unusable: weight isn't a dense tensor"):
        load_into(model, state, "file.pth")
