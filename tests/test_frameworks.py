"""Frameworks are imported when they are asked for, and settings are checked when they are given."""

import copy
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import plain_step, smooth_network, vectors
from torch import nn

from dynamics import frameworks, open_run
from dynamics.frameworks.common import recorder_factory, simple_scalars
from dynamics.network.hooks import unlogged

ROOT = Path(__file__).parents[1]


def test_nothing_is_imported_unless_asked_for() -> None:
    imported = {name for _, names, _ in frameworks._HOMES.values() for name in names}
    assert imported >= {"lightning", "pytorch_lightning", "transformers", "accelerate"}
    code = f"import dynamics, dynamics.recording.recorder, dynamics.frameworks, sys; found = {imported} & "
    code += "set(sys.modules); sys.exit(bool(found))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_recorder_is_told_of_and_its_framework_installed_for_tests() -> None:
    assert frameworks.__all__ == [*frameworks._HOMES]
    assert {*frameworks.__all__} <= {*dir(frameworks)}
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["frameworks"]
    installed = {re.match(r"[\w-]+", requirement)[0] for requirement in extra}
    for name, (_, _, packages) in frameworks._HOMES.items():
        assert f"from dynamics.frameworks import {name}" in page
        assert {*packages.split()} <= installed


def test_a_framework_that_does_not_name_what_it_lacks_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> None:
        raise ModuleNotFoundError("Required dependencies not available")  # as Lightning's packages say it

    monkeypatch.setattr(frameworks, "import_module", lacking)
    with pytest.raises(ModuleNotFoundError, match="Required dependencies not available"):
        _ = frameworks.LightningRecorder


@pytest.mark.parametrize(
    ("recorder", "module", "missing", "message"),
    [
        ("LightningRecorder", "lightning_callback", ["lightning", "pytorch_lightning"], "pip install lightning"),
        ("TrainerRecorder", "trainer_callback", ["transformers"], "pip install transformers accelerate"),
        ("TrainerRecorder", "trainer_callback", ["accelerate"], "pip install transformers accelerate"),
    ],
)
def test_a_missing_framework_is_named(
    monkeypatch: pytest.MonkeyPatch, recorder: str, module: str, missing: list[str], message: str
) -> None:
    monkeypatch.delitem(sys.modules, f"dynamics.frameworks.{module}", raising=False)
    for loaded in [one for one in sys.modules if one.split(".")[0] in missing]:
        monkeypatch.delitem(sys.modules, loaded)
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"{recorder} needs .*, which is not installed: {message}"):
        getattr(frameworks, recorder)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'KerasRecorder'"):
        _ = frameworks.KerasRecorder


def test_a_setting_that_the_recorder_lacks_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="curvature_evry"):
        recorder_factory("run.zarr", curvature_evry=4)


def test_metrics_get_names_that_are_variables() -> None:
    metrics = {"val/loss": 0.5, "f1-micro": 1, "epoch": 2.0, "step": 7.0, "confusion": [[1, 0], [0, 1]], "kind": "text"}
    assert simple_scalars(metrics) == {"val_loss": 0.5, "f1_micro": 1.0}


@pytest.mark.parametrize("own", [False, True])
def test_a_module_logs_again_after_an_evaluation_besides_the_training(*, own: bool) -> None:
    class Base(nn.Module):
        def log(self, name: str, value: float) -> None:
            logged.append(name)

    class Logging(Base):
        __module__ = "lightning.pytorch.core.module"

        if own:

            def log(self, name: str, value: float) -> None:
                logged.append(f"own {name}")

    logged, module = [], Logging()
    with unlogged(module):
        module.log("besides", 1.0)
    module.log("loss", 1.0)
    assert logged == ["own loss" if own else "loss"]


def test_a_training_goes_on_at_the_step_of_its_parameters_whatever_the_framework_counts(tmp_path: Path) -> None:
    """Of several optimizers, and of steps that a gradient scaler skips, it counts more than are recorded."""
    model, settings = smooth_network(), {"curvature_every": 0, "resume": "rewind"}
    optimizer, states = torch.optim.SGD(model.parameters(), 0.1), []
    for counted, known in ((0, 0), (4, 3), (7, 7)):  # what it counts, and what is right
        if known == 3:
            model.load_state_dict(states[3])
        if known == 7:  # the record has nothing of these parameters
            model.load_state_dict({name: 2 * theta for name, theta in states[0].items()})
        with recorder_factory(tmp_path / "run", **settings)(model, optimizer, counted) as recorder:
            for batch in recorder.watch(vectors(5)):
                states.append(copy.deepcopy(model.state_dict()))
                plain_step(model, optimizer, batch)
        steps = open_run(tmp_path / "run")["steps"]
        np.testing.assert_array_equal(steps.step, np.arange(known + 5))
        squares = [sum(theta.square().sum().item() for theta in state.values()) for state in states[-5:]]
        np.testing.assert_allclose(steps.param_sqnorm.sum("layer")[-5:], squares, rtol=1e-12)
