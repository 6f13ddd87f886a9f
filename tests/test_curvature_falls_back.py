"""Where gates fail, Hessian products take their place: without a word for the known reason, with one for any other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import recorded, smooth_network, vectors

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
            monkeypatch.setattr("dynamics.probe.gated_products", fail(reason))
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
