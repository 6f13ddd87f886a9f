"""What the recorder says of a loop is what a plain computation beside the loop says."""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from networks import (
    all_but_row,
    attention_network,
    closure_step,
    convolutional_network,
    dense,
    flat,
    images,
    plain_step,
    prune_row,
    recorded,
    smooth_network,
    vectors,
)
from torch import Tensor, nn
from torch.nn.utils import prune

from dynamics import Recorder, open_run
from dynamics.curvature.expansion import Expansion
from dynamics.measuring.step import Measurement
from dynamics.network.layers import Layers
from dynamics.pruning import Pruner
from dynamics.quantities import Vectors


def test_clipping_is_seen_in_the_steps_and_not_in_the_curvature(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    applied, raw = [], []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            raw.append(flat([p.grad for p in model.parameters()]).square().sum())
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            applied.append(flat([p.grad for p in model.parameters()]).square().sum())
            optimizer.step()
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), applied, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm.sum("layer"), raw, rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].applied_grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-12)
    np.testing.assert_allclose(
        run["curvature"].grad_applied_grad.sum("layer"), np.sqrt(np.multiply(raw, applied)), rtol=1e-12
    )  # clipping shortens and does not turn


def test_a_closure_is_measured_at_its_first_return(tmp_path: Path) -> None:
    model, batches, first = smooth_network(), vectors(3), []
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(batches):
            grads = []

            def closure(inputs: Tensor = inputs, labels: Tensor = labels, grads: list[Tensor] = grads) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                grads.append(flat([p.grad for p in model.parameters()]).square().sum())
                return loss

            optimizer.step(closure)
            first.append(grads[0])
            assert len(grads) > 1
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].grad_sqnorm.sum("layer"), first, rtol=1e-12)


STEPS: dict[str, tuple[Callable[[Iterable[Tensor]], torch.optim.Optimizer], Callable[..., Tensor]]] = {
    "sgd": (lambda theta: torch.optim.SGD(theta, 0.1), plain_step),
    "momentum": (lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9, weight_decay=0.1), plain_step),
    "nesterov": (lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9, nesterov=True, foreach=True), plain_step),
    "adam fused": (lambda theta: torch.optim.Adam(theta, 0.01, fused=True), plain_step),
    "adamw": (lambda theta: torch.optim.AdamW(theta, 0.01), plain_step),
    "closure": (lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9), partial(closure_step, by_name=True)),
    "lbfgs": (lambda theta: torch.optim.LBFGS(theta, 0.1, max_iter=3), partial(closure_step, by_name=True)),
}


@pytest.mark.parametrize("case", STEPS)
def test_gradient_and_update_are_those_of_the_step(tmp_path: Path, case: str) -> None:
    make, step = STEPS[case]
    model = smooth_network()
    optimizer = make(model.parameters())
    expected = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(vectors(4)):
            theta, grad, hessian = dense(model, batch)
            loss_before = F.cross_entropy(model(batch[0]), batch[1]).item()
            step(model, optimizer, batch)
            update = flat(list(model.parameters())) - theta
            loss_after = F.cross_entropy(model(batch[0]), batch[1]).item()
            products = (grad @ grad, grad @ update, update @ update, update @ hessian @ update)
            expected.append([*(product.item() for product in products), loss_before, loss_after])
    run = open_run(tmp_path / "run")
    steps, curvature = (run[node].to_dataset().sum("layer") for node in ("steps", "curvature"))
    found = [steps.grad_sqnorm, steps.grad_update, steps.update_sqnorm, curvature.update_hess_update]
    losses = [run["curvature"].loss_before, run["curvature"].loss_after]
    np.testing.assert_allclose(np.transpose([*found, *losses]), expected, rtol=1e-10)


def test_a_closure_that_failed_leaves_nothing_to_the_next_step(tmp_path: Path) -> None:
    model, (batch,), first = smooth_network(), vectors(1), []
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)

    def step(fails_at: int) -> None:
        grads = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            grads.append(flat([p.grad for p in model.parameters()]).square().sum().item())
            if len(grads) == fails_at:
                raise RuntimeError("out of memory")
            return loss

        try:
            optimizer.step(closure)
        finally:
            first.append(grads[0])

    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0):
        step(fails_at=0)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(fails_at=3)
        step(fails_at=0)
    found = open_run(tmp_path / "run")["steps"].grad_sqnorm.sum("layer").values
    np.testing.assert_allclose(found, [first[0], first[2]], rtol=1e-12)
    assert not np.isclose(first[1], first[2])


def test_micro_batches_count_by_their_samples(tmp_path: Path) -> None:
    model, (whole,) = smooth_network(), vectors(1)
    parts = list(zip(*(tensor.split([5, 11]) for tensor in whole), strict=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    theta, grad, hessian = dense(model, whole)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(parts):
            (F.cross_entropy(model(inputs), labels, reduction="sum") / 16).backward()
        optimizer.step()
    update = flat(list(model.parameters())) - theta
    total = open_run(tmp_path / "run")["curvature"].to_dataset().isel(step=0).sum("layer")
    np.testing.assert_allclose(total.grad_sqnorm, grad @ grad, rtol=1e-12)
    np.testing.assert_allclose(total.grad_hess_grad, grad @ hessian @ grad, rtol=1e-11)
    np.testing.assert_allclose(total.param_hess_grad, theta @ hessian @ grad, rtol=1e-11)
    np.testing.assert_allclose(total.update_hess_update, update @ hessian @ update, rtol=1e-11)


def test_a_gradient_scalers_factor_is_taken_out(tmp_path: Path) -> None:
    model, batches, expected = smooth_network(), vectors(3), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)  # only fused steps see the scaled gradient
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            expected.append(dense(model, batch)[1].square().sum().item())
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(batch[0]), batch[1])).backward()
            if number == 1:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.skipped.values.tolist() == [0, 1, 0]
    np.testing.assert_allclose(steps.grad_sqnorm.sum("layer")[::2], expected[::2], rtol=1e-12)
    np.testing.assert_allclose(steps.update_sqnorm.sum("layer"), [0.01 * expected[0], 0, 0.01 * expected[2]])


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(inputs))))


def test_a_shared_weight_counts_once_in_the_first_of_its_layers(tmp_path: Path) -> None:
    model, (batch,) = Tied(), vectors(1)
    theta, grad, hessian = dense(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    curvature = recorded(tmp_path / "run", model, optimizer, [batch], curvature_every=1)["curvature"].isel(step=0)
    assert curvature.layer.values.tolist() == ["first", "second", "head"]
    sizes = [20, 4, 15]
    for name, values in (("grad_sqnorm", grad * grad), ("param_hess_grad", theta * (hessian @ grad))):
        np.testing.assert_allclose(curvature[name], [part.sum() for part in values.split(sizes)], rtol=1e-10)


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(batches)):
            loss = F.cross_entropy(model(inputs), labels) / 3
            loss.backward()
            losses.append(loss.item())
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    run = open_run(tmp_path / "run")
    assert run["steps"].step.values.tolist() == [0, 1]
    np.testing.assert_allclose(run["curvature"].loss_before, np.reshape(losses, (2, 3)).sum(1), rtol=1e-12)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-12)


def test_the_probe_sees_the_steps_own_dropout_mask(tmp_path: Path) -> None:
    model, batches, losses = convolutional_network(dropout=0.5), images(4), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            losses.append(plain_step(model, optimizer, batch).item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_frozen_unused_and_tied_parameters(tmp_path: Path) -> None:
    model = smooth_network()
    model[0].bias.requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    model.twin = model[2]  # the same module twice: counted once
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    batches = vectors(2)
    model.forward = lambda inputs: model[2](model[1](model[0](inputs)))
    steps = recorded(tmp_path / "run", model, optimizer, batches, curvature_every=1)["steps"]
    assert steps.layer.values.tolist() == ["0", "2", "unused"]
    assert steps.grad_sqnorm.sel(layer="unused").values.tolist() == [0, 0]
    np.testing.assert_allclose(
        steps.param_sqnorm.sel(layer="unused"), flat(list(model.unused.parameters())).norm() ** 2
    )
    weight = model[0].weight.grad
    np.testing.assert_allclose(steps.grad_sqnorm.sel(layer="0")[-1], (weight**2).sum(), rtol=1e-12)


def test_layers_that_an_optimizer_takes_on_and_gives_up_are_recorded_as_it_holds_them(tmp_path: Path) -> None:
    """As where a network is thawed from its head on."""
    model = smooth_network()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    by_hand, rates = ByHand(model), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(vectors(6))):
            if number == 2:
                optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.05})
            if number == 4:
                del optimizer.param_groups[0]
            model.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            by_hand.before([one for group in optimizer.param_groups for one in group["params"]])
            optimizer.step()
            by_hand.after()
            rates.append([0.05 * (number >= 2), 0.1 * (number < 4)])
    run = open_run(tmp_path / "run")
    by_hand.agrees_with(run["steps"])
    assert run["steps"].learning_rate.values.tolist() == rates
    np.testing.assert_allclose(run["curvature"].applied_grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-10)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("announce", ["watch", "observe", "nothing"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_logged_scalars_join_their_own_step(tmp_path: Path, every: int, announce: str, when: str) -> None:
    model, batches = smooth_network(), vectors(7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, every=every, curvature_every=0) as recorder:
        for number, batch in enumerate(recorder.watch(batches) if announce == "watch" else batches):
            if announce == "observe":
                recorder.observe(batch)
            if when == "before":
                recorder.log(loss=torch.tensor(float(number)), number=number)
            plain_step(model, optimizer, batch)
            if when == "after":
                recorder.log(loss=torch.tensor(float(number)), number=number)
    steps = open_run(tmp_path / "run")["steps"]
    assert steps.step.values.tolist() == list(range(0, 7, every))
    assert steps.loss.values.tolist() == steps.step.values.tolist()
    assert steps.number.values.tolist() == steps.step.values.tolist()


def test_cadence_epochs_and_flow_time(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.75)
    with Recorder(tmp_path / "run", model, optimizer, every=2, curvature_every=3) as recorder:
        watched = recorder.watch(batches)
        assert len(watched) == 4
        for _ in range(2):
            for batch in watched:
                plain_step(model, optimizer, batch)
        assert "8 steps, 2 layers" in repr(recorder)
    run = open_run(tmp_path / "run")
    assert run["steps"].step.values.tolist() == [0, 2, 4, 6]
    assert run["steps"].epoch.values.tolist() == [0, 0, 1, 1]
    assert run["curvature"].step.values.tolist() == [0, 3, 6]
    np.testing.assert_allclose(run["steps"].flow_step, 0.4)
    np.testing.assert_allclose(run["steps"].flow_time, [0, 0.8, 1.6, 2.4])


def test_one_step_of_one_layer_is_no_plural(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        assert repr(recorder).endswith("run: recording, 0 steps, 1 layer>")
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert repr(recorder).endswith("run: closed, 1 step, 1 layer>")


def test_nothing_of_second_order_is_computed_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("a Hessian product that nobody asked for")

    monkeypatch.setattr(Expansion, "hessian_product", refuse)
    monkeypatch.setattr("dynamics.probing.probe.gated_products", refuse)
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wanted = ["grad_sqnorm", "loss_before", "loss_after"]
    run = recorded(tmp_path / "run", model, optimizer, vectors(2), curvature_every=1, quantities=wanted)
    assert set(run["steps"].data_vars) == {"grad_sqnorm", "epoch"}
    assert set(run["curvature"].data_vars) == set(wanted)
    with pytest.raises(UserWarning, match="nobody asked"):
        recorded(tmp_path / "other", model, optimizer, vectors(1), quantities=["grad_hess_grad"])


def test_where_measuring_steps_fails_curvature_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def fail(*arguments: object) -> None:
        raise MemoryError("no more")

    with (
        pytest.warns(match="from step 2 on: .*no more") as said,
        Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder,
    ):
        for number, batch in enumerate(recorder.watch(vectors(4))):
            if number == 2:
                monkeypatch.setattr(Measurement, "take_update", fail)
            plain_step(model, optimizer, batch)
    assert len(said) == 1
    run = open_run(tmp_path / "run")
    assert run["steps"].step.values.tolist() == run["curvature"].step.values.tolist() == [0, 1]


def test_dictionary_batches_and_own_objectives(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [{"x": inputs, "y": labels} for inputs, labels in vectors(2)]

    def objective(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"]) + model[0].weight.square().sum()

    losses = []
    with Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            optimizer.zero_grad()
            loss = objective(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_an_objective_that_fails_costs_the_curvature_and_not_the_training(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def objective(model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    with (
        pytest.warns(UserWarning, match=r"from step 0 on: the objective failed .* Recorder\(\.\.\., objective="),
        Recorder(tmp_path / "run", model, optimizer, objective=objective, curvature_every=2) as recorder,
    ):
        for batch in recorder.watch(batches):
            plain_step(model, optimizer, batch)
    run = open_run(tmp_path / "run")
    assert run["steps"].sizes["step"] == 5
    assert "step" not in run["curvature"].sizes


def test_an_optimizer_that_goes_on_with_parameters_that_came_later_is_not_said_to_train_nothing(tmp_path: Path) -> None:
    """As where adapters are put in, and trained alone from then on."""
    model, batches = smooth_network(), vectors(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=0):
        plain_step(model, optimizer, batches[0])
        model.requires_grad_(False)
        model.append(nn.Linear(3, 3))
        optimizer.param_groups[0]["params"] = list(model[-1].parameters())
        with pytest.warns(UserWarning, match="added after recording began") as said:
            for batch in batches[1:]:
                plain_step(model, optimizer, batch)
    assert len(said) == 1


def test_an_optimizer_whose_parameters_were_replaced_is_named_once(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run.zarr", model, optimizer, curvature_every=0) as recorder:
        plain_step(model, optimizer, batches[0])
        model.load_state_dict(smooth_network().state_dict(), assign=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.warns(UserWarning, match="no longer holds any of the model's parameters") as said:
            for batch in batches[1:]:
                plain_step(model, optimizer, batch)
        assert len(said) == 1
        assert recorder.failure is None
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())  # it did train nothing
    run = open_run(tmp_path / "run.zarr")
    assert (run.steps.update_sqnorm.sum("layer").values > 0).tolist() == [True, False, False]


def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model, path = smooth_network(), tmp_path / "run"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    copied = torch.optim.SGD(smooth_network().parameters(), 0.1)
    other = torch.optim.SGD([*smooth_network().parameters()][:1], 0.1)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        Recorder(path, "model", optimizer)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer or a list of them, got float$"):
        Recorder(path, model, 0.1)
    with pytest.raises(TypeError, match="objective must be a function"):
        Recorder(path, model, optimizer, objective=1)
    with pytest.raises(ValueError, match="got 0 and 64"):
        Recorder(path, model, optimizer, every=0)
    with pytest.raises(ValueError, match="holds none of the model's parameters: pass the optimizer that trains"):
        Recorder(path, model, other)
    with pytest.raises(ValueError, match="but others of the same shapes: pass the model that the optimizer was"):
        Recorder(path, model, copied)
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device and has no values yet"):
        Recorder(path, smooth_network().to("meta"), optimizer)
    with pytest.raises(ValueError, match=r"unknown quantities \['norm'\]: choose from \['"):
        Recorder(path, model, optimizer, quantities=["norm"])
    assert not list(tmp_path.iterdir())
    assert not optimizer._optimizer_step_pre_hooks
    with Recorder(path, model, optimizer, curvature_every=0) as recorder:
        with pytest.raises(ValueError, match=r"'loss' has shape \(2,\)"):
            recorder.log(loss=torch.zeros(2))
        with pytest.raises(ValueError, match="cannot take 'grad_sqnorm'"):
            recorder.log(grad_sqnorm=1.0)
        recorder.log(test_accuracy=0.5)  # of an epoch, or of a step
        with pytest.raises(ValueError, match="cannot take the name 'val/loss'"):
            recorder.log(**{"val/loss": 1.0})
        with pytest.raises(ValueError, match=r"log_epoch\(\) takes numbers, but 'note' is 'good'"):
            recorder.log_epoch(note="good")
        with pytest.raises(ValueError, match=r"log_epoch\(\) cannot take 'epoch'"):
            recorder.log_epoch(epoch=3)
        model(vectors(1)[0][0]).square().mean().backward()
        optimizer.step()
        for value in (10**400, 1j, torch.tensor(1j), torch.tensor(1.0, device="meta")):  # no float in memory
            with pytest.raises(ValueError, match=r"log\(\) takes real numbers, but 'a'"):
                recorder.log(a=value)
            with pytest.raises(ValueError, match=r"log_epoch\(\) takes numbers, but 'a'"):
                recorder.log_epoch(a=value)
            with pytest.raises(ValueError, match=r"event\(\) takes numbers and strings, but 'a'"):
                with recorder.event("look", probe=vectors(1), a=value):
                    pass
    assert open_run(path)["steps"].sizes["step"] == 1


def test_a_frozen_layer_has_no_gradient_in_the_curvature_either(tmp_path: Path) -> None:
    model, batches = smooth_network(), vectors(1)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), 1e-3)
    run = recorded(tmp_path / "run", model, optimizer, batches, curvature_every=1)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-12)
    assert run["curvature"].grad_hess_grad.sel(layer="0").values.tolist() == [0]
    assert run["curvature"].grad_hess_grad.sel(layer="2").values[0] != 0


def test_a_broken_off_pass_leaves_no_batch_behind(tmp_path: Path) -> None:
    model, batches, losses = smooth_network(), vectors(3), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        watched = recorder.watch(batches)
        for _ in watched:
            break
        for batch in watched:
            losses.append(plain_step(model, optimizer, batch).item())
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_sums_in_low_precision_are_right(dtype: torch.dtype) -> None:
    theta = torch.randn(3_000_000).to(dtype)
    layers = Layers(nn.ParameterList([theta]))
    found = layers.evaluate(["param_sqnorm"], Vectors(theta=layers.theta(layers.zeros()).blocks))["param_sqnorm"]
    exact = theta.to(torch.complex128).abs().square().sum()
    torch.testing.assert_close(found, exact[None], rtol=1e-7, atol=0)


def test_attention_has_curvature(tmp_path: Path) -> None:
    model = attention_network()
    optimizer, batches = torch.optim.SGD(model.parameters(), 0.01), vectors(2)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for batch in recorder.watch(batches):
            plain_step(model, optimizer, batch)
        with recorder.event("look", probe=batches):
            pass
    run = open_run(tmp_path / "run")
    assert run["curvature"].sizes["step"] == 2
    np.testing.assert_allclose(run["pruning"].loss[:, 0], run["pruning"].loss[:, 1], rtol=1e-14)


def test_an_event_sees_one_dropout_mask(tmp_path: Path) -> None:
    model, batches = convolutional_network(dropout=0.5), images(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer) as recorder:
        with recorder.event("look", probe=batches, mode="train"):
            torch.rand(3)
    loss = open_run(tmp_path / "run")["pruning"].loss.values[0]
    assert loss[0] == loss[1]


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_micro_batches_log_is_averaged(tmp_path: Path, when: str) -> None:
    model, batches, losses = smooth_network(), vectors(6), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(batches)):
            loss = F.cross_entropy(model(inputs), labels)
            (loss / 3).backward()
            losses.append(loss.item())
            if when == "before":
                recorder.log(loss=loss)
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            if when == "after":
                recorder.log(loss=loss)
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].loss, np.reshape(losses, (2, 3)).mean(1), rtol=1e-12)


# Events


class Masked(nn.Linear):
    """As many write pruning: a mask in a buffer, or in an attribute."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones_like(self.weight))
        self.other = torch.ones_like(self.weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight * self.mask * self.other, self.bias)


def mask_in_place(layer: Masked, kept: torch.Tensor) -> None:
    layer.mask.copy_(kept)


def replace_the_mask(layer: Masked, kept: torch.Tensor) -> None:
    layer.other = kept.to(layer.weight.dtype)


@pytest.mark.parametrize("mask", [mask_in_place, replace_the_mask])
def test_an_event_sees_what_changes_in_buffers_and_attributes(tmp_path: Path, mask: Callable) -> None:
    model = nn.Sequential(Masked(4, 6), nn.Tanh(), nn.Linear(6, 3))
    batches = [(x[:size], y[:size]) for (x, y), size in zip(vectors(2), (5, 3), strict=True)]
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    losses = []
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
        losses.append(F.cross_entropy(model(inputs), labels).item())
        with pytest.warns(UserWarning, match="a mask that the forward pass itself applies is not seen") as said:
            with recorder.event("prune", probe=batches):
                mask(model[0], all_but_row(model[0].weight.shape, 1))
        assert said[0].filename == __file__
        losses.append(F.cross_entropy(model(inputs), labels).item())
    assert losses[0] != losses[1]
    np.testing.assert_allclose(open_run(tmp_path / "run")["pruning"].loss[0], losses, rtol=1e-12)


def test_an_event_predicts_from_the_network_before_whatever_replaces_its_parts(tmp_path: Path) -> None:
    rows = []
    batches = [(x[:size], y[:size]) for (x, y), size in zip(vectors(2), (5, 3), strict=True)]
    for name, take in {
        "by hand": lambda layer, kept: layer.weight.data.mul_(kept),
        "torch's": lambda layer, kept: prune.custom_from_mask(layer, "weight", kept),
    }.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        with Recorder(tmp_path / name, model, torch.optim.SGD(model.parameters(), 0.1)) as recorder:
            with recorder.event("zero", probe=batches):
                take(model[0], all_but_row(model[0].weight.shape, 1))
            assert hasattr(model[0], "weight_mask") == (name == "torch's")
        rows.append(open_run(tmp_path / name)["pruning"].to_dataset().isel(event=0))
    for quantity in ("loss", "grad_removal", "removal_hess_removal"):
        np.testing.assert_allclose(rows[1][quantity], rows[0][quantity], rtol=1e-10, atol=1e-15, err_msg=quantity)
    assert float(abs(rows[0].removal_hess_removal).sum()) > 0


def test_a_pruning_of_something_else_is_said(tmp_path: Path) -> None:
    model, probe = smooth_network(), vectors(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        said = "the pruning before step 0 changed no parameter.* predictions are 0: prune the model that"
        with pytest.warns(UserWarning, match=said) as warned:
            with recorder.event("prune", probe=probe, target=0.5), torch.no_grad():
                copy.deepcopy(model)[0].weight[0] = 0
        assert warned[0].filename == __file__
        with recorder.event("prune", probe=probe, target=0):
            pass  # nothing was asked for
        with pytest.warns(UserWarning, match=r"step 0 set 4 parameters to zero without a mask.* apply_masks") as warned:
            with recorder.event("prune", probe=probe, target=0.2), torch.no_grad():
                model[0].weight[0] = 0
        assert warned[0].filename == __file__
        with recorder.event("prune", probe=probe, target=0.2):  # which moves nothing that was zero already
            prune_row(model, "0.weight", 0)
    sqnorm = open_run(tmp_path / "run")["pruning"].param_sqnorm.sum("layer")
    assert (sqnorm[:, 0] != sqnorm[:, 1]).values.tolist() == [False, False, True, False]
    assert open_run(tmp_path / "run")["pruning"].removed.sum("layer").values.tolist() == [0, 0, 0, 4]


def test_a_round_in_which_no_filter_was_to_go_is_no_pruning_of_something_else(tmp_path: Path) -> None:
    """Of few filters a round's share comes to none."""
    model, probe = smooth_network(), vectors(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner, reached = Pruner(model, optimizer, "magnitude"), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        for share in (0.05, 0.2, 0.25):
            pruning = pruner.plan(share)
            with recorder.event("prune", probe=probe, **pruning.attributes):
                pruner.apply(pruning)
            reached.append(pruning.sparsity)
        with pytest.warns(UserWarning, match="changed no parameter"):
            with recorder.event("prune", probe=probe, target=0.5, sparsity=0.4):
                pass
    assert reached == pytest.approx([0, 0.2, 0.2])


def test_what_was_pruned_before_the_record_began_may_be_all_that_a_pruning_removes(tmp_path: Path) -> None:
    model, probe = smooth_network(), vectors(1)
    pruner = Pruner(model, None, "magnitude")
    pruner.prune(0.4)
    with Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), curvature_every=0) as recorder:
        pruning = pruner.plan(0.4)
        with pytest.warns(UserWarning, match="unless it had all been pruned before, prune the model"):
            with recorder.event("prune", probe=probe, **pruning.attributes):
                pruner.apply(pruning)


def test_steps_inside_an_event_lie_before_it_ends(tmp_path: Path) -> None:
    """Also the last, of one of two optimizers."""
    model, batches = smooth_network(), vectors(3)
    optimizers = [torch.optim.SGD(model[layer].parameters(), 0.1) for layer in (0, 2)]
    with Recorder(tmp_path / "run", model, optimizers, curvature_every=0) as recorder:
        with recorder.event("tune", probe=batches):
            for number, batch in enumerate(batches):
                recorder.observe(batch)
                plain_step(model, optimizers[number % 2], batch)
    run = open_run(tmp_path / "run")
    assert run["steps"].step.values.tolist() == [0, 1, 2]
    assert run["pruning"].step.values.tolist() == [3]


def test_what_describes_an_event_or_an_epoch_is_kept_or_refused_at_once(tmp_path: Path) -> None:
    model = smooth_network()
    optimizer, probe = torch.optim.SGD(model.parameters(), 0.1), vectors(1)
    five = torch.ones(5, dtype=torch.bool)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        loss = F.cross_entropy(model(probe[0][0]), probe[0][1])
        recorder.log_epoch(one=torch.tensor([0.5]), with_a_graph=loss)
        with recorder.event("look", probe=probe, number=loss, text="a") as event:
            with pytest.raises(ValueError, match=r"one score per filter.*\(5,\), \(3,\)"):
                event.units(alive={"0": five}, scores={"0": torch.ones(3)})
            with pytest.raises(ValueError, match=r"layer '2' has 3 filters, got 5 booleans"):
                event.units(alive={"0": five, "2": five})
            assert repr(event) == "<Event: nothing added>"
            event.units(alive={"0": five, "2": [1, 0, 1]})
            assert repr(event) == "<Event: units added>"
        for name, value in (("number", "two"), ("text", 1.0)):
            with pytest.raises(ValueError, match=f"event\\(\\) takes '{name}' as a"), recorder.event(
                "look", probe=probe, **{name: value}
            ):  # fmt: skip
                pass
        with recorder.event("look", probe=probe, number=2) as event:
            with pytest.raises(ValueError, match=r"the same (units|filters) in all events"):
                event.units(alive={"0": five})
            event.units(alive={"2": torch.ones(3), "0": ~five})
        plain_step(model, optimizer, probe[0])
    run = open_run(tmp_path / "run")
    assert run["epochs"].one.values.tolist() == [0.5]
    assert run["pruning"].number.values.tolist() == pytest.approx([loss.item(), 2.0])
    assert run["units"].alive.values.tolist() == [[True] * 6 + [False, True], [False] * 5 + [True] * 3]
    assert run["steps"].sizes["step"] == 1
