"""A figure has its own style alone, whatever the user's, and that ends with the figure."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic_runs import runs

from figures import draw
from figures.style import run_styles

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


def test_no_text_of_a_figure_is_typeset_by_latex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plt.rcParams, "text.usetex", True)
    figure = draw("accuracy", runs())
    figure.draw_without_rendering()
    assert not [text for text in figure.findobj(Text) if text.get_usetex()]


def pixels(figure: Figure) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


@pytest.mark.parametrize("name", ["accuracy", "training_curves"])
def test_a_figure_is_the_same_in_every_style_of_its_user(name: str) -> None:
    """Grey dots on a dark page, say, would hardly be seen."""
    own = pixels(draw(name, runs()))
    with plt.style.context(["dark_background", {"font.size": 20, "lines.linewidth": 5, "axes.titlesize": 30}]):
        figure = draw(name, runs())
    np.testing.assert_array_equal(pixels(figure), own)


def test_every_colour_is_seen_on_white() -> None:
    """Luminance as W3C has it; by its contrast with white, a line of 1.3 points needs more than a hairline's 2:1."""
    for style in run_styles([f"run {number}" for number in range(10)]).values():
        red, green, blue = (
            of / 12.92 if of <= 0.04045 else ((of + 0.055) / 1.055) ** 2.4 for of in to_rgb(style["color"])
        )
        assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) > 2
