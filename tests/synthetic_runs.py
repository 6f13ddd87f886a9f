"""Records made up by hand, whose statistics are known."""

import json

import numpy as np
import xarray as xr

MEASURES = (
    "magnitude", "loss_preservation", "loss_preservation_times_magnitude", "gradient_norm_increase",
    "gradient_norm_preservation",
)  # fmt: skip


def record(measure: str, seed: int, *, ended: bool = True, rounds: int = 1, **what: float) -> xr.DataTree:
    """A run of two epochs, pruned once or more: layer "a" goes from the first of two values to the second."""
    settings = {"model": "vgg13", "data": "digits", "measure": measure, "sparsity": 0.5, "rounds": rounds,
                "epochs": [1, 1], "seed": seed}  # fmt: skip
    value = {"loss": (2.0, 2.5), "grad": (4.0, 3.0), "hess": (1.0, 0.0), "rate": (0.5, -0.25), "removed_grad": 0.5,
             "accuracy": 0.9, "area": 1.0} | what  # fmt: skip
    layers = [0.75, 0.25]  # what each of the two holds

    def staged(pair: tuple[float, float]) -> tuple[tuple[str, ...], np.ndarray]:
        return ("event", "stage", "layer"), np.tile(np.multiply.outer(pair, layers), (rounds, 1, 1))

    def per_event(value: float) -> tuple[tuple[str, ...], np.ndarray]:
        return ("event", "layer"), np.tile(np.multiply(value, layers), (rounds, 1))

    pruning = xr.Dataset(
        {
            "loss": (("event", "stage"), [value["loss"]] * rounds),
            "grad_sqnorm": staged(value["grad"]), "param_hess_grad": staged(value["hess"]),
            "param_sqnorm_rate": staged(value["rate"]), "abs_param_grad": staged((5.0, 5.0)),
            "removed_grad_sqnorm": per_event(value["removed_grad"]), "removed": per_event(25.0),
            "remaining": staged((100.0, 75.0)), "step": ("event", [4] * rounds),
        },
        coords={"stage": ["before", "after"], "layer": ["a", "b"]},
    )  # fmt: skip
    steps = xr.Dataset(
        {"loss": ("step", [3.0] * 4 + [value["area"]] * 4), "epoch": ("step", [0] * 4 + [1] * 4)},
        coords={"step": np.arange(8)},
    )
    epochs = xr.Dataset(
        {"test_accuracy": ("epoch", [0.1, value["accuracy"]][: 1 + ended])}, coords={"epoch": [0, 1][: 1 + ended]}
    )
    tree = {"/": xr.Dataset(attrs={"experiment": json.dumps(settings)})}
    return xr.DataTree.from_dict(tree | {"/steps": steps, "/pruning": pruning, "/epochs": epochs})


def runs(seeds: int = 3, **per_measure: dict) -> dict[str, xr.DataTree]:
    """Runs of every measure and seed; what is given of one replaces the common values, slightly off in every seed."""
    rng, found = np.random.default_rng(0), {}
    for seed in range(seeds):
        for measure in MEASURES:
            noise = 1 + 0.01 * rng.standard_normal()
            area, accuracy = (
                per_measure.get(measure, {}).get(name, at) for name, at in (("area", 1), ("accuracy", 0.8))
            )
            found[f"{measure}-{seed}"] = record(measure, seed, area=area * noise, accuracy=accuracy * noise)
    return found
