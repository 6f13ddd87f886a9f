"""What the callback records of a fit of Lightning is what the module itself sees, and it stays the same fit."""

import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import convolutional_network, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynamics import Recorder, frameworks, open_run
from dynamics.pruning import scores_by_measure

lightning = pytest.importorskip("lightning.pytorch")
pytest.importorskip("pytorch_lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
DATA = TensorDataset(*images(1, size=40)[0])


def squares(model: nn.Module) -> float:
    return sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None)


def trained(
    callbacks: list[Any],
    package: str = "lightning.pytorch",
    optimizer: Callable[..., torch.optim.Optimizer] = lambda theta: torch.optim.SGD(theta, 0.1, momentum=0.9),
    manual: bool = False,
    fails_at: int = -1,
    epochs: int = 2,
    checkpoint: Path | None = None,
    **settings: Any,
) -> Any:
    """A module after epochs of five batches, with what it saw: its losses, and ‖g‖² as the steps apply it."""
    framework = import_module(package)

    class Module(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.losses, self.applied = convolutional_network(dropout=0.3), [], []
            self.automatic_optimization = not manual

        def forward(self, inputs: Tensor) -> Tensor:
            return self.network(inputs.to(self.dtype))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == fails_at:
                raise RuntimeError("out of memory")
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.losses.append(loss.item())
            self.log("train/loss", loss, on_step=False, on_epoch=True)
            if manual:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.applied.append(squares(self))
                self.optimizers().step()
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

        def on_train_epoch_end(self) -> None:
            self.log("train/batches", float(len(self.losses)))

        def configure_gradient_clipping(self, *args: Any, **settings: Any) -> None:
            super().configure_gradient_clipping(*args, **settings)
            self.applied.append(squares(self))

        def configure_optimizers(self) -> Any:
            chosen = optimizer(self.parameters())
            return [chosen], [torch.optim.lr_scheduler.StepLR(chosen, 1, 0.5)]

    if "plugins" in settings:  # the Trainer itself scales gradients on a GPU only
        scaler = torch.amp.GradScaler("cpu")
        settings["plugins"] = framework.plugins.MixedPrecision(settings["plugins"], "cpu", scaler)
    torch.manual_seed(3)
    module = Module()
    trainer = framework.Trainer(callbacks=callbacks, max_epochs=epochs, **QUIET, **settings)
    trainer.fit(module, DataLoader(DATA, 8, shuffle=True), DataLoader(DATA, 20), ckpt_path=checkpoint)
    return module


def nothing_is_attached(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> bool:
    on_optimizers = any(one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks for one in optimizers)
    return not on_optimizers and not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "other package": {"package": "pytorch_lightning"},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulated": {"accumulate_grad_batches": 2},  # and of the fifth batch alone
    "adamw": {"optimizer": lambda theta: torch.optim.AdamW(theta, 0.01)},
    "lbfgs": {"optimizer": lambda theta: torch.optim.LBFGS(theta, 0.1, max_iter=1)},
    "manual": {"manual": True},
    "mixed": {"precision": "bf16-mixed"},
    "scaled": {"plugins": "16-mixed"},
    "true": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_fit_is_recorded_and_stays_the_same(tmp_path: Path, case: str) -> None:
    low_precision, accumulated = case in ("mixed", "scaled", "true"), case == "accumulated"
    if low_precision:
        torch.set_default_dtype(torch.float32)
    without = trained([], **CASES[case])
    random_without = torch.get_rng_state()
    module = trained([frameworks.LightningRecorder(tmp_path / "run", curvature_every=1)], **CASES[case])
    assert torch.equal(random_without, torch.get_rng_state())
    for one, other in zip(without.state_dict().values(), module.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert nothing_is_attached(module, module.trainer.optimizers)
    run, losses = open_run(tmp_path / "run"), np.reshape(module.losses, (2, 5))
    if accumulated:
        losses = np.stack([losses[:, :2].mean(1), losses[:, 2:4].mean(1), losses[:, 4]], axis=1)
    tolerance = 1e-2 if low_precision else 1e-10
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), module.applied, rtol=tolerance)
    np.testing.assert_allclose(run["steps"].loss, losses.ravel(), rtol=tolerance)
    np.testing.assert_allclose(run["curvature"].loss_before, losses.ravel(), rtol=tolerance)
    np.testing.assert_array_equal(run["steps"].epoch, np.repeat([0, 1], losses.shape[1]))
    np.testing.assert_allclose(run["epochs"].train_loss, np.reshape(module.losses, (2, 5)).mean(1), rtol=tolerance)
    assert (run["epochs"].val_loss > 0).all()
    np.testing.assert_array_equal(run["epochs"].train_batches, [5, 10])  # logged when the epoch had ended


def test_an_epoch_has_the_metrics_that_it_led_to_alone(tmp_path: Path) -> None:
    trained([frameworks.LightningRecorder(tmp_path / "run")], epochs=4, check_val_every_n_epoch=2)
    epochs = open_run(tmp_path / "run")["epochs"]
    np.testing.assert_array_equal(np.isfinite(epochs.val_loss), [False, True, False, True])
    assert epochs.step.values.tolist() == [5, 10, 15, 20]


class InPercent(lightning.Callback):
    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        pl_module.log("test_accuracy", 87.0)


def test_metrics_that_cannot_be_recorded_end_neither_a_fit_nor_cost_others(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the metric test_accuracy is not recorded: .* from 0 to 1, got 87"):
        trained([InPercent(), frameworks.LightningRecorder(tmp_path / "run")])
    run = open_run(tmp_path / "run")
    assert run["steps"].sizes["step"] == 10
    assert np.isfinite(run["epochs"].val_loss).sum() == 2
    assert "test_accuracy" not in run["epochs"]


class Validations(lightning.Callback):
    """The step before which a validation ended, and what it found."""

    def __init__(self) -> None:
        self.found: dict[int, float] = {}

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.found[trainer.global_step] = trainer.callback_metrics["val/loss"].item()

    def on_train_batch_end(self, trainer: Any, pl_module: lightning.LightningModule, *others: Any) -> None:
        pl_module.log("train/step", float(trainer.global_step), on_step=True, on_epoch=True)


@pytest.mark.parametrize(
    "often", [{"val_check_interval": 2}, {"val_check_interval": 7, "check_val_every_n_epoch": None}, {}]
)
def test_each_validation_has_its_row_whether_amid_an_epoch_or_at_its_end(tmp_path: Path, often: dict) -> None:
    validations = Validations()
    settings = {"num_sanity_val_steps": 0, "epochs": 3} | often
    trained([validations, frameworks.LightningRecorder(tmp_path / "run")], **settings)
    epochs = open_run(tmp_path / "run")["epochs"].to_dataset().load()
    validated = epochs.isel(epoch=np.flatnonzero(np.isfinite(epochs.val_loss)))
    assert dict(zip(validated.step.values.tolist(), validated.val_loss.values, strict=True)) == validations.found
    ends = epochs.isel(epoch=np.flatnonzero(np.isfinite(epochs.train_loss)))
    assert ends.step.values.tolist() == [5, 10, 15]
    assert epochs.train_step.dropna("epoch").values.tolist() == [3, 8, 13]  # no single step's value


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_what_an_objective_logs_is_not_among_the_metrics(tmp_path: Path, package: str) -> None:
    framework = import_module(package)

    class Logging(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = convolutional_network(dropout=0.3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.network(inputs)

        def loss(self, batch: Any) -> Tensor:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            self.log_dict({"last": loss})
            return loss

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def loss(module: Logging, batch: Any) -> Tensor:
        return module.loss(batch)

    class Scoring(framework.Callback):
        def on_train_batch_end(self, trainer: Any, module: Logging, *others: Any) -> None:
            scores_by_measure(module, [DATA[:8]], ["loss_preservation", "fisher"], objective=loss)

    def fitted(callbacks: list[Any]) -> dict[str, Tensor]:
        torch.manual_seed(3)
        trainer = framework.Trainer(callbacks=callbacks, max_epochs=2, **QUIET)
        trainer.fit(Logging(), DataLoader(DATA, 8, shuffle=True))
        return dict(trainer.callback_metrics)

    recorder = frameworks.LightningRecorder(tmp_path / "run", curvature_every=1, objective=loss)
    alone, recorded = fitted([]), fitted([recorder, Scoring()])
    assert alone == recorded
    assert {*alone} == {"train_loss", "last"}
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, run["steps"].loss, rtol=1e-10)
    assert "log" not in vars(Logging)
    assert float(run["epochs"].train_loss[-1]) == alone["train_loss"].item()


class ByHand(lightning.LightningModule):
    """Optimizes by itself, as ``step`` says of each batch and the loss; keeps the losses of the batches that count."""

    def __init__(self, step: Callable[[Any, int, Tensor], bool]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network, self.step, self.losses = convolutional_network(), step, []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.step(self, batch_idx, loss):
            self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_batch_that_a_module_skips_is_in_no_steps_loss(tmp_path: Path) -> None:
    def all_but_the_third(module: ByHand, number: int, loss: Tensor) -> bool:
        if number != 2:
            module.optimizers().zero_grad()
            module.manual_backward(loss)
            module.optimizers().step()
        return number != 2

    module, callback = ByHand(all_but_the_third), frameworks.LightningRecorder(tmp_path / "run", curvature_every=1)
    lightning.Trainer(callbacks=[callback], max_epochs=2, **QUIET).fit(module, DataLoader(DATA, 8))
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].loss, module.losses, rtol=1e-10)
    np.testing.assert_allclose(run["curvature"].loss_before, module.losses, rtol=1e-10)


def test_of_several_steps_in_one_the_first_is_measured_and_others_whose_batch_is_told(tmp_path: Path) -> None:
    def twice(module: ByHand, number: int, loss: Tensor) -> bool:
        for again in range(2):
            batch = DATA[8 * number : 8 * number + 8] if not again else DATA[:4]
            if again and number:
                callback.recorder.observe(batch)
            loss = F.cross_entropy(module(batch[0]), batch[1])
            module.optimizers().zero_grad()
            module.manual_backward(loss)
            module.optimizers().step()
            module.losses.append(loss.item())
        return False

    module, callback = ByHand(twice), frameworks.LightningRecorder(tmp_path / "run", curvature_every=1)
    with pytest.warns(UserWarning, match="curvature is not recorded at step 1, whose batch is not known"):
        lightning.Trainer(callbacks=[callback], max_epochs=1, **QUIET).fit(module, DataLoader(DATA, 8))
    curvature = open_run(tmp_path / "run")["curvature"]
    assert curvature.step.values.tolist() == [0, *range(2, 10)]
    np.testing.assert_allclose(curvature.loss_before, [module.losses[0], *module.losses[2:]], rtol=1e-10)


def test_a_callback_is_sent_to_processes_that_are_spawned(tmp_path: Path) -> None:
    sent = pickle.loads(pickle.dumps(frameworks.LightningRecorder(tmp_path / "run", curvature_every=2)))
    trained([sent])
    assert open_run(tmp_path / "run")["curvature"].step.values.tolist() == [0, 2, 4, 6, 8]


def test_a_fit_that_fails_leaves_the_steps_before(tmp_path: Path) -> None:
    callback = frameworks.LightningRecorder(tmp_path / "run")
    with pytest.raises(RuntimeError, match="out of memory"):
        trained([callback], fails_at=3)
    assert callback.recorder is None
    assert open_run(tmp_path / "run")["steps"].step.values.tolist() == [0, 1, 2]


def test_a_fit_that_goes_on_from_a_checkpoint_is_recorded_from_there(tmp_path: Path) -> None:
    trained([], epochs=1).trainer.save_checkpoint(tmp_path / "one.ckpt")
    callback = frameworks.LightningRecorder(tmp_path / "run", curvature_every=1)
    module = trained([callback], checkpoint=tmp_path / "one.ckpt")
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), module.applied, rtol=1e-10)
    np.testing.assert_allclose(run["curvature"].loss_before, module.losses, rtol=1e-10)
    assert len(module.losses) == 5


class Saving(lightning.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step = path, step

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        if trainer.global_step == self._step:
            trainer.save_checkpoint(self._path)


@pytest.mark.parametrize("step", [5, 8])
def test_a_checkpoint_finds_what_was_recorded_before_it_on_the_disk(tmp_path: Path, step: int) -> None:
    """The epoch, too, where it is saved at its end."""
    found, saving = [], Saving(tmp_path / "one.ckpt", step)
    saving.on_train_epoch_end = saving.on_train_batch_end
    saving.on_save_checkpoint = lambda *others: found.append(open_run(tmp_path / "run"))
    trained([frameworks.LightningRecorder(tmp_path / "run"), saving])
    assert found[-1]["steps"].loss.notnull().sum() == step
    assert found[-1]["epochs"].step.values.tolist() == [5]


@pytest.mark.parametrize("step", [3, 5])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_epochs_go_on_from_a_checkpoint_within_one_or_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr("dynamics.frameworks.common.simple_scalars", lambda metrics: {})  # as if there were none
    trained([frameworks.LightningRecorder(tmp_path / "run"), Saving(tmp_path / "one.ckpt", step)])
    recorder = frameworks.LightningRecorder(tmp_path / "run", resume="rewind")
    trained([recorder], checkpoint=tmp_path / "one.ckpt")
    np.testing.assert_array_equal(open_run(tmp_path / "run")["steps"].epoch, np.repeat([0, 1], 5))


@pytest.mark.parametrize("step", [4, 6, 7])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_validations_amid_epochs_leave_these_counted_after_a_checkpoint(tmp_path: Path, step: int) -> None:
    """Whether a validation came just before it or comes just after."""
    how = {"val_check_interval": 2, "epochs": 3, "num_sanity_val_steps": 0}
    trained([frameworks.LightningRecorder(tmp_path / "run"), Saving(tmp_path / "one.ckpt", step)], **how)
    recorder = frameworks.LightningRecorder(tmp_path / "run", resume="rewind")
    trained([recorder], checkpoint=tmp_path / "one.ckpt", **how)
    np.testing.assert_array_equal(open_run(tmp_path / "run")["steps"].epoch, np.repeat([0, 1, 2], 5))


def test_another_objective_is_given_module_and_batch_and_is_said(tmp_path: Path) -> None:
    """Its gradient points alike, and yet the curvature is another."""

    def halved(module: nn.Module, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1]) / 2

    recorder = frameworks.LightningRecorder(tmp_path / "run", curvature_every=4, objective=halved)
    with pytest.warns(
        UserWarning, match=r"of step 0 was logged as .* but the objective is .* same direction, as those"
    ):
        module = trained([recorder])
    losses = open_run(tmp_path / "run")["curvature"].loss_before
    np.testing.assert_allclose(losses, np.array(module.losses)[::4] / 2, rtol=1e-10)


def test_the_loss_of_a_step_that_asks_for_several_is_the_first(tmp_path: Path) -> None:
    def lbfgs(theta: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(theta, 0.1, max_iter=3)

    trained([frameworks.LightningRecorder(tmp_path / "run", curvature_every=1)], optimizer=lbfgs)
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].loss, run["curvature"].loss_before, rtol=1e-10)


def test_several_optimizers_take_one_step_together(tmp_path: Path) -> None:
    class Adversaries(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.one, self.other, self.applied = nn.Linear(3, 3), nn.Linear(3, 3), []

        def forward(self, inputs: Tensor) -> Tensor:
            return self.other(self.one(inputs).tanh())

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            squares_of = []
            for network, optimizer in zip((self.one, self.other), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(F.mse_loss(self(batch[0]), batch[0]))
                squares_of.append(squares(network))
                optimizer.step()
            self.applied.append(squares_of)

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(self.one.parameters(), 0.1), torch.optim.Adam(self.other.parameters(), 0.01)]

    module = Adversaries()
    callback = frameworks.LightningRecorder(tmp_path / "run", curvature_every=0)
    trainer = lightning.Trainer(callbacks=[callback], max_epochs=1, **QUIET)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(12, 3)), 4))
    np.testing.assert_allclose(open_run(tmp_path / "run")["steps"].grad_sqnorm, module.applied, rtol=1e-10)
    assert nothing_is_attached(module, trainer.optimizers)


@pytest.mark.filterwarnings("ignore:The `device_type=.*` is not")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabrics_module_is_the_one_that_it_wraps(tmp_path: Path, precision: str) -> None:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision=precision)
    torch.manual_seed(0)
    network = convolutional_network().float()
    model, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), 0.1, momentum=0.9))
    batches = [(inputs.float(), labels) for inputs, labels in images(4)]
    applied, losses = [], []
    with Recorder(tmp_path / "run", model, optimizer, curvature_every=1) as recorder:
        for inputs, labels in recorder.watch(batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            fabric.backward(loss)
            applied.append(squares(network))
            losses.append(loss.item())
            optimizer.step()
    run = open_run(tmp_path / "run")
    assert run["steps"].layer.values.tolist()[0] == "0"
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), applied, rtol=1e-5)
    np.testing.assert_allclose(run["curvature"].loss_before, losses, rtol=1e-5 if precision == "32-true" else 0.02)
