"""The paper's experiment as one dataclass: everything that decides what a run does."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..data import DATASETS
from ..models import MODELS
from ..pruning import MEASURES, PROTOCOLS, share_left
from ..schema import PRUNING_SETTINGS
from .studies import PARTS

# What a setting of each type takes, and how a message says it.
_KINDS: dict[Any, tuple[Callable[[object], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a string"),
    "str | None": (lambda value: value is None or isinstance(value, str), "a string"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (lambda value: type(value) is int, "a whole number"),
    "float": (lambda value: type(value) is int or (isinstance(value, float) and math.isfinite(value)), "a number"),
    "tuple[int, ...]": (lambda value: _all_are("int", value), "a list of whole numbers"),
    "tuple[float, ...]": (lambda value: _all_are("float", value), "a list of numbers"),
}

_PLACES = ("device", "root", "download")


def configuration(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a record: the settings of its experiment, and the protocol that they name."""
    protocol = dataclasses.asdict(PROTOCOLS[settings["protocol"]])
    return {"experiment": json.dumps(settings), "protocol": json.dumps(protocol), "seed": settings["seed"]}


def _all_are(kind: str, values: object) -> bool:
    return isinstance(values, tuple | list) and all(_KINDS[kind][0](value) for value in values)


@dataclass(frozen=True)
class Experiment:
    """One training with pruning, by the protocol of Lubana & Dick (ICLR 2021).

    In each of the first ``rounds`` epochs the network is trained for one epoch at the first learning rate, then scored
    and pruned, and the optimizer starts afresh. These epochs are part of the first stage of the schedule.

    Args:
        model: Network: vgg13, mobilenet_v1 or resnet56.
        data: Data set: digits (ships with scikit-learn), fashion-mnist, cifar10 or cifar100.
        measure: Importance measure to prune by, or "none" to train without pruning: magnitude, loss_preservation,
            loss_preservation_times_magnitude, loss_preservation_times_distance, gradient_norm_increase,
            gradient_norm_preservation, magnitude_l1, bn_scale, taylor, fisher, snip, grasp, synflow or random.
        sparsity: Share of all filters, or weights, that is pruned at the end of the last round.
        rounds: Number of rounds of pruning.
        granularity: What is pruned: "filter", or "weight" for single weights.
        protocol: "default", "reference" for the quirks of the paper's code, or one quirk by name: whole_percent,
            floor_by_index, revive_silenced, count_copies, prune_ties, score_augmented or select_on_test.
        width: Factor on the network's channel counts.
        epochs: Epochs in each stage of the learning-rate schedule.
        learning_rates: Learning rate of each stage.
        batch_size: Samples per training batch.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD, on every parameter.
        temperature: T of the training loss, the cross-entropy of logits / T, and of the probes. Importance is always
            measured with the T of its measure's paper: 5 for loss preservation, 200 for gradient_norm_increase and
            grasp, otherwise 1.
        augment: Shift the training images by up to 4 pixels at random, and mirror them where that keeps their class.
            Importance is measured on unaugmented images, except under the protocols reference and score_augmented.
        keep_momentum: Keep the optimizer's momentum across a pruning; by default it is dropped, as in the paper.
        importance_samples: Training samples on which importance is measured.
        probe_samples: Training samples on which everything is measured before and after each pruning.
        probe_mode: Mode of these measurements: "eval", in which importance is scored, or "train", in which BatchNorm
            normalises each batch by itself, as in training.
        studies: Study the network before the first and the last pruning, on the probe samples: what pruning 1/32 to 1/4
            of the filters would do, in probe_mode; how well the paper's measures agree; and which filters are
            scale-invariant.
        train_samples: Number of training samples, with equally many of each class; 0 means the whole set.
        curvature_every: Measure curvature and the loss decrease every so many steps; 0 means never.
        seed: Seed for initialisation, data order and augmentation.
        precision: Precision of the forward and backward passes: "float32", or "bfloat16" by autocast. Parameters,
            evaluation, importance and what the recorder evaluates itself stay in full precision.
        compile: Compile the training steps with torch, which needs a C++ compiler and takes minutes at the first step.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        root: Folder of the data sets; by default $THETADOT_DATA, or else ~/.cache/thetadot.
        download: Let torchvision download a data set that is not on disk.

    Raises:
        ValueError: a field has an impossible value; the message names it, its value and the values it can have.
    """

    model: str = "vgg13"
    data: str = "digits"
    measure: str = "magnitude"
    sparsity: float = 0.75
    rounds: int = 5
    granularity: str = "filter"
    protocol: str = "default"
    width: float = 1.0
    epochs: tuple[int, ...] = (80, 40, 40)
    learning_rates: tuple[float, ...] = (0.1, 0.01, 0.001)
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 5.0
    augment: bool = True
    keep_momentum: bool = False
    importance_samples: int = 2560
    probe_samples: int = 512
    probe_mode: str = "eval"
    studies: bool = False
    train_samples: int = 0
    curvature_every: int = 64
    seed: int = 0
    precision: str = "float32"
    compile: bool = False
    device: str = "auto"
    root: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            fits, kind = _KINDS[field.type]
            if not fits(value := getattr(self, field.name)):
                raise ValueError(f"{field.name} must be {kind}, got {value!r}")
            if field.type == "float":  # 1 and 1.0 are one experiment
                object.__setattr__(self, field.name, float(value))
            elif field.type in ("tuple[float, ...]", "tuple[int, ...]"):
                number = float if "float" in field.type else int
                object.__setattr__(self, field.name, tuple(map(number, value)))
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        row = MEASURES.get(self.measure)
        for field, value, options in (
            ("model", self.model, MODELS),
            ("data", self.data, DATASETS),
            ("measure", self.measure, ("none", *MEASURES)),
            ("granularity", self.granularity, ("filter", "weight")),
            ("protocol", self.protocol, PROTOCOLS),
            ("probe_mode", self.probe_mode, ("eval", "train")),
            ("precision", self.precision, ("float32", "bfloat16")),
        ):
            if value not in options:
                raise ValueError(f"unknown {field} {value!r}: choose one of {', '.join(options)}")
        if self.granularity == "weight" and (self.protocol != "default" or getattr(row, "per_filter", False)):
            raise ValueError(
                f"protocol {self.protocol!r} with measure {self.measure!r} prunes filters, not single weights: "
                "choose granularity filter"
            )
        if self.studies and (self.granularity == "weight" or self.probe_samples < PARTS):
            raise ValueError(
                f"studies need filters and at least {PARTS} probe samples, got granularity {self.granularity!r} "
                f"and {self.probe_samples} probe samples"
            )

    def _check_ranges(self) -> None:
        if len(self.epochs) != len(self.learning_rates) or not self.epochs or min(self.epochs) < 0:
            raise ValueError(
                f"epochs and learning_rates need one entry per stage, and epochs of 0 or more, got {self.epochs}, "
                f"{self.learning_rates}"
            )
        share_left(self.sparsity, self.rounds, 0)
        if self.measure != "none" and self.rounds > self.epochs[0]:
            raise ValueError(
                f"rounds={self.rounds} needs at least as many epochs in the first stage, got {self.epochs[0]}"
            )
        for field in ("batch_size", "importance_samples", "probe_samples", "learning_rates", "temperature", "width"):
            value = getattr(self, field)
            if min(value if isinstance(value, tuple | list) else (value,)) <= 0:
                raise ValueError(f"{field} must be positive, got {value}")
        for field in ("momentum", "weight_decay", "curvature_every", "train_samples", "seed"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} must not be negative, got {getattr(self, field)}")
        if self.seed >= 2**63 - 1:
            raise ValueError(f"seed must be less than 2**63 - 1, got {self.seed}")

    @property
    def name(self) -> str:
        """A name that tells the runs of a comparison apart, e.g. ``vgg13-digits-magnitude-0.75-5r-seed0``."""
        special = [name for name in (self.granularity, self.protocol) if name not in ("filter", "default")]
        pruned = "" if self.measure == "none" else "-".join(["", f"{self.sparsity:g}", f"{self.rounds}r", *special])
        return f"{self.model}-{self.data}-{self.measure}{pruned}-seed{self.seed}"

    @property
    def identity(self) -> dict[str, object]:
        """The settings that decide what a run computes: not where it does, nor how it would prune if it prunes not."""
        ignored = _PLACES if self.measure != "none" else (*_PLACES, *PRUNING_SETTINGS)
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ignored}

    def schedule(self) -> list[float]:
        """Learning rate of each epoch."""
        stages = zip(self.epochs, self.learning_rates, strict=True)
        return [rate for epochs, rate in stages for _ in range(epochs)]
