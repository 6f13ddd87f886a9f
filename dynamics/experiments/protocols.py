"""The default protocol and each quirk of the paper's code on one fresh network: rounds without training, in seconds."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..data import DATASETS, load
from ..models import MODELS, build
from ..places import check_folder
from ..pruning import MEASURES, PROTOCOLS, Pruner, Pruning, share_left
from ..record import provenance
from ..record.store import Store
from .experiment import configuration

_MEASURES = [name for name, row in MEASURES.items() if not row.needs_initial]  # a fresh network is where it began


@dataclass(frozen=True)
class Comparison:
    """Rounds of pruning of a fresh network under every protocol, from the same weights and on the same samples.

    Protocols that score augmented samples see the same ones shifted, and mirrored where that keeps their class.

    Args:
        model: Network: one of those of `run`.
        data: Data set on whose training samples importance is measured.
        measure: Importance measure to prune by: one of those of `run`, except loss_preservation_times_distance.
        sparsity: Share of all filters that is to be pruned by the end of the last round.
        rounds: Number of rounds of pruning.
        width: Factor on the network's channel counts.
        samples: Training samples on which importance is measured.
        seed: Seed for initialisation and the choice of samples.

    Raises:
        ValueError: a field has an impossible value.
    """

    model: str = "resnet56"
    data: str = "digits"
    measure: str = "gradient_norm_increase"
    sparsity: float = 0.75
    rounds: int = 5
    width: float = 0.25
    samples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for field, value, options in (
            ("model", self.model, MODELS), ("data", self.data, DATASETS), ("measure", self.measure, _MEASURES),
        ):  # fmt: skip
            if value not in options:
                raise ValueError(f"unknown {field} {value!r}: choose one of {', '.join(options)}")
        share_left(self.sparsity, self.rounds, 0)
        if self.samples < 1:
            raise ValueError(f"samples must be positive, got {self.samples}")


def compare(comparison: Comparison, folder: Path) -> list[Path]:
    """Record the rounds under each protocol at ``folder / PROTOCOL.zarr``; returns the paths, "default" first.

    A record holds ``/pruning``, with the sparsity asked for and reached, and ``/units``; ``python -m analysis
    protocol-diff`` prints them side by side.

    Raises:
        FileExistsError: one of the records exists; then nothing is computed. After other errors no record is left.
        DataError: the data set is not there.
    """
    names = [name for name in PROTOCOLS if name != "select_on_test"]  # that needs a training
    paths = [folder / f"{name}.zarr" for name in names]
    check_folder(folder, "records", "out/protocols")
    if existing := [path for path in paths if path.exists()]:
        raise FileExistsError(f"{existing[0]} exists already: choose another folder, or remove it first")
    data = load(comparison.data)
    torch.manual_seed(comparison.seed)
    model = build(
        comparison.model, num_classes=data.num_classes, in_channels=data.channels, width=comparison.width
    )  # fmt: skip
    chosen = torch.Generator().manual_seed(comparison.seed)
    samples = data.balanced(comparison.samples, chosen)
    shown = {augment: list(samples.batches(128, augment=augment, generator=chosen)) for augment in (False, True)}
    done: list[Path] = []
    try:
        for name, path in tqdm(list(zip(names, paths, strict=True)), desc="protocols", unit="protocol"):
            batches = shown[PROTOCOLS[name].score_augmented]
            _record(path, name, comparison, rounds(copy.deepcopy(model), batches, name, comparison))
            done.append(path)
    except BaseException:  # half of a comparison is none
        for path in done:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return done


def rounds(model: nn.Module, batches: list[Any], protocol: str, comparison: Comparison) -> Iterable[Pruning]:
    """Prune a model in rounds by a protocol, without training: the prunings, one per round."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, optimizer, comparison.measure, protocol=protocol, seed=comparison.seed)
    for number in range(1, comparison.rounds + 1):
        left = PROTOCOLS[protocol].share_left(
            comparison.sparsity, comparison.rounds, number, residual=pruner.residual
        )  # fmt: skip
        yield pruner.prune(1 - left, batches)


def _record(path: Path, protocol: str, comparison: Comparison, prunings: Iterable[Pruning]) -> None:
    """Write a record of prunings outside of any training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = configuration(asdict(comparison) | {"protocol": protocol})
    store = Store(path, provenance.attributes() | settings)
    try:
        for number, pruning in enumerate(prunings):
            target = 1 - share_left(comparison.sparsity, comparison.rounds, number + 1)
            numbers = {name: value for name, value in pruning.attributes.items() if not isinstance(value, str)}
            row = {"event": number} | numbers | {"target": target}
            store.append("pruning", {name: np.array([value]) for name, value in row.items()})
            _append_units(store, number, pruning)
        store.commit()
    except BaseException:
        store.close()
        shutil.rmtree(path, ignore_errors=True)
        raise
    store.close()


def _append_units(store: Store, number: int, pruning: Pruning) -> None:
    units = [(layer, index) for layer, kept in pruning.alive.items() for index in range(len(kept))]
    for name, values in zip(("layer", "index"), zip(*units, strict=True), strict=True):
        store.write_coordinate("units", name, "unit", np.array(values))
    alive, score = (torch.cat([found[name] for name in pruning.alive]) for found in (pruning.alive, pruning.scores))
    row = {"event": np.array([number]), "score": score[None].double().numpy(), "alive": alive[None].numpy()}
    store.append("units", row)
