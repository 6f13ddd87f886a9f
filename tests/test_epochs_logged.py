"""What a loop logs of its epochs is a curve over training: before it, twice an epoch, in the middle of one."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from networks import plain_step, smooth_network, vectors

import analysis
from dynamics import Recorder, open_run
from figures import draw
from figures.lines import ENDED

LOSSES = [1.0, 0.5, 0.25]  # logged of the epochs that train
ACCURACIES = [0.4, 0.6, 0.8]


def train(path: Path, *, watches: bool, epochs: int = 3, seed: int = 0) -> xr.DataTree:
    """Logs an accuracy before training, loss and accuracy apart after each epoch, and one amid the second."""
    torch.manual_seed(seed)
    model, data = smooth_network(), vectors(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attributes = {"measure": "magnitude", "seed": seed}
    with Recorder(path, model, optimizer, curvature_every=0, attributes=attributes) as recorder:
        recorder.log_epoch(test_accuracy=0.1)
        for epoch in range(epochs):
            for number, (inputs, labels) in enumerate(recorder.watch(data) if watches else data):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()
                if watches and (epoch, number) == (1, 0):
                    recorder.log_epoch(test_accuracy=0.5)
            recorder.log_epoch(test_accuracy=ACCURACIES[epoch])
            recorder.log_epoch(train_loss=LOSSES[epoch])
    return open_run(path)


@pytest.mark.parametrize("watches", [True, False])
def test_rows_lie_where_they_were_logged(tmp_path: Path, watches: bool) -> None:
    run = train(tmp_path / "run", watches=watches)
    assert run["steps"].epoch.values.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    curve = analysis.training_curve(run)
    accuracies = dict(zip(curve.epoch.values.tolist(), curve.test_accuracy.values.tolist(), strict=True))
    assert accuracies == {0: 0.1, 1: 0.4, 2: 0.6, 3: 0.8} | ({1.25: 0.5} if watches else {})
    ends = curve.sel(epoch=[1, 2, 3])
    assert ends.train_loss.values.tolist() == LOSSES
    assert ends.step.values.tolist() == [4, 8, 12]
    assert curve.train_loss.sel(epoch=0).isnull()
    found = analysis.outcome(run)
    assert (float(found.test_accuracy), float(found.train_loss)) == (0.8, 0.25)


@pytest.mark.parametrize(
    ("rows", "completed"),
    [
        ([(0, 2), (0, 5), (1, 7)], [0.4, 1, 1.4]),  # it goes on, or ended amid an epoch
        ([(0, 2), (0, 5), (1, 7), (1, 10)], [0.4, 1, 1.4, 2]),
        ([(0, 0), (0, 2), (0, 5), (2, 15), (3, 17)], [0, 0.4, 1, 3, 3.4]),  # no row in the second
        ([(0, 2)], [1]),  # how long an epoch is, nothing tells
        ([(0, 8), (1, 12)], [1, 2]),  # batches that grow
    ],
)
def test_the_last_row_may_lie_amid_an_epoch(rows: list[tuple[int, int]], completed: list[float]) -> None:
    epochs, steps = zip(*rows, strict=True)
    logged = {"step": ("epoch", list(steps)), "test_accuracy": ("epoch", [0.5] * len(rows))}
    run = xr.DataTree.from_dict({"/epochs": xr.Dataset(logged, {"epoch": list(epochs)})})
    assert analysis.training_curve(run).epoch.values.tolist() == completed


def test_what_was_tested_amid_the_last_epoch_counts_but_not_in_the_one_before() -> None:
    nan = float("nan")
    values = {
        "train_loss": [nan, 0.5, nan, 0.4],
        "test_accuracy": [0.6, nan, 0.7, nan],
        "test_loss": [3, nan, nan, nan],
    }
    logged = {name: ("epoch", column) for name, column in values.items()}
    epochs = xr.Dataset({"step": ("epoch", [3, 5, 8, 10])} | logged, {"epoch": [0, 0, 1, 1]})
    found = analysis.outcome(xr.DataTree.from_dict({"/epochs": epochs}))
    assert (float(found.test_accuracy), float(found.train_loss)) == (0.7, 0.4)
    assert found.test_loss.isnull()


def test_runs_of_other_lengths_are_drawn_together(tmp_path: Path) -> None:
    runs = {str(seed): train(tmp_path / str(seed), watches=True, epochs=3 - seed, seed=seed) for seed in range(2)}
    accuracy = draw("training_curves", runs).axes[1]
    (line,) = (line for line in accuracy.lines if len(line.get_xdata()) > 2)
    assert line.get_xdata().tolist() == [0, 1, 1.25, 2, 3]
    (cross,) = (line for line in accuracy.lines if line.get_label() == ENDED)
    assert cross.get_xdata().tolist() == [2]  # the last at which both are
    assert line.get_ydata()[:4] == pytest.approx([0.1, 0.4, 0.5, 0.6])


def test_what_was_logged_before_a_training_that_is_resumed_ends_no_epoch(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        recorder.log_epoch(test_accuracy=0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0, resume=True, step=0) as recorder:
        for epoch in range(2):
            for batch in batches:
                plain_step(model, optimizer, batch)
            recorder.log_epoch(test_accuracy=ACCURACIES[epoch])
    assert open_run(tmp_path / "run")["steps"].epoch.values.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("accuracy", [87.0, -0.5, torch.tensor([87.0])])
def test_an_accuracy_is_a_share_and_what_was_recorded_before_another_stays(tmp_path: Path, accuracy: object) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"takes test_accuracy as a fraction .*, from 0 to 1, got (87|-0.5)$"):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
            plain_step(model, optimizer, vectors(1)[0])
            recorder.log_epoch(test_accuracy=1, train_accuracy=float("nan"), train_loss=9.0)
            recorder.log_epoch(test_accuracy=accuracy)
    run = open_run(tmp_path / "run")
    assert (run["steps"].sizes["step"], run["epochs"].test_accuracy.values.tolist()) == (1, [1.0])


def test_a_name_close_to_one_that_tables_read_is_recorded_with_a_warning(tmp_path: Path) -> None:
    model = smooth_network()
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), curvature_every=0) as recorder:
        with pytest.warns(UserWarning, match="records 'test_acc', but tables and figures read 'test_accuracy'") as said:
            recorder.log_epoch(test_acc=0.5)
        assert said[0].filename == __file__
        recorder.log_epoch(test_accuracy=0.5, test_accuracy_top5=0.9)
        recorder.log_epoch(val_accuracy=0.5, val_loss=1.0, eval_accuracy=0.5, top5_accuracy=0.9, accuracy=0.5, lr=0.1)
        recorder.log_epoch(train_lr=0.1, test_accuracy_top5=0.9)
    assert open_run(tmp_path / "run")["epochs"].test_acc.values[0] == 0.5
