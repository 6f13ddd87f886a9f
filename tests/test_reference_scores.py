"""Every score of the paper's reference code, to 1e-10 relative. tests/data/README.md says how these were made."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dynamics.models import VGG, MobileNet, ResNet
from dynamics.pruning import scores

DATA = Path(__file__).parent / "data"
BLOCKS = [(8, 1), (16, 2), (16, 1), (16, 2), (16, 1), (32, 2), *[(32, 1)] * 5, (48, 2), (48, 1)]
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg13": lambda: VGG([8, 8, "M", 16, 16, "M", *[32, 32, "M"] * 3], num_classes=10),
    "mobilenet_v1": lambda: MobileNet(32, BLOCKS, num_classes=10),
    "resnet8": lambda: ResNet(8, (16, 32, 64), num_classes=10),
}
MEASURES = {
    "magnitude": ("magnitude", 1.0),
    "magnitude_l1": ("magnitude_l1", 1.0),
    "bn_scale": ("bn_scale", 1.0),
    "loss_preservation": ("loss_preservation", 5.0),
    "loss_preservation_times_magnitude": ("loss_preservation_times_magnitude", 5.0),
    "taylor": ("taylor", 5.0),
    "gradient_norm_increase": ("gradient_norm_increase_T200", 200.0),
    "gradient_norm_preservation": ("gradient_norm_preservation_T1", 1.0),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("network", NETWORKS)
def test_scores_equal_the_reference(network: str, measure: str) -> None:
    reference = np.load(DATA / f"{network}.npz")
    model = NETWORKS[network]()
    state = [torch.as_tensor(reference[key]) for key in reference.files if key.startswith("state/")]
    model.load_state_dict(dict(zip(model.state_dict(), state, strict=True)))
    prefix = "hessian_" if "gradient_norm" in measure else ""
    inputs = torch.as_tensor(reference[f"{prefix}inputs"]).double()
    labels = torch.as_tensor(reference[f"{prefix}labels"])
    batches = list(zip(inputs.split(100), labels.split(100), strict=True))  # uneven: the mean is over samples
    key, temperature = MEASURES[measure]
    found = scores(model, batches, measure, temperature=temperature)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    depthwise = [name for name in convolutions if "depthwise" in name]
    assert list(found) == [name for name in convolutions if name not in depthwise]
    for name, values in found.items():
        expected = reference[f"score/{key}/{convolutions.index(name):02d}"]
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
