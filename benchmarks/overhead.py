"""What recording adds to a training step: ratios to the bare step, taken side by side in one run.

    python benchmarks/overhead.py --models vgg13 resnet56 --batch 128 --device cpu

Each contender trains a network of its own, in turns with a bare training, one step each. A figure is the median, over
the repetitions, of its step's time divided by the bare step's beside it, with the quartiles. Cockpit, PyHessian and
curvlinops are measured where they are installed, and said to be missing where not.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from machine import Stopwatch, describe
from torch import Tensor, nn

from dynamics import Recorder
from dynamics.models import build

Step = Callable[[], None]
Batch = tuple[Tensor, Tensor]


class Training:
    """A network, its optimizer and a batch that stays."""

    def __init__(self, name: str, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = build(name, num_classes=10).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        self.batch = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)

    def step(self) -> Tensor:
        """The bare step."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.batch[0]), self.batch[1])
        loss.backward()
        self.optimizer.step()
        return loss


def thetadot(curvature_every: int, *, capture: bool = False) -> Callable[[Training, ExitStack], Step]:
    """First-order quantities at every step, curvature and measured decrease at some."""

    def make(training: Training, stack: ExitStack) -> Step:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        how = {"curvature_every": curvature_every, "capture": capture}
        recorder = stack.enter_context(Recorder(Path(folder) / "run.zarr", training.model, training.optimizer, **how))

        def step() -> None:
            recorder.observe(training.batch)
            recorder.log(loss=training.step())

        return step

    return make


def by_item(training: Training, stack: ExitStack) -> Step:
    """What people write by hand: four numbers a parameter, each fetched by ``.item()``."""
    rows: list[list[float]] = []

    def step() -> None:
        training.step()
        rows.append(
            [
                number
                for parameter in training.model.parameters()
                for number in (
                    parameter.detach().square().sum().item(),
                    parameter.grad.square().sum().item(),
                    (parameter.detach() * parameter.grad).sum().item(),
                    (parameter.detach() * parameter.grad).abs().sum().item(),
                )
            ]
        )

    return step


def cockpit(configuration: str) -> Callable[[Training, ExitStack], Step]:
    """Cockpit (Schneider, Dangel & Hennig 2021), all its quantities of a configuration at every step."""

    def make(training: Training, stack: ExitStack) -> Step:
        from backpack import extend
        from cockpit import Cockpit
        from cockpit.utils.configuration import configuration as quantities

        model, optimizer, (inputs, labels) = extend(training.model), training.optimizer, training.batch
        mean = extend(nn.CrossEntropyLoss())
        instrument = Cockpit(model.parameters(), quantities=quantities(configuration))
        count = iter(range(10**9))

        def step() -> None:
            number = next(count)
            optimizer.zero_grad()
            outputs = model(inputs)
            loss, losses = mean(outputs, labels), F.cross_entropy(outputs, labels, reduction="none")
            information = {
                "batch_size": len(inputs), "individual_losses": losses, "loss": loss, "optimizer": optimizer,
            }  # fmt: skip
            with instrument(number, info=information):
                loss.backward(create_graph=instrument.create_graph(number))
            optimizer.step()

        return step

    return make


def pyhessian(training: Training, stack: ExitStack) -> Step:
    """PyHessian (Yao et al. 2020): the step, and one product Hg."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    def step() -> None:
        training.step()
        measured = hessian(training.model, nn.CrossEntropyLoss(), data=training.batch, cuda=training.batch[0].is_cuda)
        vector = [part.detach() for part in measured.gradsH]
        product = hessian_vector_product(measured.gradsH, measured.params, vector)
        torch.stack([(part * v).sum() for part, v in zip(product, vector, strict=True)])
        training.optimizer.zero_grad()

    return step


def curvlinops(training: Training, stack: ExitStack) -> Step:
    """curvlinops (Dangel et al. 2025): the step, and one product Hg."""
    from curvlinops import HessianLinearOperator

    parameters = [parameter for parameter in training.model.parameters() if parameter.requires_grad]

    def step() -> None:
        training.step()
        vector = [parameter.grad.detach().clone() for parameter in parameters]
        operator = HessianLinearOperator(
            training.model, nn.CrossEntropyLoss(), parameters, [training.batch], check_deterministic=False
        )
        product = operator @ vector
        torch.stack([(part * v).sum() for part, v in zip(product, vector, strict=True)])

    return step


FIRST, CURVED = "thetadot, first order", "thetadot, curvature and decrease"
CAPTURED = "the same, captured"  # as CUDA graphs
CONTENDERS: dict[str, Callable[[Training, ExitStack], Step]] = {
    FIRST: thetadot(0),
    CURVED: thetadot(1),
    CAPTURED: thetadot(1, capture=True),
    "by hand, .item()": by_item,
    "Cockpit, economy": cockpit("economy"),
    "Cockpit, full": cockpit("full"),
    "PyHessian, one Hg": pyhessian,
    "curvlinops, one Hg": curvlinops,
}


def seconds(step: Step, watch: Stopwatch) -> float:
    """Time of one step; on a GPU, which a loop hands work to without waiting for it, the mean of some in a row."""
    count = 8 if watch.device.type == "cuda" else 1
    return watch.seconds(lambda: [step() for _ in range(count)]) / count


def pairs(name: str, batch: int, device: torch.device, contender: str, repetitions: int) -> np.ndarray:
    """Seconds of a step of the contender and of the bare step beside it, (repetition, 2)."""
    watch = Stopwatch(device)
    with ExitStack() as stack:
        bare = Training(name, batch, device).step
        step = CONTENDERS[contender](Training(name, batch, device), stack)
        for one in (bare, step):
            seconds(one, watch)
        found = []
        for repetition in range(repetitions):
            pair = [seconds(one, watch) for one in ((bare, step) if repetition % 2 else (step, bare))]
            found.append(pair[::-1] if repetition % 2 else pair)
    return np.array(found)


def compare(name: str, batch: int, device: torch.device, contenders: list[str], repetitions: int) -> None:
    """Print the ratios of one network."""
    found, bare = {}, []
    for contender in contenders:
        if contender == CAPTURED and device.type != "cuda":
            continue
        try:
            times = pairs(name, batch, device, contender, repetitions)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else ""
            print(f"  {contender:34} not measured: {type(error).__name__}: {reason:.70}")
        else:
            found[contender] = times[:, 0] / times[:, 1]
            bare.extend(times[:, 1])
            print(f"  {contender:34} {quartiles(found[contender])}", flush=True)
    if bare:
        print(f"  a bare step takes {1000 * np.median(bare):.3g} ms")
    first = found.get(FIRST)
    for curved, what in ((CURVED, "thetadot, curvature every 64"), (CAPTURED, "the same, captured")):
        if first is not None and curved in found:
            print(f"  {what:34} {quartiles((63 * first + found[curved]) / 64)}   (63 × first order + 1)/64")


def quartiles(ratios: np.ndarray) -> str:
    """Median and quartiles."""
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{middle:.3f}  [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg13", "resnet56"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        metavar="NAME",
        help=f"some of: {'; '.join(CONTENDERS)}",
    )
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    device = torch.device(options.device)
    print(describe(str(device)))
    for name in options.models:
        print(f"\n{name}, batch {options.batch}: ratio to the bare step, median [quartiles] of {options.repetitions}")
        compare(name, options.batch, device, options.contenders, options.repetitions)


if __name__ == "__main__":
    main()
