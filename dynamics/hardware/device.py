"""Which device an experiment runs on."""

from __future__ import annotations

import torch

from ..errors import first_line


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one.

    Raises:
        ValueError: there is no such device here, or nothing can be computed on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device {name!r} cannot be used: {first_line(error)}; choose auto, cpu, or cuda if there is a GPU"
        ) from error
    return device
