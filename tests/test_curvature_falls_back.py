"""Where gates fail, Hessian products take their place: without a word for the known reason, with one for any other."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import recorded, smooth_network, vectors
from torch import nn

from dynamics import Recorder, open_run
from dynamics.loop.logged_loss import LoggedLoss

KNOWN = "derivative for aten::_thnn_fused_lstm_cell_backward is not implemented"


@pytest.mark.parametrize("reason", [KNOWN, "the shapes do not fit"])
def test_what_the_gates_cannot_do_is_done_by_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, reason: str
) -> None:
    found = []
    for name in ("gates", "products"):
        torch.manual_seed(0)
        model = smooth_network()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if name == "products":
            monkeypatch.setattr("dynamics.probing.probe.gated_products", fail(reason))
        found.append(recorded(tmp_path / name, model, optimizer, vectors(3), curvature_every=1)["curvature"])
    for variable, expected in found[0].data_vars.items():
        np.testing.assert_allclose(found[1][variable], expected, rtol=1e-9, atol=1e-14, err_msg=variable)
    said = [str(one.message) for one in recwarn]
    assert len(said) == (0 if reason == KNOWN else 1)
    assert all(
        "curvature by gates failed with RuntimeError: the shapes do not fit; Hessian products" in text for text in said
    )


def fail(reason: str) -> object:
    def failing(*arguments: object, **settings: object) -> None:
        raise RuntimeError(reason)

    return failing


@pytest.mark.parametrize("when", ["before the step", "after it", "after a flush"])
@pytest.mark.parametrize("case", ["label smoothing", "the same", "clipped", "a part of it"])
def test_a_logged_loss_that_is_not_the_objectives_is_said(tmp_path: Path, case: str, when: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    x = torch.randn(16, 8)
    y = x[:, :3].argmax(1)
    smoothing = 0.2 if case == "label smoothing" else 0.0

    def train() -> None:
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=5) as recorder:
            for x_, y_ in recorder.watch([(x, y)] * 22):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x_), y_, label_smoothing=smoothing)
                loss.backward()
                if case in ("clipped", "a part of it"):
                    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
                loss = loss.detach() / 4 if case == "a part of it" else loss
                if when == "before the step":
                    recorder.log(loss=loss)
                optimizer.step()
                if when == "after a flush":
                    recorder.flush()
                if when != "before the step":
                    recorder.log(loss=loss.item())

    if case == "label smoothing":
        with pytest.warns(UserWarning, match=r"the loss of step \d+ was logged as .* but the objective is .* cosine 0"):
            train()
    else:
        train()


@pytest.mark.parametrize(("steps", "logged"), [(4, []), (38, []), (38, [7]), (38, [10]), (38, [20, 21])])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_loss_that_may_be_another_and_is_never_logged_is_asked_for(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, smoothing: float, steps: int, logged: list[int]
) -> None:
    """One that is logged at some of the measured steps is compared there."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    x = torch.randn(16, 8)
    y = x[:, :3].argmax(1)
    said = []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=2) as recorder:
        for number, (x_, y_) in enumerate(recorder.watch([(x, y)] * steps)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x_), y_, label_smoothing=smoothing)
            loss.backward()
            for layer, factor in zip(model[::2], (0.5, 2), strict=True):
                torch._foreach_mul_([layer.weight.grad, layer.bias.grad], factor)  # as when each is clipped alone
            optimizer.step()
            if number in logged:
                recorder.log(loss=loss)
            said += [number] * len(recwarn)
    if not smoothing:
        assert not len(recwarn)
    elif compared := [number for number in logged if number % 2 == 0]:
        assert [str(one.message)[:31] for one in recwarn] == [f"the loss of step {compared[0]} was logged "]
    else:
        (text,) = [str(one.message) for one in recwarn]
        assert "at no measured step was a loss logged" in text
        assert said == ([] if steps == 4 else list(range(32, 38)))  # at the end, or once it was so at 16 steps


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("divided", [True, False])
def test_a_loss_that_is_logged_after_it_was_divided_by_the_number_of_micro_batches_is_said_once(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, divided: bool, parts: int, rounds: bool
) -> None:
    torch.set_default_dtype(torch.float32)
    model, batches = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), vectors(4 * parts)
    batches = [(x.float(), y) for x, y in batches]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.no_grad():
        first = np.mean([F.cross_entropy(model(x), y).item() for x, y in batches[:parts]])
        with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
            logged = np.mean([F.cross_entropy(model(x), y).item() for x, y in batches[:parts]]) / parts
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for number, (x, y) in enumerate(recorder.watch(batches), 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
                loss = F.cross_entropy(model(x), y)
            (loss / parts).backward()
            recorder.log(loss=loss / parts if divided else loss)
            if number % parts == 0:
                optimizer.step()
                optimizer.zero_grad()
    expected = (
        f"the loss logged at step 0, {logged:.4g}, is 1/{parts} of the objective's, {first:.4g}: log the loss before "
        "dividing it by the number of micro-batches"
    )
    assert [str(one.message) for one in recwarn] == [expected] * (divided and parts > 1)


def test_a_loss_that_differs_by_autocast_alone_may_be_rounding_is_said(tmp_path: Path) -> None:
    """Logits around 1000 are multiples of 4 in bfloat16, and so all the same here: the loss is log 3."""
    torch.set_default_dtype(torch.float32)
    model, x = nn.Linear(4, 3), torch.randn(16, 4)
    with torch.no_grad():
        model.bias.add_(1000)
    optimizer, y = torch.optim.SGD(model.parameters(), 0.1), model(x).argmax(1)
    said = r"logged as 1\.099.* cosine 0\.98.* half precision, with autocast for example, rounding alone may explain"
    with Recorder(tmp_path / "run", model, optimizer) as recorder, pytest.warns(UserWarning, match=said):
        for x_, y_ in recorder.watch([(x, y)]):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x_), y_)
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
        recorder.flush()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_labels_whose_smoothing_was_forgotten_are_said(tmp_path: Path, smoothing: float, dtype: torch.dtype) -> None:
    """The gradient hardly turns, and the loss hardly differs: but in single precision neither is rounding."""
    torch.set_default_dtype(dtype)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    said = pytest.warns(UserWarning, match=r"cosine 0\.99\d\d. If the logged value is the loss that the loop minimises")
    with (
        said if smoothing else nullcontext(),
        Recorder(tmp_path / "run", model, optimizer, curvature_every=2) as recorder,
    ):
        for x, y in recorder.watch([(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]):
            loss = F.cross_entropy(model(x), y, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
            recorder.log(loss=loss)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_small_penalty_that_was_forgotten_is_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, forgotten: bool
) -> None:
    """It leaves a cosine above 0.9999, and few parts in a thousand of the loss."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.2)

    def penalized(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        penalty = sum(one.square().sum() for one in model.parameters())
        return F.cross_entropy(model(batch[0]), batch[1]) + 1e-4 * penalty

    settings = {} if forgotten else {"objective": penalized}
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1, **settings) as recorder:
        for batch in recorder.watch([(torch.randn(64, 8), torch.randint(3, (64,))) for _ in range(3)]):
            optimizer.zero_grad()
            loss = penalized(model, batch)
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
    assert len(recwarn) == forgotten
    assert all("their gradients have cosine 0.9999" in str(one.message) for one in recwarn)


@pytest.mark.parametrize(
    ("size", "differ", "rounded", "said"),
    [
        (1.0, 3e-4, torch.float, True),
        (1.0, 3e-4, torch.half, False),
        (1.0, 3e-4, torch.bfloat16, False),
        (1.0, 3e-2, torch.bfloat16, True),
        (1e-3, 3e-4, torch.float, False),
        (1e-6, 3e-2, torch.float, True),
    ],
)
def test_a_loss_differs_by_more_than_its_digits(size: float, differ: float, rounded: torch.dtype, said: bool) -> None:
    """In single precision by a part in 1e4 and, as small ones are less exact, by 1e-6 or a part in 1e3."""
    objective, kinds = torch.tensor(size * 1.2345678), {}
    for factor in (1.0, 1 + differ):
        loss = LoggedLoss()
        loss.measured(0, 0.999, [objective], 1, precise=True)
        loss.logged(0, float((objective * factor).to(rounded)))
        kinds[factor] = [kind for kind, _ in loss.differing(0, last=True)]
    assert kinds == {1.0: [], 1 + differ: ["doubtful"] if said else []}


def test_a_scripted_part_has_no_curvature(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), torch.jit.script(nn.Sequential(nn.Linear(6, 3), nn.Tanh())))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(
        UserWarning, match="from step 0 on: measuring failed .* cannot be kept: a ScriptModule hides what it"
    ):
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
            for x, y in recorder.watch([(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
    assert open_run(tmp_path / "run")["steps"].sizes["step"] == 2


def test_a_frozen_parameter_that_is_no_number_does_not_move(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    model.unused = nn.Parameter(torch.tensor([torch.nan, 1.0]), requires_grad=False)
    optimizer = torch.optim.SGD([model.weight, model.bias], 0.1)
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for x, y in recorder.watch([(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert open_run(tmp_path / "run")["curvature"].step.values.tolist() == [0, 1]


@pytest.mark.filterwarnings("error")
def test_what_is_said_in_the_end_costs_no_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(8, 3), torch.randn(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    recorder = Recorder(tmp_path / "run", model, optimizer, curvature_every=64)
    for x_, y_ in recorder.watch([(x, x[:, :3].argmax(1))]):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x_), y_) + 0.1 * model.weight.square().sum()
        loss.backward()
        optimizer.step()
        recorder.log(loss=loss)
    with pytest.raises(UserWarning, match="the loss of step 0 was logged"):
        recorder.close()
    assert open_run(tmp_path / "run")["steps"].sizes["step"] == 1
    assert not optimizer._optimizer_step_pre_hooks


def noisy_steps(path: Path, shown: Callable[[float], float], sizes: tuple[int, ...] = (16,)) -> None:
    """Train with gradient noise that turns the gradient by some degrees, and log the loss as it is ``shown``."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Recorder(path, model, optimizer, curvature_every=1) as recorder:
        for _ in range(4):
            optimizer.zero_grad()
            for size in sizes:
                x, y = torch.randn(size, 4), torch.randint(3, (size,))
                recorder.observe((x, y))
                loss = F.cross_entropy(model(x), y)
                (loss * size / sum(sizes)).backward()
                recorder.log(loss=shown(loss.item()))
            for parameter in model.parameters():
                parameter.grad += 0.1 * parameter.grad.norm() * torch.ones_like(parameter) / parameter.numel() ** 0.5
            optimizer.step()


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_a_loss_that_is_logged_with_few_digits_is_the_objectives(tmp_path: Path, digits: int) -> None:
    noisy_steps(tmp_path / "run", lambda loss: round(loss, digits))


def test_a_loss_divided_by_the_number_of_unequal_batches_is_said(tmp_path: Path) -> None:
    """Their mean by samples, the objective, is not exactly their mean."""
    with pytest.warns(UserWarning, match="is 1/3 of the objective's"):
        noisy_steps(tmp_path / "run", lambda loss: loss / 3, (64, 32, 32))


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("factor", [1 / 8, 1 / 3, 0.4, 1.0, 2.5, 3.0, 8.0])
def test_a_part_or_a_multiple_of_the_loss_is_another_only_if_it_is_surely_the_one_trained_on(
    factor: float, trusted: bool
) -> None:
    """Loops log sums over micro-batches, or parts of the loss, whatever they do to gradients; frameworks do not."""
    compared = LoggedLoss()
    compared.trusted = trusted
    compared.measured(0, 0.5, [torch.tensor(2.0)], 1, precise=True)
    compared.logged(0, 2.0 * factor)
    differs = factor != 1 if trusted else factor in (0.4, 2.5)
    assert [kind for kind, _ in compared.differing(0)] == ["doubtful"] * differs


def test_rounded_products_of_matrices_are_no_other_loss(tmp_path: Path) -> None:
    """Newer processors compute them in bfloat16 where that is allowed, but the recorder does not."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    for layer in model[::2]:
        layer.weight.data *= 3
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    torch.set_float32_matmul_precision("medium")
    try:
        with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
            recorder.trust_loss()
            batches = [(torch.randn(256, 256), torch.randint(10, (256,))) for _ in range(6)]
            for x, y in recorder.watch(batches):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                recorder.log(loss=loss)
    finally:
        torch.set_float32_matmul_precision("highest")
