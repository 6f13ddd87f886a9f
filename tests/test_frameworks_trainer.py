"""What the callback records of Hugging Face's Trainer is what the Trainer applies, and it trains the same."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from dynamics import frameworks, open_run

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _float32_and_one_accelerator_a_test() -> Iterator[None]:
    torch.set_default_dtype(torch.float32)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Squares(transformers.TrainerCallback):
    """‖g‖² as the optimizer is about to apply it."""

    def __init__(self) -> None:
        self.applied: list[float] = []

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **training: Any) -> None:
        self.applied.append(sum(p.grad.double().square().sum().item() for p in model.parameters()))


def language_model() -> nn.Module:
    """A GPT-2 of two layers, with dropout, and input and output embedding tied."""
    torch.manual_seed(3)
    sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 11, "n_positions": 6}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def classifier() -> nn.Module:
    """A BERT of one layer."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=11, num_labels=3))


def texts(model: nn.Module) -> list[dict[str, Tensor]]:
    """20 texts of 6 tokens, which have classes or are to be continued."""
    tokens = torch.randint(11, (20, 6), generator=torch.Generator().manual_seed(1))
    labels = tokens if isinstance(model, transformers.GPT2LMHeadModel) else tokens[:, 0] % 3
    return [{"input_ids": text, "labels": label} for text, label in zip(tokens, labels, strict=True)]


def trainer(model: nn.Module, path: Path, callbacks: list[Any], **settings: Any) -> Any:
    """A Trainer of two epochs of five batches."""
    given = {"max_grad_norm": 0.0, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "save_strategy": "no"}
    settings = given | {"num_train_epochs": 2} | settings
    arguments = transformers.TrainingArguments(
        path, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    data = texts(model)
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)


def trained(model: nn.Module, path: Path, callbacks: list[Any], **settings: Any) -> list[float]:
    """‖g‖² at each step of a training of the model."""
    squares = Squares()
    trainer(model, path, [*callbacks, squares], **settings).train()
    return squares.applied


def nothing_is_attached(model: nn.Module) -> bool:
    return not model._forward_pre_hooks and not any(one._post_accumulate_grad_hooks for one in model.parameters())


KNOWN = inspect.signature(transformers.TrainingArguments).parameters
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in KNOWN)
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (language_model, {}),
    "classifier": (classifier, {}),
    "clipped": (language_model, {"max_grad_norm": 0.1}),
    "accumulated": (language_model, {"gradient_accumulation_steps": 2}),  # and of the fifth batch alone
    "accumulated classifier": (classifier, {"gradient_accumulation_steps": 2}),
    "adamw": (language_model, {"optim": "adamw_torch", "weight_decay": 0.1}),
    "evaluated": (language_model, {"eval_strategy": "steps", "eval_steps": 2}),
    "mixed": (language_model, {"bf16": True}),
    "checkpointed": (language_model, {CHECKPOINTING: True}),
    "compiled": (classifier, {"torch_compile": True, "torch_compile_backend": "eager"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_is_recorded_and_stays_the_same(tmp_path: Path, case: str) -> None:
    make, settings = CASES[case]
    without, model = make(), make()
    applied = trained(without, tmp_path, [], **settings)
    random_without = torch.get_rng_state()
    recorder = frameworks.TrainerRecorder(tmp_path / "run", curvature_every=1)
    assert trained(model, tmp_path, [recorder], **settings) == applied
    assert torch.equal(random_without, torch.get_rng_state())
    for one, other in zip(without.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert nothing_is_attached(model)
    run = open_run(tmp_path / "run")
    assert len(applied) == (6 if "accumulated" in case else 10)
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), applied, rtol=1e-5)
    np.testing.assert_array_equal(run["steps"].epoch, np.repeat([0, 1], len(applied) // 2))
    np.testing.assert_allclose(run["curvature"].loss_before, run["steps"].loss, rtol=1e-2 if case == "mixed" else 1e-5)


def test_what_evaluations_find_is_in_the_row_of_the_step_before(tmp_path: Path) -> None:
    recorder = frameworks.TrainerRecorder(tmp_path / "run", curvature_every=0)
    training = trainer(language_model(), tmp_path, [recorder], eval_strategy="steps", eval_steps=2)
    training.train()
    found = {row["step"] - 1: row["eval_loss"] for row in training.state.log_history if "eval_loss" in row}
    losses = open_run(tmp_path / "run")["steps"].eval_loss.dropna("step")
    assert dict(zip(losses.step.values.tolist(), losses.values.tolist(), strict=True)) == found
    assert list(found) == [1, 3, 5, 7, 9]
    assert training.evaluate()["eval_loss"] == found[9]  # after the training, of which the record is closed


SAVED = {"save_strategy": "steps", "save_steps": 5}


@pytest.mark.parametrize("settings", [SAVED, SAVED | {"logging_strategy": "epoch"}, {"eval_on_start": True}])
def test_what_is_found_at_an_epochs_end_is_in_its_last_steps_row(tmp_path: Path, settings: dict) -> None:
    """Whether that step was saved before, or another evaluation came before all steps."""
    recorder = frameworks.TrainerRecorder(tmp_path / "run", curvature_every=0)
    training = trainer(language_model(), tmp_path, [recorder], eval_strategy="epoch", **settings)
    training.eval_dataset = {"one": training.train_dataset, "other": training.train_dataset[:4]}
    training.train()
    steps = open_run(tmp_path / "run")["steps"]
    for name in ("eval_one_loss", "eval_other_loss", "loss"):
        found = {row["step"] - 1: row[name] for row in training.state.log_history if name in row and row["step"]}
        values = steps[name].dropna("step")
        assert dict(zip(values.step.values.tolist(), values.values.tolist(), strict=True)) == found
        assert {4, 9} <= found.keys()


def test_a_step_of_unequal_batches_has_the_trainers_loss(tmp_path: Path) -> None:
    """Tokens count, not texts: of half of the texts all labels but three are ignored."""
    recorder = frameworks.TrainerRecorder(tmp_path / "run", curvature_every=1)
    training = trainer(language_model(), tmp_path, [recorder], gradient_accumulation_steps=5)
    for text in training.train_dataset[::2]:
        text["labels"] = torch.where(torch.arange(6) < 3, text["labels"], -100)
    training.train()
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, run["steps"].loss, rtol=1e-5)
    np.testing.assert_allclose(run["curvature"].grad_sqnorm, run["steps"].grad_sqnorm, rtol=1e-3)


def test_a_loss_of_the_trainers_own_is_given_as_objective(tmp_path: Path) -> None:
    def of_classes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"], label_smoothing=0.2)

    class Smoothing(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return F.cross_entropy(model(**inputs).logits, inputs["labels"], label_smoothing=0.2)

    recorder = frameworks.TrainerRecorder(tmp_path / "run", curvature_every=1, objective=of_classes)
    training = trainer(classifier(), tmp_path, [recorder])
    training.compute_loss = Smoothing.compute_loss.__get__(training)
    training.train()
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, run["steps"].loss, rtol=1e-5)


@pytest.mark.long
def test_an_objective_that_is_the_models_loss_is_as_if_none_were_given(tmp_path: Path) -> None:
    """Of accumulated batches, too, of which each has a share of the step's loss; what it counts is put back."""
    counted = [0]

    def of_model(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        counted[0] += 1
        return model(**batch).loss

    for name, given in (("default", {}), ("given", {"objective": of_model})):
        recorder = frameworks.TrainerRecorder(tmp_path / name, curvature_every=1, **given)
        trained(language_model(), tmp_path, [recorder], gradient_accumulation_steps=2)
    default, own = (open_run(tmp_path / name) for name in ("default", "given"))
    xr.testing.assert_allclose(own["curvature"].to_dataset(), default["curvature"].to_dataset(), rtol=1e-4)
    np.testing.assert_allclose(own["curvature"].loss_before, own["steps"].loss, rtol=1e-5)
    assert counted == [0]


def test_an_objective_that_does_not_count_items_is_the_mean_that_it_is(tmp_path: Path) -> None:
    """The Trainer divides by all six tokens of a text, though the model predicts five of them."""

    def mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss

    model = language_model()
    recorder = frameworks.TrainerRecorder(tmp_path / "run", curvature_every=1, objective=mean)
    with pytest.warns(UserWarning, match="the loss of step 0 was logged as 1"):
        trained(model, tmp_path, [recorder], gradient_accumulation_steps=2)
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, run["steps"].loss * 6 / 5, rtol=1e-5)


def test_a_loss_of_the_trainers_own_that_is_not_given_is_said(tmp_path: Path) -> None:
    """Half of what the model returns, whose gradient points alike."""

    class Halving(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return transformers.Trainer.compute_loss(self, *args, **kwargs) / 2

    training = trainer(classifier(), tmp_path, [frameworks.TrainerRecorder(tmp_path / "run")])
    training.compute_loss = Halving.compute_loss.__get__(training)
    with pytest.warns(
        UserWarning, match=r"of step 0 was logged as .* but the objective is .* same direction, as those"
    ):
        training.train()


def test_the_mean_loss_of_an_epoch_is_not_taken_for_that_of_its_last_step(tmp_path: Path) -> None:
    """The two differ by more than rounding at this learning rate, and no warning says so."""
    recorder = frameworks.TrainerRecorder(tmp_path / "run", curvature_every=4)
    training = trainer(classifier(), tmp_path, [recorder], logging_strategy="epoch", learning_rate=3.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the loss of step")
        training.train()
    run = open_run(tmp_path / "run")
    assert abs(run["steps"].loss.values[4] - run["curvature"].loss_before.sel(step=4).item()) > 0.3


def test_a_model_that_is_given_its_inputs_by_position(tmp_path: Path) -> None:
    def by_position(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return model(inputs["input_ids"], inputs.get("attention_mask"), labels=inputs["labels"]).loss

    training = trainer(classifier(), tmp_path, [frameworks.TrainerRecorder(tmp_path / "run", curvature_every=1)])
    training.compute_loss = by_position
    training.train()
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["curvature"].loss_before, run["steps"].loss, rtol=1e-5)


@pytest.mark.parametrize("by", ["smoothing", "compute_loss"])
def test_labels_that_the_trainer_keeps_from_the_model_cost_the_curvature(tmp_path: Path, by: str) -> None:
    def popping(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs).logits, labels)

    squares_of = Squares()
    callbacks = [frameworks.TrainerRecorder(tmp_path / "run", curvature_every=4), squares_of]
    training = trainer(classifier(), tmp_path, callbacks, label_smoothing_factor=0.1 * (by == "smoothing"))
    training.compute_loss = popping if by == "compute_loss" else training.compute_loss
    with pytest.warns(UserWarning, match="the model returned no loss for a batch of .* a compute_loss that pops them"):
        training.train()
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), squares_of.applied, rtol=1e-5)
    assert not run["curvature"]


def test_a_training_that_goes_on_within_an_epoch_is_still_in_it(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3}
    applied = trained(language_model(), tmp_path, [frameworks.TrainerRecorder(tmp_path / "run")], **settings)
    recorder = frameworks.TrainerRecorder(tmp_path / "run", resume="rewind")
    trainer(language_model(), tmp_path, [recorder]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    run = open_run(tmp_path / "run")
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), applied, rtol=1e-4)
    np.testing.assert_array_equal(run["steps"].epoch, np.repeat([0, 1], 5))


def test_what_was_recorded_is_on_the_disk_when_a_checkpoint_is(tmp_path: Path) -> None:
    found = []

    class Looking(transformers.TrainerCallback):
        def on_save(self, *args: Any, **training: Any) -> None:
            found.append(int(open_run(tmp_path / "run")["steps"].loss.notnull().sum()))

    callbacks = [frameworks.TrainerRecorder(tmp_path / "run", curvature_every=0), Looking()]
    trained(language_model(), tmp_path, callbacks, save_strategy="steps", save_steps=4)
    assert found == [4, 8, 10]


class Failing(transformers.TrainerCallback):
    """Ends a training after three steps."""

    def on_step_end(self, args: Any, state: Any, *others: Any, **training: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("out of memory")


def test_a_training_that_fails_leaves_the_steps_before(tmp_path: Path) -> None:
    model = language_model()
    with pytest.raises(RuntimeError, match="out of memory"):
        with frameworks.TrainerRecorder(tmp_path / "run", curvature_every=0) as recorder:
            trained(model, tmp_path, [recorder, Failing()])
    assert nothing_is_attached(model)
    assert open_run(tmp_path / "run")["steps"].step.values.tolist() == [0, 1, 2]


class FullMemory(transformers.TrainerCallback):
    """Has a training fail twice, as of a batch that is too large."""

    def __init__(self) -> None:
        self.fails_at = [0, 2]

    def on_step_begin(self, args: Any, state: Any, *others: Any, **training: Any) -> None:
        if self.fails_at and state.global_step == self.fails_at[0]:
            del self.fails_at[0]
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.long
def test_a_training_that_the_trainer_begins_anew_goes_on_in_the_record(tmp_path: Path) -> None:
    callbacks = [frameworks.TrainerRecorder(tmp_path / "run", curvature_every=0), FullMemory()]
    applied = trained(language_model(), tmp_path, callbacks, auto_find_batch_size=True, num_train_epochs=1)
    run = open_run(tmp_path / "run")
    assert len(applied) > 5
    np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), applied, rtol=1e-5)


def test_parameters_that_are_spread_over_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = frameworks.TrainerRecorder(tmp_path / "run")
    training = trainer(language_model(), tmp_path, [])
    state = SimpleNamespace(distributed_type=accelerate.DistributedType.FSDP)
    monkeypatch.setattr("dynamics.frameworks.trainer_callback.AcceleratorState", lambda: state)
    with pytest.raises(ValueError, match="needs all parameters in one process, but FSDP shards them: train with"):
        recorder.on_train_begin(training.args, training.state, training.control)
