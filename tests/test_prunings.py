"""Only prunings count as prunings, and what they leave is a share of the network that there was at first."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from synthetic_runs import record
from torch import nn

import analysis
from analysis import STATISTICS, findings
from analysis.convergence import last_pruning
from analysis.effect import effect_of_prunings
from analysis.prunings import event_steps, in_epochs, in_steps, prunings
from dynamics import Recorder, open_run
from dynamics.pruning import Pruner, shrink

BATCHES = [(torch.randn(16, 1, 8, 8), torch.randint(3, (16,))) for _ in range(4)]


def network() -> nn.Sequential:
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 3)
    return nn.Sequential(*layers).float()


def train(
    path: Path, *, at: dict[int, float], smaller: bool = False, look: bool = False, counted: bool = True
) -> tuple[xr.DataTree, int]:
    """Four epochs of four steps, pruned before some of the steps; the record, and the parameters in the end."""
    torch.manual_seed(0)
    batches = [(x.float(), y) for x, y in BATCHES]
    model = network()
    optimizer, step = torch.optim.SGD(model.parameters(), 0.05), 0
    with Recorder(path, model, optimizer, attributes={"model": "m", "data": "d", "seed": 0}) as recorder:
        for epoch in range(4):
            for x, y in recorder.watch(batches):
                if step in at:
                    pruning = Pruner(model, optimizer, "magnitude").plan(at[step], batches if counted else None)
                    with recorder.event("prune", probe=batches[:1], **pruning.attributes) as event:
                        Pruner(model, optimizer, "magnitude").apply(pruning)
                        event.units(alive=pruning.alive)
                    if smaller:
                        shrink(model, optimizer, batches[0][0])
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                step += 1
            recorder.log_epoch(test_accuracy=0.5)
            if look and epoch == 2:
                with recorder.event("drop lr", probe=batches[:1]):
                    optimizer.param_groups[0]["lr"] /= 10
    return open_run(path), sum(parameter.numel() for parameter in model.parameters())


def test_an_event_that_removes_nothing_is_no_pruning(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole", at={}, look=True)
    pruned, _ = train(tmp_path / "pruned", at={4: 0.3, 8: 0.5}, look=True)
    only, _ = train(tmp_path / "only", at={4: 0.3, 8: 0.5})
    table = analysis.conditions({"whole": whole, "pruned": pruned})
    assert table.loc["whole", ["measure", "rounds", "sparsity"]].tolist() == ["none", 0, 0.0]
    assert table.loc["pruned", ["measure", "rounds", "sparsity"]].tolist() == ["magnitude", 2, 0.5]
    assert (event_steps(pruned), in_steps(pruned), in_steps(whole)) == ([4, 8, 12], ([4, 8], [12]), ([], [12]))
    assert (last_pruning(pruned), last_pruning(whole)) == (8, 0)
    for name, statistic in STATISTICS.items():
        if name not in ("training_area", "accuracy"):
            assert statistic(pruned) == pytest.approx(statistic(only), rel=1e-6)
            with pytest.raises(analysis.MissingQuantityError):
                statistic(whole)
    assert float(analysis.outcome(whole).removed_multiply_adds) == 0
    assert analysis.outcome(pruned).equals(analysis.outcome(only))
    assert analysis.pruning_effect(pruned).kind.values.tolist() == ["prune", "prune"]
    assert analysis.removed_decrease(pruned).sizes["event"] == 2
    with pytest.raises(analysis.MissingQuantityError, match="moved a parameter"):
        analysis.pruning_effect(whole)


def test_other_events_are_no_part_of_how_well_prunings_are_predicted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, probe = network(), [(x.float(), y) for x, y in BATCHES[:1]]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def noise(recorder: Recorder) -> None:
        with recorder.event("noise", probe=probe), torch.no_grad():
            model[0].weight += 0.1 * torch.randn_like(model[0].weight)

    with Recorder(tmp_path / "noise", model, optimizer) as recorder:
        noise(recorder)
    with Recorder(tmp_path / "both", model, optimizer) as recorder:
        noise(recorder)
        with recorder.event("prune", probe=probe):
            Pruner(model, optimizer, "magnitude").prune(0.3)
    alone, both = (open_run(tmp_path / name) for name in ("noise", "both"))
    assert analysis.pruning_effect(both).kind.values.tolist() == ["noise", "prune"]
    for run, kind, said in ((alone, "noise", "n = 1 event."), (both, "prune", "n = 1 pruning, removing")):
        assert effect_of_prunings(run).kind.values.tolist() == [kind]
        relation = f"effect of {'pruning' if kind == 'prune' else 'events'} on the loss"
        assert analysis.agreement(run).sel(relation=relation)["count"].values.tolist() == [1, 1]
        assert said in findings.effect_prediction({"run": run})


def test_how_many_filters_went_is_not_known_where_no_event_says_it(tmp_path: Path) -> None:
    model, probe = network(), [(x.float(), y) for x, y in BATCHES[:1]]
    with Recorder(tmp_path / "run", model, optimizer := torch.optim.SGD(model.parameters(), 0.05)) as recorder:
        with recorder.event("prune", probe=probe):
            Pruner(model, optimizer, "magnitude").prune(0.6, probe)
        recorder.log_epoch(test_accuracy=0.5)
    run = open_run(tmp_path / "run")
    found = analysis.outcome(run)
    assert float(found.removed_parameters) > 0.3
    assert np.isnan([found.sparsity, found.removed_multiply_adds]).all()
    assert analysis.outcome_table({"run": run}).loc["run", "filters pruned"] == "–"
    assert findings.final_accuracy({"run": run}).startswith("Final test accuracy of the pruned networks")


def test_what_removed_something_is_a_pruning_whatever_it_is_called() -> None:
    removed, kind = [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], ["mine", "prune", "look"]
    events = {"removed": (("event", "layer"), removed), "kind": ("event", kind), "step": ("event", [1, 2, 3])}
    for names, expected in ((["removed", "kind"], [0, 1]), (["removed"], [0]), (["kind"], [1]), (["step"], [0, 1, 2])):
        run = xr.DataTree.from_dict({"/pruning": xr.Dataset({name: events[name] for name in names})})
        assert prunings(run).tolist() == expected
    assert prunings(xr.DataTree()).tolist() == []


def test_of_a_network_made_smaller_all_that_is_gone_counts(tmp_path: Path) -> None:
    run, left = train(tmp_path / "run", at={4: 0.4, 8: 0.5}, smaller=True)
    filters = int(run["units"].alive.values[-1].sum())
    found = analysis.outcome(run)
    assert float(found.removed_parameters) == pytest.approx(1 - left / sum(p.numel() for p in network().parameters()))
    assert float(found.sparsity) == 1 - filters / 20
    assert 0.6 < float(found.sparsity) < 0.8
    adds = [36 * 9 * 8 + 16 * 72 * 12 + 3 * 192, run["pruning"].multiply_adds_left.values[-1]]
    assert float(found.removed_multiply_adds) == pytest.approx(1 - adds[1] / adds[0])
    assert analysis.conditions({"run": run}).sparsity.item() == pytest.approx(1 - 0.6 * 0.5)
    nodes = run.to_dict()
    del nodes["/units"]
    assert float(analysis.outcome(xr.DataTree.from_dict(nodes)).sparsity) == pytest.approx(1 - filters / 20)


def test_so_it_is_where_parameters_were_not_counted(tmp_path: Path) -> None:
    run, left = train(tmp_path / "run", at={4: 0.4, 8: 0.5}, smaller=True, counted=False)
    assert "dense_parameters" not in run["pruning"]
    masked = float(run["pruning"].remaining.sum("layer").values[-1, 1])
    found = analysis.outcome(run)
    assert float(found.removed_parameters) == 1 - masked / sum(p.numel() for p in network().parameters())
    assert masked >= left
    assert analysis.conditions({"run": run}).sparsity.item() == pytest.approx(1 - 0.6 * 0.5)


def test_a_pruning_stands_where_it_was_among_the_epochs(tmp_path: Path) -> None:
    run, _ = train(tmp_path / "run", at={0: 0.2, 4: 0.3, 6: 0.4, 13: 0.5})
    assert in_epochs(run) == ([0, 1, 1.5, 3.25], [])
    old = record("magnitude", 0)
    assert in_epochs(old) == ([], [])
    nodes = old.to_dict()
    nodes["/pruning"] = nodes["/pruning"].assign(epoch=("event", np.array([0])))
    assert in_epochs(xr.DataTree.from_dict(nodes)) == ([1], [])  # right after the first epoch was logged
