"""What a forward pass or a loss may draw from or count in, written in a module of the user's own."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

RNG = np.random.default_rng(0)
UNLABELLED: Iterator = iter(())
STEP = 0
COUNTS = {"step": 0}
FOLDER = Path()
DONE: dict[str, int] = {}
LOSSES: list[Tensor] = []
LISTS: dict[str, list[int]] = {"steps": [0]}
SETTINGS = {"augment": [random.Random(0)]}


class Config:
    """Settings that a class holds, and others an object."""

    step = 0
    rng = np.random.default_rng(1)

    def __init__(self) -> None:
        self.step_of_object = 0


CONFIG = Config()


class Augmentation:
    """An object that is called, and draws from a variable of its module."""

    def __call__(self, x: Tensor) -> Tensor:
        return x * self._factor

    @property
    def _factor(self) -> float:
        return RNG.random()


AUGMENTATION = Augmentation()


def noise(x: Tensor) -> Tensor:
    return x * RNG.random()


def through_another(x: Tensor) -> Tensor:
    return noise(noise(x))


def counted(x: Tensor) -> Tensor:
    global STEP
    STEP += 1
    return x / STEP


def reset() -> None:
    """Begin anew."""
    global STEP, RNG
    STEP, Config.step, CONFIG.step_of_object, COUNTS["step"] = 0, 0, 0, 0
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state
    Config.rng.bit_generator.state = np.random.default_rng(1).bit_generator.state
    SETTINGS["augment"][0].seed(0)
    LISTS["steps"][:] = [0]
    DONE.clear()
