"""On a GPU: the same numbers as by hand and as on a processor, nothing changed in the training, no waiting for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from experiments import assert_agree, few_digits, recorded
from networks import Batch, convolutional_network, images, smooth_network, vectors
from prunable import NETWORKS
from test_anyones_loop import MODELS, OPTIMIZERS, trained
from test_captured_curvature import CHANGES, record
from test_experiment_resumes import TINY, killed
from test_recording_is_invisible import CASES, state_after
from torch import Tensor, nn

from dynamics import Recorder, models, open_run
from dynamics.experiments.passes import Passes
from dynamics.experiments.running import run
from dynamics.probing.objective import cross_entropy_objective
from dynamics.probing.probe import Probe
from dynamics.pruning import MEASURES, Pruner
from dynamics.quantities import Vectors

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


def on_gpu(batches: list) -> list:
    """Batches of tensors, there."""
    if isinstance(batches[0], dict):
        return [{name: part.cuda() for name, part in batch.items()} for batch in batches]
    return [tuple(part.cuda() for part in batch) for batch in batches]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, whatever waits for the GPU raises, as far as PyTorch knows of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not all of it is known
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Invisible


@pytest.mark.filterwarnings("ignore:the gradient applied")
@pytest.mark.parametrize("case", CASES)
def test_recording_is_invisible(tmp_path: Path, case: str) -> None:
    with torch.random.fork_rng():
        (without, *random_without), (with_it, *random_with) = (
            (*state_after(case, path, "cuda"), torch.cuda.get_rng_state()) for path in (None, tmp_path / "run")
        )
    assert len(without) == len(with_it)
    for one, other in zip([*without, *random_without], [*with_it, *random_with], strict=True):
        assert torch.equal(one, other)
    assert open_run(tmp_path / "run")["curvature"].sizes["step"] == 5


@pytest.mark.parametrize("case", ["momentum", "nesterov", "adamw fused"])
def test_the_hot_path_does_not_wait_for_the_gpu(tmp_path: Path, case: str) -> None:
    make, step = CASES[case]
    model = convolutional_network().cuda()
    optimizer = make(list(model.parameters()))
    batches = on_gpu(images(8)) * 40  # more than a block of rows
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=0) as recorder:
        step(model, optimizer, batches[0])
        with waiting_is_an_error():
            for batch in recorder.watch(batches):
                step(model, optimizer, batch)
                recorder.log(loss=batch[0].sum())
    assert open_run(tmp_path / "run")["steps"].sizes["step"] == 1 + len(batches)


# Right


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(tmp_path: Path, name: str) -> None:
    model = convolutional_network().cuda()
    optimizer = OPTIMIZERS[name](model.parameters())
    by_hand, losses = trained(
        tmp_path / "run", model, optimizer, on_gpu(images(4)), cross_entropy_objective, curvature_every=1
    )
    by_hand.agrees_with(open_run(tmp_path / "run")["steps"])
    np.testing.assert_allclose(open_run(tmp_path / "run")["curvature"].loss_before, losses, rtol=1e-12)


def test_a_large_network_is_added_up_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamics.quantities._GPU_BLOCKS", 3)
    pieces: list[int] = []
    split = Vectors.split
    monkeypatch.setattr(Vectors, "split", lambda self, blocks: pieces.append(blocks) or split(self, blocks))
    test_every_optimizer(tmp_path, "adam")
    assert set(pieces) == {3}


@pytest.mark.parametrize("name", MODELS)
def test_every_model(tmp_path: Path, name: str) -> None:
    make, batches, loss_of = MODELS[name]
    given, recurrent = on_gpu(batches()), name == "recurrent"
    with torch.device("cuda"), pytest.warns(match="approximate") if recurrent else nullcontext():
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        by_hand, losses = trained(tmp_path / "run", model, optimizer, given, loss_of, curvature_every=1)
    found = open_run(tmp_path / "run")
    by_hand.agrees_with(found["steps"])
    np.testing.assert_allclose(found["curvature"].loss_before, losses, rtol=1e-10)
    np.testing.assert_allclose(found["curvature"].grad_sqnorm, found["steps"].grad_sqnorm, rtol=1e-8, atol=1e-14)
    assert np.isfinite(found["curvature"].grad_hess_grad).all()
    assert (found["curvature"].approximate == recurrent).all()  # a GPU's recurrent layers have no second derivative


def looked_at(path: Path, device: str, batches: list[Batch]) -> None:
    """Train, look in both modes, prune by hand in between."""
    torch.manual_seed(2)
    model = convolutional_network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches = [tuple(part.to(device) for part in batch) for batch in batches]
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        for number, batch in enumerate(recorder.watch(batches)):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            with recorder.event("prune", probe=batches[:2], mode=("train", "eval")[number % 2]), torch.no_grad():
                model[0].weight[number] = 0.0


def test_a_record_is_that_of_a_processor(tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        looked_at(tmp_path / device, device, images(4))
    found, expected = (open_run(tmp_path / device) for device in ("cuda", "cpu"))
    assert_agree(found, expected, ["steps", "curvature", "pruning"])
    assert found.attrs["device"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_scaler_in_half_precision(tmp_path: Path, fused: bool) -> None:
    model, batches = smooth_network().float().cuda(), [(x.float(), y) for x, y in on_gpu(vectors(6))]
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler, norms = torch.amp.GradScaler("cuda", init_scale=1024.0), []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, (inputs, labels) in enumerate(recorder.watch(batches)):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(inputs), labels)
            scaler.scale(loss).backward()
            if number == 2:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer) if not fused else None
            scale = scaler.get_scale() if fused else 1.0
            norms.append(sum(float((p.grad.double() / scale).square().sum()) for p in model.parameters()))
            scaler.step(optimizer)
            scaler.update()
    steps = open_run(tmp_path / "run")["steps"]
    taken = steps.isel(step=steps.skipped.values == 0)
    assert taken.sizes["step"] == 5
    np.testing.assert_allclose(taken.grad_sqnorm.sum("layer"), np.delete(norms, 2), rtol=1e-5)


# In full precision


def test_a_probe_does_not_round_as_the_training_does() -> None:
    torch.backends.cudnn.deterministic = False
    layers = nn.Conv2d(8, 64, 3), nn.Tanh(), nn.Conv2d(64, 64, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64 * 144, 4)
    model, batch = nn.Sequential(*layers).cuda(), (torch.randn(64, 8, 16, 16).cuda(), torch.arange(64).cuda() % 4)
    exact = Probe(model, cross_entropy_objective, [batch], mode="train").expand()
    model.float()
    single = (batch[0].float(), batch[1])
    measured = Probe(model, cross_entropy_objective, [single], mode="train").expand()

    def error(grad: list[Tensor]) -> float:
        pairs = list(zip(grad, exact.grad, strict=True))
        return float(
            sum((one - two).square().sum() for one, two in pairs) / sum(two.square().sum() for _, two in pairs)
        )

    plain = torch.autograd.grad(F.cross_entropy(model(single[0]), single[1]), list(model.parameters()))
    print(f"squared relative error of the gradient: measured {error(measured.grad):.1e}, TF32 {error(plain):.1e}")
    assert error(measured.grad) < 1e-9
    assert error(measured.grad) < error(plain) / 100
    assert torch.backends.cudnn.allow_tf32


# As one graph


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", NETWORKS)
def test_captured_passes_are_the_passes(name: str) -> None:
    torch.manual_seed(1)
    captured, plain = (NETWORKS[name]().cuda() for _ in range(2))
    plain.load_state_dict(captured.state_dict())
    optimizers = [torch.optim.SGD(one.parameters(), 0.05, 0.9, fused=True) for one in (captured, plain)]
    passes = Passes(captured, temperature=5.0)
    pruners = [
        Pruner(one, optimizer, "magnitude") for one, optimizer in zip((captured, plain), optimizers, strict=True)
    ]
    for number in range(8):
        inputs, labels = torch.randn(5 if number == 4 else 8, 1, 32, 32).cuda(), torch.arange(8).cuda() % 4
        labels = labels[: len(inputs)]
        loss, hits = passes(inputs, labels)
        optimizers[1].zero_grad()
        logits = plain(inputs)
        expected = F.cross_entropy(logits / 5.0, labels)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=0)
        assert hits == (logits.argmax(1) == labels).sum()
        torch.testing.assert_close(gradients(captured), gradients(plain), rtol=1e-8, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        if number in (2, 5):
            for pruner in pruners:
                pruner.apply(pruner.plan(number / 10, [(inputs, labels)]))
            passes.forget()
        torch.testing.assert_close(captured.state_dict(), plain.state_dict(), rtol=1e-8, atol=1e-12)


def test_a_capture_draws_no_random_numbers_and_may_be_in_bfloat16() -> None:
    model = NETWORKS["resnet"]().float().cuda()
    before, state = torch.cuda.get_rng_state(), {name: one.clone() for name, one in model.state_dict().items()}
    passes, batch = (
        Passes(model, temperature=1.0, low=True),
        (torch.randn(8, 1, 32, 32).float().cuda(), torch.arange(8).cuda() % 4),
    )
    first, _ = passes(*batch)
    first = first.clone()
    assert torch.equal(torch.cuda.get_rng_state(), before)
    moved = [name for name, one in model.state_dict().items() if not torch.equal(one, state[name])]
    assert moved
    assert all("running" in name or "num_batches" in name for name in moved)
    assert all(int(one) == 1 for name, one in model.state_dict().items() if name.endswith("num_batches_tracked"))
    torch.testing.assert_close(passes(*batch)[0], first, rtol=2e-2, atol=0)


@pytest.mark.parametrize("change", CHANGES)
def test_captured_curvature_is_that_of_the_step(tmp_path: Path, change: Callable[[int, nn.Module], None]) -> None:
    model, other = convolutional_network(), convolutional_network()
    other.load_state_dict(model.state_dict())
    found = record(tmp_path / "captured", model, change, capture=True, device="cuda")
    expected = record(tmp_path / "plain", other, change, capture=False, device="cuda")
    assert_agree(found, expected, ["steps", "curvature"])


# Experiments


@pytest.mark.parametrize("measure", ["none", *MEASURES])
def test_an_experiment_is_that_of_a_processor(tmp_path: Path, measure: str) -> None:
    data, experiment = few_digits(80, 64), replace(TINY, measure=measure, studies=measure == "magnitude")
    found, expected = (
        recorded(tmp_path / f"{device}.zarr", replace(experiment, device=device), data) for device in ("cuda", "cpu")
    )
    nodes = ["curvature"] if measure == "none" else ["curvature", "pruning", "units"]
    first = slice(
        0, 3
    )  # before the first pruning; differences of rounding grow with every step, a thousandfold in nine
    assert_agree({"steps": found["steps"].isel(step=first)}, {"steps": expected["steps"].isel(step=first)}, ["steps"])
    assert_agree(found, expected, ["steps", *nodes], rtol=1e-6)
    np.testing.assert_allclose(found["epochs"].train_loss, expected["epochs"].train_loss, rtol=1e-7)
    assert not np.isnan(found["steps"].loss).any()


def test_a_killed_experiment_goes_on(tmp_path: Path) -> None:
    data, experiment = few_digits(64, 64), replace(TINY, device="cuda")
    whole = recorded(tmp_path / "whole.zarr", experiment, data)
    killed(experiment, tmp_path / "run.zarr", data, 3)
    run(experiment, tmp_path / "run.zarr", data=data, progress=False)
    assert_agree(open_run(tmp_path / "run.zarr"), whole, ["steps", "curvature", "pruning"])


@pytest.mark.parametrize("model", models.MODELS)
def test_measures_of_one_seed_prune_the_same_network(tmp_path: Path, model: str) -> None:
    """Bit for bit, as wide and in the precision in which networks are trained."""
    torch.backends.cudnn.deterministic = False  # the experiment asks for it by itself
    torch.set_default_dtype(torch.float32)
    experiment = replace(TINY, model=model, width=0.5, epochs=(2,), learning_rates=(0.1,), rounds=1, device="cuda")
    found, other = (
        recorded(tmp_path / f"{measure}.zarr", replace(experiment, measure=measure), few_digits(256, 64))
        for measure in ("magnitude", "loss_preservation")
    )
    for name in ("train_loss", "test_loss"):
        assert float(found["epochs"][name][0]) == float(other["epochs"][name][0])


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch's compiler recommends rounding
@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"compile": True}], ids=str)
def test_an_experiment_in_bfloat16_or_compiled(tmp_path: Path, options: dict[str, object]) -> None:
    torch.set_default_dtype(torch.float32)
    found = recorded(tmp_path / "run.zarr", replace(TINY, device="cuda", **options), few_digits(64, 64))
    assert np.isfinite(found["steps"].loss).all()
    alignment = found["curvature"].grad_applied_grad.sum("layer") / np.sqrt(
        found["curvature"].grad_sqnorm.sum("layer") * found["curvature"].applied_grad_sqnorm.sum("layer")
    )
    assert (alignment > 0.8).all()
