"""In several processes each framework leaves one record, of the gradient that all of them apply."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynamics import open_run

pytest.importorskip("accelerate")
pytest.importorskip("lightning")
pytest.importorskip("transformers")

HERE = Path(__file__).parent


@pytest.mark.long
def test_two_processes_leave_one_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "frameworks_script.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=240, check=False, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, applied in json.loads((tmp_path / "applied.json").read_text()).items():
        run = open_run(tmp_path / f"{name}.zarr")
        np.testing.assert_allclose(run["steps"].grad_sqnorm.sum("layer"), applied, rtol=1e-5, err_msg=name)
        assert len(applied) == (4 if name == "lightning" else 2)
        np.testing.assert_allclose(run["curvature"].grad_sqnorm.sum("layer"), applied, rtol=1e-5, err_msg=name)
        if name == "trainer":
            np.testing.assert_allclose(run["curvature"].loss_before, run["steps"].loss, rtol=1e-5)
