"""How many images a second an experiment trains on, beside the bare PyTorch loop, and what the paper's grid takes.

    python benchmarks/training.py                            # on a GPU: the published networks, minutes
    python benchmarks/training.py --steps 6 --turns 3        # on a processor: the same, few steps

Three ways to train a network on pictures of CIFAR's shape, in turns, all with the paper's settings:

    recorded     thetadot's: data on the device, channels-last, fused SGD, on a GPU both passes as one CUDA graph; first
                 order at every step, curvature at every 64th, computed from turns without curvature and turns with it
                 at every step
    unrecorded   the same without recorder
    bare         torchvision's transforms of one picture after the other in 2 workers, and a loop that asks for loss and
                 accuracy at every step: as the paper's published code does

A turn is some steps of one way, after one that is not timed. What the workers have read ahead until then, up to 4
batches, is in favour of the bare loop. The floor is arithmetic: six operations a multiply-add, at the rate that this
machine multiplies large matrices. The grid's hours are its experiments' epochs on 50,000 images, their evaluations on
10,000, and their prunings: those of gradient_norm_increase, the costliest, measured with fewer samples.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from machine import CLOCKS, Stopwatch, describe, multiplication_rate
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from dynamics import Recorder
from dynamics.data import ImageSet
from dynamics.experiments.compiling import compiled
from dynamics.experiments.experiment import Experiment
from dynamics.experiments.grid import grid
from dynamics.experiments.passes import Passes
from dynamics.experiments.training import EVALUATED_AT_ONCE
from dynamics.models import build
from dynamics.probing.objective import cross_entropy_objective
from dynamics.pruning import Pruner

TRAINED, TESTED = 50_000, 10_000  # images of CIFAR
CURVATURE_EVERY = Experiment().curvature_every
Steps = Iterator[None]


def pictures(count: int) -> ImageSet:
    """Random bytes of CIFAR's shape."""
    return ImageSet(torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (count,)), flip=True)


@dataclass
class Trained:
    """A network as thetadot trains it, and what it learns from."""

    experiment: Experiment
    images: ImageSet
    device: torch.device

    def __post_init__(self) -> None:
        settings = self.experiment
        self.model = build(settings.model, num_classes=10, width=settings.width).to(self.device)
        self.forward = compiled(self.model, self.device) if settings.compile else self.model
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.01, settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
        self.objective = partial(cross_entropy_objective, temperature=settings.temperature)
        low = settings.precision == "bfloat16"
        self.passes = Passes(self.forward, temperature=settings.temperature, low=low)

    def record(self, folder: str, curvature_every: int) -> Recorder:
        """A recorder of the training, into the folder."""
        path = Path(folder) / f"{curvature_every}.zarr"
        how = {"objective": self.objective, "curvature_every": curvature_every, "capture": True}
        return Recorder(path, self.forward, self.optimizer, **how)

    def steps(self, recorder: Recorder | None) -> Steps:
        """The loop of ``dynamics.experiments.training``."""
        settings = self.experiment
        loader = self.images.batches(settings.batch_size, shuffle=True, augment=True, device=self.device)
        loss_sum, right = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for inputs, labels in recorder.watch(loader) if recorder else loader:
            loss, hits = self.passes(inputs, labels)
            self.optimizer.step()
            if recorder:
                recorder.log(loss=loss)
            loss_sum += loss * len(labels)
            right += hits
            yield

    @torch.no_grad()
    def evaluation(self) -> Steps:
        """Batches of the test set."""
        self.model.eval()
        try:
            for inputs, _ in self.images.batches(EVALUATED_AT_ONCE, device=self.device):
                self.model(inputs)
                yield
        finally:
            self.model.train()


class Pictures(Dataset[tuple[Tensor, int]]):
    """One picture after the other, transformed by torchvision, as its CIFAR10 gives them."""

    def __init__(self, images: ImageSet) -> None:
        self._pixels, self._labels = images.images.movedim(1, 3).contiguous().numpy(), images.labels.tolist()
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels[index])), self._labels[index]


def bare(experiment: Experiment, images: ImageSet, device: torch.device) -> Callable[[], Steps]:
    """The loop as it is written everywhere."""
    model = build(experiment.model, num_classes=10, width=experiment.width)
    model = model.to(device, memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, experiment.momentum, weight_decay=experiment.weight_decay)
    loader = DataLoader(Pictures(images), experiment.batch_size, shuffle=True, num_workers=2)

    def steps() -> Steps:
        loss_sum = right = 0.0
        for inputs, labels in loader:
            inputs, labels = inputs.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(inputs)
            loss = F.cross_entropy(logits / experiment.temperature, labels)
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            right += (logits.argmax(1) == labels).sum().item()
            yield

    return steps


def seconds_a_step(watch: Stopwatch, steps: Steps, count: int) -> float:
    """Mean over ``count`` steps, after one."""
    next(steps)
    elapsed = watch.seconds(lambda: [next(steps) for _ in range(count)])
    steps.close()
    return elapsed / count


def timed(experiment: Experiment, images: ImageSet, watch: Stopwatch, steps: int, turns: int) -> dict[str, np.ndarray]:
    """Seconds of a step in each turn of each way."""
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        first, curved, plain = (Trained(experiment, images, watch.device) for _ in range(3))
        recorders = [stack.enter_context(one.record(folder, every)) for one, every in ((first, 0), (curved, 1))]
        ways: dict[str, Callable[[], Steps]] = {
            "first order": lambda: first.steps(recorders[0]),
            "curvature": lambda: curved.steps(recorders[1]),
            "unrecorded": lambda: plain.steps(None),
            "bare": bare(experiment, images, watch.device),
            "evaluation": plain.evaluation,
        }
        counts = {"curvature": max(steps // 8, 1), "evaluation": max(steps // 2, 1)}
        for way in ways.values():
            seconds_a_step(watch, way(), 1)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(turns):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                found[name].append(seconds_a_step(watch, ways[name](), counts.get(name, steps)))
    measured = {name: np.array(seconds) for name, seconds in found.items()}
    share = 1 / CURVATURE_EVERY
    return {"recorded": (1 - share) * measured["first order"] + share * measured["curvature"], **measured}


def seconds_of_a_round(experiment: Experiment, images: ImageSet, watch: Stopwatch, parts: int) -> float:
    """Scoring by gradient_norm_increase and an event around the pruning, from 1/parts of their samples."""
    trained = Trained(experiment, images, watch.device)
    scored, probed = (
        list(images.sample(samples // parts).batches(experiment.batch_size, device=watch.device))
        for samples in (experiment.importance_samples, experiment.probe_samples)
    )
    pruner = Pruner(trained.model, trained.optimizer, "gradient_norm_increase")

    def prune() -> None:
        pruning = pruner.plan(0.5, scored)
        with recorder.event("prune", probe=probed, mode="eval"):
            pruner.apply(pruning)

    with TemporaryDirectory() as folder, trained.record(folder, 0) as recorder:
        prune()  # to warm up
        return parts * watch.seconds(prune)


def operations(model: nn.Module) -> int:
    """Floating-point operations of training on one image: forward, and twice that backward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    return 3 * counter.get_total_flops()


def report(
    experiment: Experiment, images: ImageSet, watch: Stopwatch, options: argparse.Namespace, rate: float
) -> Callable[[Experiment], float]:
    """Print the table of one network; returns the seconds that an experiment with it takes."""
    found = timed(experiment, images, watch, options.steps, options.turns)
    floor = operations(build(experiment.model, num_classes=10, width=experiment.width)) / rate
    batch = experiment.batch_size
    print(f"\n{experiment.model}: images a second, and ratio to bare; median [quartiles] of {options.turns} turns")
    for name in ("recorded", "unrecorded", "bare"):
        speed = quartiles(batch / found[name], ".0f")
        print(f"  {name:12}{speed:>24}   {quartiles(found['bare'] / found[name], '.2f')}", flush=True)
    print(f"  {'floor':12}{1 / floor:>9.0f}")
    step, evaluated = np.median(found["recorded"]), np.median(found["evaluation"])
    pruned = seconds_of_a_round(experiment, images, watch, options.parts)
    epoch = step * TRAINED / batch + evaluated * TESTED / EVALUATED_AT_ONCE
    print(f"  an epoch takes {epoch:.1f} s with its evaluation, a round of pruning {pruned:.1f} s")

    def seconds(one: Experiment) -> float:
        return sum(one.epochs) * epoch + (one.rounds * pruned if one.measure != "none" else 0.0)

    return seconds


def quartiles(values: np.ndarray, form: str) -> str:
    """Median and quartiles."""
    low, middle, high = (format(value, form) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return f"{middle} [{low}, {high}]"


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg13", "mobilenet_v1", "resnet56"])
    parser.add_argument("--width", type=float, default=1.0, help="factor on the networks' channels, in the hours too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"], help="of thetadot's ways")
    parser.add_argument("--compile", action="store_true", help="compile thetadot's ways")
    parser.add_argument(
        "--clock", default="wall", choices=CLOCKS,
        help="processor: what this process computes, without the bare loop's workers; for a processor that is shared",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=100, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--parts", type=int, default=4, help="divides the samples at which a pruning is measured")
    parser.add_argument("--grid", type=Path, default=Path(__file__).parents[1] / "configs" / "paper.yaml")
    options = parser.parse_args()
    most = TRAINED // Experiment().batch_size - 1
    if not 0 < options.steps <= most:
        parser.error(f"--steps must be 1 to {most}, what a pass has after its first; got {options.steps}")
    watch, images = Stopwatch(torch.device(options.device), options.clock), pictures(TRAINED)
    rate = multiplication_rate(watch, getattr(torch, options.precision))
    how = f"{options.precision}{', compiled' if options.compile else ''}"
    print(f"{describe(options.device)}; {how}; products of matrices at {rate:.3g} FLOP/s; {options.clock} time")
    settings = Experiment(width=options.width, precision=options.precision, compile=options.compile)
    seconds = {name: report(replace(settings, model=name), images, watch, options, rate) for name in options.models}
    experiments = [one for one in grid(yaml.safe_load(options.grid.read_text())) if one.model in seconds]
    hours: Counter[str] = Counter()
    for one in experiments:
        hours[one.model] += seconds[one.model](one) / 3600
    shares = ", ".join(f"{name} {time:,.0f}" for name, time in hours.items())
    print(f"\n{options.grid.name}: {len(experiments)} experiments take {hours.total():,.0f} hours here ({shares})")


if __name__ == "__main__":
    main()
