"""The table is the only place that names a quantity: each row has a formula, and nothing is recorded beside it."""

from dynamics import QUANTITIES
from dynamics.quantities import FORMULAS
from dynamics.schema import NODES, SPEEDS, label, quantities


def test_every_quantity_per_layer_has_a_formula_and_every_formula_a_quantity() -> None:
    assert {row.name for row in QUANTITIES.values() if "layer" in row.over} - {*SPEEDS} == set(FORMULAS)


def test_rows_are_consistent() -> None:
    for name, row in QUANTITIES.items():
        assert name == row.name
        assert set(row.nodes) <= set(NODES)
        assert row.meaning
        for node in row.nodes:
            assert row.dims(node)[0] == NODES[node][0]
            assert row in quantities(node)
    assert len({row.symbol for row in QUANTITIES.values()}) == len(QUANTITIES)


def test_labels_and_units_are_written_as_people_do() -> None:
    assert label("grad_hess_grad") == "gᵀHg  [L³ θ⁻⁴]"
    assert label("param_sqnorm") == "‖θ‖²  [θ²]"
    assert label("learning_rate") == "η  [L⁻¹ θ²]"
    assert label("epoch") == "epoch"
    assert label("something else") == "something else"
