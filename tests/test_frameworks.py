"""Frameworks are imported when they are asked for, and settings are checked when they are given."""

import subprocess
import sys

import pytest

from dynamics import frameworks
from dynamics.frameworks.recording import recording, simple_scalars


def test_nothing_is_imported_unless_asked_for() -> None:
    code = "import dynamics, dynamics.recording.recorder, dynamics.frameworks, sys; sys.exit(bool({'lightning', "
    code += "'pytorch_lightning', 'transformers', 'accelerate'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
        recording("run.zarr", curvature_evry=4)


def test_metrics_get_names_that_are_variables() -> None:
    metrics = {"val/loss": 0.5, "f1-micro": 1, "epoch": 2.0, "step": 7.0, "confusion": [[1, 0], [0, 1]], "kind": "text"}
    assert simple_scalars(metrics) == {"val_loss": 0.5, "f1_micro": 1.0}
