"""What a record is: the one table of recorded quantities.

Every name, symbol, unit and dimension that appears in a record, an axis label, a documentation table or a test
comes from :data:`QUANTITIES`. Nothing here needs torch, so records can be read without a GPU and without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

SCHEMA_VERSION = 1

NODES: dict[str, tuple[str, ...]] = {
    "steps": ("step", "layer"),
    "curvature": ("step", "layer"),
    "pruning": ("event", "stage", "layer"),
    "units": ("event", "unit"),
    "curve": ("event", "direction", "fraction", "stage", "layer"),
    "scores": ("event", "measure", "draw", "unit"),
    "invariance": ("event", "mode", "unit"),
    "epochs": ("epoch",),
}
STAGES = ("before", "after")
STUDIES = ("curve", "scores", "invariance")  # what an event may add, each computed by dynamics.pruning

# Quantities of a layer that do not add up to the network's: layers share their value, which a sum would multiply.
SPEEDS = ("learning_rate", "flow_step")

# What runs are compared by (attributes of a record or settings of an experiment), and the attributes of every record.
COMPARED_BY = {"model": str, "data": str, "measure": str, "rounds": Real, "sparsity": Real, "seed": Real}
ORIGIN = ("schema_version", "thetadot", "commit", "torch", "cuda", "created", "device", "resumed", "finished")

# For the records of experiments: the paper's measures in its order, and the settings that matter only when pruning.
PAPER_MEASURES = (
    "magnitude",
    "loss_preservation",
    "loss_preservation_times_magnitude",
    "gradient_norm_increase",
    "gradient_norm_preservation",
)
PRUNING_SETTINGS = (
    "rounds",
    "sparsity",
    "granularity",
    "protocol",
    "keep_momentum",
    "importance_samples",
    "probe_mode",
    "studies",
)

# Measures that prune the units with the highest scores; all others prune those with the lowest.
HIGHEST_FIRST = ("grasp",)

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(base: str, exponent: int) -> str:
    return base if exponent == 1 else base + str(exponent).translate(_SUPERSCRIPTS)


@dataclass(frozen=True)
class Quantity:
    """One row of the table.

    ``unit`` holds the powers (p, q) of the unit θᵖLᵠ: under L(θ) → b L(θ/a) the quantity scales by aᵖbᵠ. Time has the
    unit θ²/L. ``order`` is the highest derivative of the loss that the quantity needs. ``nodes`` says in which groups
    of the record it is, and ``over`` which of the group's dimensions it spans besides the first.
    """

    name: str
    symbol: str
    unit: tuple[int, int]
    order: int
    nodes: tuple[str, ...]
    over: tuple[str, ...]
    meaning: str

    def dims(self, node: str) -> tuple[str, ...]:
        """Dimensions of the quantity in a node, in the record's order."""
        index, *others = NODES[node]
        return (index, *(dim for dim in others if dim in self.over))

    @property
    def units(self) -> str:
        """The unit in print, e.g. ``L² θ⁻²``; ``1`` for a pure number."""
        theta, loss = self.unit
        return " ".join(_power(base, power) for base, power in (("L", loss), ("θ", theta)) if power) or "1"

    @property
    def attributes(self) -> dict[str, str]:
        """Attributes of the variable in the record; xarray labels axes with the first two."""
        return {"long_name": self.symbol, "units": self.units, "description": self.meaning}


# The dimensions that quantities span; each spans those that its node has.
_WHOLE = ()  # the network
_LAYER = ("layer",)
_STAGE = ("fraction", "stage")  # the network, before and after an event
_STAGED = (*_STAGE, "layer")  # a layer, before and after an event
_COUNT = ("fraction", "layer")  # what an event removes of a layer
_REMOVAL = ("direction", *_COUNT)  # a layer's removal, along each direction that leads to it
_UNIT = ("unit",)
_FILTER = (*_STAGED, "mode", *_UNIT)  # a layer, and a filter in each mode
_SCORE = ("measure", *_UNIT)
_RESAMPLED = ("measure", "draw", *_UNIT)

QUANTITIES: dict[str, Quantity] = {
    row.name: row
    for row in (
        Quantity("param_sqnorm", "‖θ‖²", (2, 0), 0, ("steps", "pruning", "curve", "invariance"), _FILTER,
                 "squared norm of the parameters"),
        Quantity("param_sqnorm_rate", "d‖θ‖²/dt", (0, 1), 1, ("steps", "pruning", "curve"), _STAGED,
                 "velocity of ‖θ‖² along the gradient flow of the loss, −2θᵀg"),
        Quantity("grad_sqnorm", "‖g‖²", (-2, 2), 1, ("steps", "curvature", "pruning", "curve", "invariance"), _FILTER,
                 "squared norm of the gradient: in steps the one applied, in curvature and pruning the loss's own"),
        Quantity("param_grad", "θᵀg", (0, 1), 1, ("steps", "curvature", "pruning", "curve", "invariance"), _FILTER,
                 "inner product of parameters and gradient"),
        Quantity("abs_param_grad", "Σ|θg|", (0, 1), 1, ("steps", "pruning", "curve"), _STAGED,
                 "sum of |θᵢgᵢ|: loss preservation's importance of all parameters"),
        Quantity("distance_sqnorm", "‖θ−θ₀‖²", (2, 0), 0, ("steps",), _LAYER,
                 "squared distance from the parameters at which recording began"),
        Quantity("decay_sqnorm", "λ‖θ‖²", (0, 1), 0, ("steps",), _LAYER,
                 "squared norm weighted by each parameter's weight decay λ"),
        Quantity("update_sqnorm", "‖Δθ‖²", (2, 0), 1, ("steps",), _LAYER,
                 "squared norm of the step that the optimizer took"),
        Quantity("param_update", "θᵀΔθ", (2, 0), 1, ("steps",), _LAYER,
                 "inner product of the parameters before the step and the step"),
        Quantity("grad_update", "gᵀΔθ", (0, 1), 1, ("steps", "curvature"), _LAYER,
                 "inner product of gradient and step: the first-order change of the loss"),
        Quantity("applied_grad_sqnorm", "‖ĝ‖²", (-2, 2), 1, ("curvature",), _LAYER,
                 "squared norm of the gradient ĝ that the optimizer was given, after clipping say"),
        Quantity("grad_applied_grad", "gᵀĝ", (-2, 2), 1, ("curvature",), _LAYER,
                 "inner product of the loss's own gradient and the one applied"),
        Quantity("grad_hess_grad", "gᵀHg", (-4, 3), 2, ("curvature", "pruning", "curve"), _STAGED,
                 "curvature along the gradient: gₗᵀ(Hg)ₗ, a block of the full product"),
        Quantity("param_hess_grad", "θᵀHg", (-2, 2), 2, ("curvature", "pruning", "curve", "invariance"), _FILTER,
                 "θₗᵀ(Hg)ₗ: gradient-norm pruning's importance of all parameters"),
        Quantity("update_hess_update", "ΔθᵀHΔθ", (0, 1), 2, ("curvature",), _LAYER,
                 "curvature along the step: twice the second-order change of the loss"),
        Quantity("loss", "L", (0, 1), 0, ("steps", "pruning", "curve"), _STAGE,
                 "loss: in steps as logged by the training loop, in pruning at the probe"),
        Quantity("learning_rate", "η", (2, -1), 0, ("steps",), _LAYER,
                 "learning rate: 0 where nothing is trained, NaN where the layer's parameters differ in it"),
        Quantity("flow_step", "Δt", (2, -1), 0, ("steps",), _LAYER,
                 "flow time of the step, η(1−dampening)/(1−β) with momentum β; NaN but for SGD by itself"),
        Quantity("flow_time", "t", (2, -1), 0, ("steps",), _WHOLE,
                 "flow time elapsed before the step, in the optimizer's first parameter group"),
        Quantity("epoch", "epoch", (0, 0), 0, ("steps",), _WHOLE,
                 "pass over the watched loader, counted from 0"),
        Quantity("skipped", "skipped", (0, 0), 0, ("steps",), _WHOLE,
                 "1 where a gradient scaler made the optimizer skip the step"),
        Quantity("approximate", "approximate", (0, 0), 0, ("curvature",), _WHOLE,
                 "1 where Hessian products are central differences of gradients: autograd has no second derivative"),
        Quantity("loss_before", "L(θ)", (0, 1), 0, ("curvature",), _WHOLE,
                 "loss on the step's batch before the step"),
        Quantity("loss_after", "L(θ+Δθ)", (0, 1), 0, ("curvature",), _WHOLE,
                 "loss on the same batch after the step; NaN if the objective fails there"),
        Quantity("grad_removal", "gᵀδ", (0, 1), 1, ("pruning", "curve"), _REMOVAL,
                 "first-order effect of the removal δ on the loss"),
        Quantity("removal_hess_removal", "δᵀHδ", (0, 1), 2, ("pruning", "curve"), _REMOVAL,
                 "twice the second-order effect of the removal on the loss: δₗᵀ(Hδ)ₗ"),
        Quantity("grad_hess_removal", "gᵀHδ", (-2, 2), 2, ("pruning", "curve"), _REMOVAL,
                 "half the first-order effect of the removal on ‖g‖²: δₗᵀ(Hg)ₗ, what layer l's removal contributes"),
        Quantity("kept_grad_hess_removal", "g_KᵀHδ", (-2, 2), 2, ("pruning", "curve"), _REMOVAL,
                 "gᵀHδ over the kept coordinates K: g_Kᵀ(Hδ)_K, half of what the removal does to their ‖g‖²"),
        Quantity("grad_sqnorm_second_order", "‖(Hδ)_K‖² + g_KᵀT[δ,δ]_K", (-2, 2), 3, ("pruning", "curve"), _REMOVAL,
                 "second-order effect of the removal on ‖g_K‖², where T is the derivative of H"),
        Quantity("param_grad_first_order", "θ_Kᵀ(g+Hδ)_K − θᵀg", (0, 1), 2, ("pruning", "curve"), _REMOVAL,
                 "first-order effect of the removal on θᵀg, with δ_Kᵀg_K where what is kept moves"),
        Quantity("param_grad_second_order", "½θ_KᵀT[δ,δ]_K", (0, 1), 3, ("pruning", "curve"), _REMOVAL,
                 "second-order effect of the removal on θᵀg, with δ_Kᵀ(Hδ)_K where what is kept moves"),
        Quantity("param_hess_grad_first_order", "θ_Kᵀ(Hg)′_K − θᵀHg", (-2, 2), 3, ("pruning",), _REMOVAL,
                 "first-order effect of the removal on θᵀHg: (Hg)′ = Hg + H((Hδ)_K − g_R) + T[δ]g_K"),
        Quantity("removed_grad_sqnorm", "‖g_R‖²", (-2, 2), 1, ("pruning", "curve"), _COUNT,
                 "squared gradient norm, before, of the parameters that the event removed"),
        Quantity("removed", "|R|", (0, 0), 0, ("pruning", "curve"), _COUNT,
                 "number of parameters that the event removed"),
        Quantity("remaining", "n", (0, 0), 0, ("pruning", "curve"), _STAGED,
                 "number of parameters that are not pruned"),
        Quantity("target", "sparsity asked", (0, 0), 0, ("pruning",), _WHOLE,
                 "share of all units (filters or weights) that was to be pruned by the end of the event"),
        Quantity("sparsity", "sparsity", (0, 0), 0, ("pruning",), _WHOLE,
                 "share of all units that is pruned at the end of the event"),
        Quantity("parameters_left", "parameters left", (0, 0), 0, ("pruning",), _WHOLE,
                 "parameters of the network as pruned: those kept, less the weights that read silent channels only"),
        Quantity("multiply_adds_left", "multiply-adds left", (0, 0), 0, ("pruning",), _WHOLE,
                 "multiply-adds of one sample in the network as pruned: of those parameters, by torch's own counter"),
        Quantity("dense_parameters", "parameters before", (0, 0), 0, ("pruning",), _WHOLE,
                 "parameters of the network before anything was pruned"),
        Quantity("dense_multiply_adds", "multiply-adds before", (0, 0), 0, ("pruning",), _WHOLE,
                 "multiply-adds of one sample before anything was pruned"),
        Quantity("score_temperature", "T", (0, 0), 0, ("pruning",), _WHOLE,
                 "temperature of the loss in the event's importance measure"),
        Quantity("score_samples", "samples", (0, 0), 0, ("pruning",), _WHOLE,
                 "number of samples on which importance was measured"),
        Quantity("score", "score", (0, 0), 0, ("units", "scores"), _SCORE,
                 "importance of each unit by the event's measure, in scores by each; NaN where it was not scored"),
        Quantity("resampled_score", "score*", (0, 0), 0, ("scores",), _RESAMPLED,
                 "score of each unit on batches drawn again with replacement (bootstrap): its sampling noise"),
        Quantity("alive", "alive", (0, 0), 0, ("units",), _UNIT,
                 "whether the unit is left after the event"),
        Quantity("train_loss", "training loss", (0, 1), 0, ("epochs",), _WHOLE, "mean loss over the epoch's steps"),
        Quantity("train_accuracy", "training accuracy", (0, 0), 0, ("epochs",), _WHOLE,
                 "fraction of correct answers over the epoch's steps"),
        Quantity("test_loss", "test loss", (0, 1), 0, ("epochs",), _WHOLE, "mean loss on the test set"),
        Quantity("test_accuracy", "test accuracy", (0, 0), 0, ("epochs",), _WHOLE,
                 "fraction of correct answers on the test set"),
        Quantity("seconds", "seconds", (0, 0), 0, ("epochs",), _WHOLE, "wall-clock time of the epoch in seconds"),
    )
}  # fmt: skip


def quantities(node: str) -> list[Quantity]:
    """The rows of one node of the record, in the table's order."""
    return [row for row in QUANTITIES.values() if node in row.nodes]


def label(name: Any) -> str:
    """Axis label ``symbol [unit]`` of a quantity; the name itself when the table does not know it."""
    row = QUANTITIES.get(name)
    if row is None:
        return name
    return row.symbol if row.units == "1" else f"{row.symbol}  [{row.units}]"


def markdown_table() -> str:
    """The table of quantities in Markdown, as docs/record.md prints it."""
    lines = ["| variable | symbol | unit | order | where | meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for row in QUANTITIES.values():
        where = ", ".join(f"`/{node}`" for node in row.nodes)
        symbol = row.symbol.replace("|", "\\|")
        meaning = row.meaning.replace("|", "\\|")
        lines.append(f"| `{row.name}` | {symbol} | {row.units} | {row.order} | {where} | {meaning} |")
    return "\n".join(lines)
