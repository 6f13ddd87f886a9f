"""A figure's style ends with the figure: what matplotlib's backend needs to show the next one stays."""

import os
import subprocess
import sys
from pathlib import Path

# A backend like Jupyter's: it makes matplotlib interactive when it is first used.
BACKEND = """
import matplotlib
from matplotlib.backends.backend_agg import FigureCanvas, FigureManager

matplotlib.interactive(True)
"""
FIRST_FIGURE = """
import matplotlib.pyplot as plt
from figures.style import theme

before = plt.rcParams["axes.spines.top"]
with theme():
    plt.figure()
assert plt.isinteractive()
assert plt.rcParams["axes.spines.top"] == before
"""


def test_a_first_figure_in_our_style_leaves_the_backend_awake(tmp_path: Path) -> None:
    (tmp_path / "wakes_up.py").write_text(BACKEND)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}", "MPLBACKEND": "module://wakes_up"}
    done = subprocess.run([sys.executable, "-c", FIRST_FIGURE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
