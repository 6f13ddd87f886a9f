"""The default protocol has no quirk; each quirk of the paper's code does what is written of it, and nothing else."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from prunable import NETWORKS, batch, goes_with, train, trained
from torch import nn

import analysis.__main__
import dynamics.__main__
from analysis import MissingQuantityError
from analysis.protocol import epoch_that_counts, protocol_diff, protocol_table
from dynamics import open_run
from dynamics.experiments import protocols
from dynamics.experiments.protocols import Comparison, compare
from dynamics.network.masks import parameter_masks
from dynamics.pruning import MEASURES, PROTOCOLS, Protocol, Pruner, scores, share_left

QUIRKS = [name for name in PROTOCOLS if name not in ("default", "reference")]


def test_every_switch_is_off_by_default_and_on_in_the_reference_but_for_ties_which_it_counts() -> None:
    assert not any(asdict(Protocol()).values())
    assert PROTOCOLS["default"] == Protocol()
    assert [name for name, on in asdict(PROTOCOLS["reference"]).items() if not on] == ["prune_ties"]
    assert [[name for name, on in asdict(PROTOCOLS[quirk]).items() if on] for quirk in QUIRKS] == [[q] for q in QUIRKS]


@pytest.mark.parametrize(("sparsity", "left"), [(0.75, 0.18), (0.9, 0.02)])
def test_whole_percents_add_up(sparsity: float, left: float) -> None:
    """What the paper's code comes to in 25 rounds, in residual networks only."""
    quirk = PROTOCOLS["whole_percent"]
    assert quirk.share_left(sparsity, 25, 25, residual=True) == left
    assert quirk.share_left(sparsity, 25, 25, residual=False) == share_left(sparsity, 25, 25)
    assert Protocol().share_left(sparsity, 25, 25, residual=True) == share_left(sparsity, 25, 25)
    percents = [100 * quirk.share_left(sparsity, 25, number, residual=True) for number in range(26)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(percents))


Unit = tuple[str, int]


def replay(
    protocol: Protocol, name: str, model: nn.Module, found: dict[str, list[float]], alive: set[Unit], sparsity: float
) -> set[Unit]:
    """One round by the rules as they are written, unit by unit; what is alive after it."""
    residual = name == "resnet"
    meets_sum = {layer for layer in found if residual and ("conv2" in layer or "shortcut" in layer or layer == "stem")}
    copied = {layer for layer, own in goes_with(model).items() if any("depthwise" in module for module in own)}
    rows = [(layer, index) for layer, values in found.items() for index in range(len(values))]
    ranked = [unit for unit in rows if unit in alive or (protocol.revive_silenced and unit[0] in meets_sum)]
    may_go = []
    for layer, values in found.items():
        own = [unit for unit in ranked if unit[0] == layer]
        if residual and layer == "stem":
            continue
        if protocol.floor_by_index and not residual:
            stay = own[-(int(0.05 * len(values)) + 1) :]
        else:
            count = 1 if protocol.floor_by_index else max(1, -(-len(values) * 5 // 100))
            stay = sorted(own, key=lambda unit: found[unit[0]][unit[1]])[-count:]
        may_go += [unit for unit in own if unit not in stay]
    counts = {unit: 2 if protocol.count_copies and unit[0] in copied else 1 for unit in rows}
    quota = sum(counts[unit] for unit in ranked) - round(sum(counts.values()) * (1 - sparsity))
    may_go.sort(key=lambda unit: found[unit[0]][unit[1]])
    gone: list[Unit] = []
    for unit in may_go:
        if quota < counts[unit]:
            break
        quota -= counts[unit]
        gone.append(unit)
    if protocol.prune_ties and gone:
        last = found[gone[-1][0]][gone[-1][1]]
        gone = [unit for unit in may_go if found[unit[0]][unit[1]] <= last]
    return set(ranked) - set(gone)


SIGNED, ABSOLUTE = "gradient_norm_increase", "loss_preservation"


@pytest.mark.long
@pytest.mark.parametrize(
    ("protocol", "measure"),
    [
        *((name, SIGNED) for name in PROTOCOLS if name != "select_on_test"),
        ("default", ABSOLUTE),
        ("reference", ABSOLUTE),
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_rounds_are_those_replayed_by_hand(name: str, protocol: str, measure: str) -> None:
    model, optimizer = trained(name)
    pruner = Pruner(model, optimizer, measure, protocol=protocol)
    assert pruner.residual == (name == "resnet")
    alive = {(layer, index) for layer, kept in pruner.alive.items() for index in range(len(kept))}
    for number in range(1, 4):
        sparsity = 1 - PROTOCOLS[protocol].share_left(0.6, 3, number, residual=name == "resnet")
        batches = [batch(number)]
        found = scores(model, batches, measure, temperature=MEASURES[measure].temperature)
        alive = replay(
            PROTOCOLS[protocol], name, model, {layer: s.tolist() for layer, s in found.items()}, alive, sparsity
        )  # fmt: skip
        pruning = pruner.prune(sparsity, batches)
        assert {
            (layer, index) for layer, kept in pruning.alive.items() for index in kept.nonzero().flatten().tolist()
        } == alive
        train(model, optimizer, 1)


def one_layer(sizes: list[float]) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Conv2d(1, len(sizes), 1, bias=False), nn.Flatten(), nn.Linear(len(sizes), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(sizes).view(-1, 1, 1, 1))
    return model, torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("protocol", "alive"), [("default", [1, 1, 1, 1, 1, 0]), ("floor_by_index", [1, 1, 1, 1, 0, 1])]
)
def test_the_floor_by_index_protects_the_last_and_not_the_best(protocol: str, alive: list[int]) -> None:
    model, optimizer = one_layer([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    assert Pruner(model, optimizer, "magnitude", protocol=protocol).prune(1 / 6).alive["0"].int().tolist() == alive
    model, optimizer = one_layer([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    kept = Pruner(model, optimizer, "magnitude", protocol=protocol).prune(5 / 6).alive["0"].int().tolist()
    assert kept == ([0, 0, 0, 0, 0, 1] if protocol == "floor_by_index" else [1, 0, 0, 0, 0, 0])


def test_ties_at_zero_take_more_than_was_asked_only_where_that_is_the_protocol() -> None:
    """The paper's code sorts all scores and takes the first ⌊share · filters⌋ of them, tied or not: one of six here."""
    sizes = [0.0, 0.0, 0.0, 0.0, 3.0, 4.0]
    assert len(np.argsort(sizes, kind="stable")[: int(1 / 6 * len(sizes))]) == 1
    for protocol, reached in (("default", 1 / 6), ("prune_ties", 4 / 6), ("reference", 1 / 6)):
        model, optimizer = one_layer(sizes)
        pruning = Pruner(model, optimizer, "magnitude", protocol=protocol).prune(1 / 6)
        assert (pruning.target, pruning.sparsity) == (1 / 6, pytest.approx(reached))


def test_a_revived_filter_starts_from_zero_and_learns() -> None:
    model, optimizer = trained("resnet")
    pruner = Pruner(model, optimizer, "gradient_norm_increase", protocol="revive_silenced")
    first = pruner.prune(0.15, [batch(1)]).alive
    train(model, optimizer, 3)
    second = pruner.prune(0.17, [batch(2)]).alive
    revived = [
        (layer, int(index)) for layer, kept in second.items() for index in (kept & ~first[layer]).nonzero().flatten()
    ]
    assert revived  # a silenced filter scores 0, and others less
    layer, index = revived[0]
    norm = model.get_submodule(goes_with(model)[layer][1])
    assert not model.get_submodule(layer).weight[index].any()
    assert (norm.weight[index], norm.bias[index]) == (0, 0)
    assert parameter_masks(model)[f"{layer}.weight"][index].all()
    F.cross_entropy(model(batch(3)[0]), batch(3)[1]).backward()
    assert norm.bias.grad[index] != 0


def test_only_filters_have_a_protocol() -> None:
    model, optimizer = trained("vgg13", steps=1)
    with pytest.raises(ValueError, match="unknown protocol 'wrong': choose one of default, whole_percent"):
        Pruner(model, optimizer, "magnitude", protocol="wrong")
    with pytest.raises(ValueError, match="got 'weight' with protocol 'reference'"):
        Pruner(model, optimizer, "magnitude", granularity="weight", protocol="reference")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.DataTree]:
    comparison = Comparison(model="mobilenet_v1", measure="loss_preservation", rounds=2, width=0.1, samples=10)
    paths = compare(comparison, tmp_path_factory.mktemp("protocols"))
    return {path.stem: open_run(path) for path in paths}


@pytest.mark.long
def test_the_comparison_says_what_a_quirk_changes(compared: dict[str, xr.DataTree]) -> None:
    found = protocol_diff(compared)
    assert list(found.run.values) == [name for name in PROTOCOLS if name != "select_on_test"]
    np.testing.assert_allclose(found.asked, [[1 - share_left(0.75, 2, 1), 0.75]] * len(compared))
    for label, run in compared.items():
        alive = run["units"].alive.astype(bool).values
        row = found.sel(run=label)
        np.testing.assert_allclose(row.reached, 1 - alive.mean(1))
        assert (
            row.other.values.tolist()
            == (alive != compared["default"]["units"].alive.astype(bool).values).sum(1).tolist()
        )
        layers = run["units"].layer.values
        left = np.array([[alive[event, layers == layer].sum() for layer in np.unique(layers)] for event in range(2)])
        assert row.emptied.values.tolist() == (left == 0).sum(1).tolist()
        assert ((row.multiply_adds_left > 0) & (row.multiply_adds_left < 1)).all()
    unchanged = found.sel(run=["whole_percent", "revive_silenced"])
    assert not unchanged.other.any()  # of residual networks
    assert (found.sel(run="count_copies").reached != found.sel(run="default").reached).any()


def test_what_is_no_pruning_is_no_round(compared: dict[str, xr.DataTree]) -> None:
    """Between the rounds all runs were looked at: an event that has units, too."""

    def looked_at(run: xr.DataTree) -> xr.DataTree:
        three = {node: run[node].to_dataset().isel(event=[0, 0, 1]).assign_coords(event=range(3))
                 for node in ("pruning", "units")}  # fmt: skip
        three["pruning"]["kind"] = "event", ["prune", "look", "prune"]
        return xr.DataTree.from_dict(three)

    found = protocol_diff({label: looked_at(run) for label, run in compared.items()})
    xr.testing.assert_equal(found, protocol_diff(compared))


def test_samples_are_augmented_for_those_that_score_them_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All from the same images, which augmenting shifts: beside ours, nothing but zeros moves in."""
    seen: dict[str, torch.Tensor] = {}

    def rounds(model: nn.Module, batches: list, name: str, comparison: Comparison) -> list:
        seen[name] = torch.cat([inputs for inputs, _ in batches])
        return []

    monkeypatch.setattr(protocols, "rounds", rounds)
    compare(Comparison(model="vgg13", width=0.05, samples=20), tmp_path)
    different = {name for name, inputs in seen.items() if not torch.equal(inputs, seen["default"])}
    assert different == {"score_augmented", "reference"}
    assert torch.equal(seen["score_augmented"], seen["reference"])
    padded = F.pad(seen["default"], (4, 4, 4, 4), value=-1.0)
    crops = torch.stack([padded[:, :, r : r + 32, c : c + 32] for r in range(9) for c in range(9)])
    assert (crops == seen["reference"]).all((2, 3, 4)).any(0).all()


def test_records_of_different_networks_are_not_compared(compared: dict[str, xr.DataTree], tmp_path: Path) -> None:
    other = compare(Comparison(model="vgg13", measure="magnitude", rounds=1, width=0.05), tmp_path)[0]
    with pytest.raises(ValueError, match="other cannot be compared with default"):
        protocol_diff({"default": compared["default"], "other": open_run(other)})


def test_events_without_units_are_no_rounds(compared: dict[str, xr.DataTree]) -> None:
    """A look, say, between two prunings; and an accuracy that was not logged is not in the table."""
    run = compared["default"].load()
    events = run["pruning"].to_dataset().assign(kind=("event", ["prune", "prune"]))
    look = events.isel(event=[0]).assign(kind=("event", ["look"]))
    nodes = run.to_dict() | {
        "/pruning": xr.concat([events, look], "event").assign_coords(event=[0, 2, 1]).sortby("event"),
        "/units": run["units"].to_dataset().assign_coords(event=[0, 2]),
        "/epochs": xr.Dataset({"train_loss": ("epoch", [1.0])}, {"epoch": [0]}),
    }
    looked = xr.DataTree.from_dict(nodes)
    xr.testing.assert_equal(protocol_diff({"run": looked}), protocol_diff({"run": run}))
    assert "test accuracy" not in protocol_table({"run": looked})
    only_looks = xr.DataTree.from_dict(nodes | {"/units": nodes["/units"].isel(event=[0]).assign_coords(event=[1])})
    with pytest.raises(MissingQuantityError, match=r"no pruning has units: call event\.units"):
        protocol_diff({"run": only_looks})


@pytest.mark.long
def test_one_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "vgg13", "--measure", "magnitude", "--rounds", "1", "--width", "0.05"]
    assert analysis.__main__.main(["protocol-diff", *small]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[2:]] == [
        "default",
        *sorted({*QUIRKS} - {"select_on_test"}),
        "reference",
    ]
    assert re.search(r"default +75\.\d% +75\.\d%", printed)
    assert analysis.__main__.main(["protocol-diff", "--measure", "magic"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown measure 'magic': choose one of magnitude")
    assert analysis.__main__.main(["protocol-diff", "nowhere.zarr", "--rounds", "2"]) == 2
    assert "--rounds=2 is for a fresh network: give either that or records" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pruned_at", "best"), [([], 0.99), ([0], 0.99), ([10], 0.8), ([10, 15], 0.8), ([10, 20], 0.7)]
)
def test_the_best_epoch_on_the_test_set_counts_only_where_that_is_the_protocol(
    pruned_at: list[int], best: float
) -> None:
    """Among the epochs that end after the last pruning; each has ten steps."""
    epochs = xr.Dataset(
        {"test_accuracy": ("epoch", [0.99, 0.8, 0.7, 0.6]), "step": ("epoch", [10, 20, 30, 40])},
        coords={"epoch": np.arange(4)},
    )
    pruning = xr.Dataset(
        {"step": ("event", pruned_at), "epoch": ("event", [max(step - 1, 0) // 10 for step in pruned_at])}
    )
    accuracies = {}
    for name in ("default", "select_on_test"):
        run = xr.DataTree.from_dict({"epochs": epochs} | ({"pruning": pruning} if pruned_at else {}))
        run.attrs["protocol"] = json.dumps(asdict(PROTOCOLS[name]))
        accuracies[name] = float(epoch_that_counts(run).test_accuracy)
    assert accuracies == {"default": 0.6, "select_on_test": best}


def test_the_best_epoch_counts_in_records_without_steps_too() -> None:
    epochs = xr.Dataset({"test_accuracy": ("epoch", [0.99, 0.8, 0.7, 0.6])}, coords={"epoch": np.arange(4)})
    pruning = xr.Dataset({"epoch": ("event", [0]), "loss": ("event", [1.0])})
    run = xr.DataTree.from_dict({"epochs": epochs, "pruning": pruning})
    run.attrs["protocol"] = json.dumps(asdict(PROTOCOLS["select_on_test"]))
    assert float(epoch_that_counts(run).test_accuracy) == 0.8  # the best of all was before the pruning
    run["pruning"] = pruning.drop_vars("epoch")
    with pytest.raises(MissingQuantityError, match=r"/pruning needs \['epoch'\]"):
        epoch_that_counts(run)


@pytest.mark.parametrize(
    ("name", "protocol", "keeps"),
    [
        ("vgg13", "default", "5% of its filters, at least one,"),
        ("vgg13", "floor_by_index", "the last 5% of its filters, rounded down, and one more,"),
        ("resnet", "reference", "one of its filters,"),
    ],
)
def test_what_every_layer_keeps_is_said_as_it_is(name: str, protocol: str, keeps: str) -> None:
    model, optimizer = trained(name, steps=1)
    with pytest.raises(ValueError, match=f"only \\d+ can be: every layer keeps {keeps} and protected layers keep all"):
        Pruner(model, optimizer, "magnitude", protocol=protocol).prune(0.99)


@pytest.mark.parametrize(("interrupted", "error"), [("floor_by_index", KeyboardInterrupt), (None, FileExistsError)])
def test_half_a_comparison_is_none_but_what_others_wrote_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str | None, error: type[BaseException]
) -> None:
    def rounds(model: nn.Module, batches: list, name: str, comparison: Comparison) -> list:
        (tmp_path / "prune_ties.zarr").mkdir(exist_ok=True)  # somebody else's
        if name == interrupted:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(protocols, "rounds", rounds)
    with pytest.raises(error):
        compare(Comparison(model="vgg13", width=0.05, samples=10), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["prune_ties.zarr"]


@pytest.mark.parametrize("compared", [protocol_diff, protocol_table])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("out/*.zarr", "give runs by label"),
        (["a.zarr", "b.zarr"], "give runs by label"),
        ({}, "no runs: give at least"),
    ],
)
def test_protocols_are_compared_in_runs_by_label(compared: Callable, given: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compared(given)


def test_a_comparison_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="samples must be positive, got 0"):
        Comparison(samples=0)
    (tmp_path / "default.zarr").mkdir()
    with pytest.raises(FileExistsError, match=r"default\.zarr exists already: choose another folder, or remove it"):
        compare(Comparison(), tmp_path)


def test_an_interrupted_comparison_ends_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dynamics.__main__, "compare", interrupted)
    assert dynamics.__main__.main(["protocols", "-o", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted; nothing is kept\n"


def test_protocols_of_trainings_have_the_accuracy_that_counts(compared: dict[str, xr.DataTree]) -> None:
    epochs = xr.Dataset({"test_accuracy": ("epoch", [0.99, 0.5, 0.7, 0.6])}, coords={"epoch": np.arange(4)})
    runs = {}
    for name in ("default", "reference"):
        nodes = compared[name].to_dict()
        pruning = nodes["/pruning"].assign(epoch=("event", [0, 0]))
        runs[name] = xr.DataTree.from_dict(nodes | {"/epochs": epochs, "/pruning": pruning})
    table, last = protocol_table(runs), protocol_diff(runs).isel(event=-1)
    assert table["test accuracy"].to_dict() == {"default": "60.0%", "reference": "70.0%"}
    assert table["reached"].tolist() == [f"{100 * share:.1f}%" for share in last.reached.values]
