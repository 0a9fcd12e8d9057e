"""The UNet reproduces openai/improved-diffusion: outputs, gradients, state-dict names, shapes and order."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch as th

from improved_diffusion.unet import SuperResModel, UNetModel

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "reference.json").read_text())["unet"]
ARRAYS = np.load(GOLDEN / "reference.npz", allow_pickle=False)


def normal(seed, shape):
    return np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32)


def build(case):
    cls = {"UNetModel": UNetModel, "SuperResModel": SuperResModel}[case["class"]]
    model = cls(**case["kwargs"], num_classes=case["num_classes"]).eval()
    state = model.state_dict()
    for i, key in enumerate(sorted(state)):
        state[key] = th.from_numpy(normal(i, state[key].shape) * np.float32(0.05))
    model.load_state_dict(state)
    return model


def inputs(case):
    n = case["x_shape"][0]
    kwargs = {}
    if case["num_classes"]:
        kwargs["y"] = th.arange(n) % case["num_classes"]
    if case["low_res_size"]:
        kwargs["low_res"] = th.from_numpy(normal(102, (n, 3, case["low_res_size"], case["low_res_size"])))
    return th.from_numpy(normal(101, case["x_shape"])), th.tensor(case["timesteps"]), kwargs


@pytest.mark.parametrize("name", CASES)
def test_state_dict_layout(name):
    state = build(CASES[name]).state_dict()
    assert list(state) == [
        entry if isinstance(entry, str) else entry[0] for entry in CASES[name]["key_order"]
    ]
    shapes = CASES[name]["keys"]
    assert {key: list(value.shape) for key, value in state.items()} == dict(shapes)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradient(name):
    case = CASES[name]
    model = build(case)
    x, timesteps, kwargs = inputs(case)
    out = model(x, timesteps, **kwargs)
    expected = ARRAYS[f"unet/{name}/out"]
    assert np.abs(out.detach().numpy() - expected).max() <= 2e-5 * np.abs(expected).max()
    loss = (out**2).mean()
    loss.backward()
    norm = th.linalg.vector_norm(th.stack([p.grad.norm() for p in model.parameters()]))
    assert loss.item() == pytest.approx(case["loss_mean_sq"], rel=2e-5)
    assert norm.item() == pytest.approx(case["grad_norm"], rel=2e-5)
