"""Numbers and facts about a run: one schema for every kind of run."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import equinox as eqx

from ._reason import Reason

#: Facts about a run, in order.
Facts = tuple[tuple[str, str | Reason], ...]
#: Error estimates are this factor times the difference to a coarser solve: with kinks the
#: error does not always fall in proportion, and where the two solves become unrelated
#: their distance may understate the error of either.
DIFFERENCE_SAFETY = 2.0


class Statistic(NamedTuple):
    """What one key of `stats` holds.

    - `type`: of its values, in words.
    - `routes`: the kinds of runs on which it may be known; on all others it is `None`.
    - `meaning`: in one sentence.
    """

    type: str
    routes: tuple[str, ...]
    meaning: str


#: The kinds of runs: `flow` of a smooth model, averaged over kinks, exact through kinks and
#: with `t1=inf`; `modified_flow`, `heavy_ball_flow`, `predict_drift`, `central_flow` and
#: `descend`.
ROUTES = (
    "smooth", "averaged", "exact", "stationary",
    "modified", "heavy_ball", "drift", "central", "descend",
)  # fmt: skip
_DIFFRAX = ("smooth", "averaged", "stationary", "modified", "heavy_ball", "drift")
_FLOWS = (*_DIFFRAX, "exact", "central")
_ESTIMATED = (
    "smooth", "averaged", "exact", "modified", "heavy_ball", "drift", "central",
)  # fmt: skip

SCHEMA: Mapping[str, Statistic] = MappingProxyType(
    {
        "solver": Statistic("text", _FLOWS, "The method that integrated the flow."),
        "solver_reason": Statistic(
            "a `homoflow.Reason`", _FLOWS, "Why that method was taken."
        ),
        "optimizer": Statistic("text", ("descend",), "The optimizer and its options."),
        "dynamics": Statistic("text", _FLOWS, "What moves the weights."),
        "time_unit": Statistic(
            "text",
            ROUTES,
            "What the times are: flow time, or the sum of learning rates.",
        ),
        "nonsmooth_ops": Statistic(
            "text", _FLOWS, "The operations at which the gradient jumps."
        ),
        "projection": Statistic(
            "text", _FLOWS, "Whether laws are restored by projection, and why."
        ),
        "sample_reduction": Statistic(
            "text",
            ("smooth", "stationary", "modified", "heavy_ball", "drift"),
            "How many samples stand for those that were given, where fewer do.",
        ),
        "computed_in": Statistic(
            "text",
            ("exact", "central"),
            "The precision, where that is not the dtype of the weights.",
        ),
        "laws_note": Statistic(
            "text", ROUTES, "Why there is no law to record, or none more."
        ),
        "steps": Statistic("integer", ROUTES, "Steps that were taken."),
        "rejected_steps": Statistic(
            "integer", _FLOWS, "Steps that were computed and not taken."
        ),
        "gradient_evaluations": Statistic(
            "number",
            ROUTES,
            "Evaluations of the gradient, or of the equation, if the solver tells.",
        ),
        "jacobian_evaluations": Statistic(
            "integer",
            _DIFFRAX,
            "Jacobians that an implicit or exponential solver computed.",
        ),
        "hessian_vector_products": Statistic(
            "number",
            ("modified", "central"),
            "Products of the Hessian with a vector.",
        ),
        "eigenvalue_searches": Statistic(
            "integer",
            ("central",),
            "How often the Hessian's largest eigenvalues were looked for.",
        ),
        "third_derivatives": Statistic(
            "integer",
            ("central",),
            "Derivatives D³L[u, v] of the Hessian that were computed.",
        ),
        "edge_events": Statistic(
            "integer",
            ("central",),
            "How often an eigenvalue came to the edge of stability or left it.",
        ),
        "edge_cycles": Statistic(
            "number",
            ("central",),
            "How many cycles descent's oscillation at the edge is expected to have.",
        ),
        "edge_overshoot": Statistic(
            "number",
            ("central",),
            "By how much of the threshold the sharpness of descent is expected to "
            "overshoot it when the oscillation sets in.",
        ),
        "edge_shift": Statistic(
            "number",
            ("central",),
            "How far from the threshold, relative to it, descent's sharpness is expected "
            "to be because of how wide the oscillation is, at most.",
        ),
        "edge_lag": Statistic(
            "number",
            ("central",),
            "How far descent falls behind the flow in the steep part at the start, "
            "relative to the way that the weights go.",
        ),
        "forward_passes": Statistic(
            "integer", ("exact",), "Evaluations of the pre-activations at all samples."
        ),
        "time_reached": Statistic(
            "time", ROUTES, "The time up to which the run is known."
        ),
        "diverged_at_step": Statistic(
            "integer",
            ("descend",),
            "The step at which the loss became inf or NaN; −1 if none.",
        ),
        "clock_defect": Statistic(
            "number",
            ("descend",),
            "How far the steps are from steps of the flow, as a part of a step: 0 where "
            "the times are flow time.",
        ),
        "law_violation": Statistic(
            "number",
            ROUTES,
            "How far the objective is from having the recorded laws: the largest "
            "relative part of the gradient along which one would change.",
        ),
        "projected_drift": Statistic(
            "number",
            _DIFFRAX,
            "The largest drift of laws that projection removed, relative to ‖w‖².",
        ),
        "error_estimate": Statistic(
            "number", _ESTIMATED, "The estimated relative error of the final weights."
        ),
        "loss_error_estimate": Statistic(
            "number", _ESTIMATED, "The estimated largest absolute error of the losses."
        ),
        "drift_error_estimate": Statistic(
            "number",
            ("drift",),
            "The estimated relative error of the integrals of drift.",
        ),
        "mass": Statistic(
            "number", ("heavy_ball",), "The mass m of m·d²w/dt² + dw/dt = −∇L."
        ),
        "crossings": Statistic(
            "integer", ("exact",), "How often a pre-activation passed its kink."
        ),
        "entries": Statistic(
            "integer",
            ("exact",),
            "How often a pre-activation began to slide along its kink.",
        ),
        "exits": Statistic(
            "integer", ("exact",), "How often a pre-activation ceased to slide."
        ),
        "largest_sliding_set": Statistic(
            "integer",
            ("exact",),
            "The most pairs of a sample and a unit that slid at one time.",
        ),
        "num_nonunique_pairs": Statistic(
            "integer",
            ("exact",),
            "How many pairs of a sample and a unit had, or may have had, a choice.",
        ),
        "forced_steps": Statistic(
            "integer",
            ("exact",),
            "How often no way on was found and the last velocity was followed.",
        ),
        "first_nonunique_time": Statistic(
            "time",
            ("exact",),
            "The time of the first choice or forced step; NaN if there was none.",
        ),
        "stationary_kind": Statistic(
            "a member of `homoflow.StationaryKind`",
            ("stationary",),
            "What kind of point the flow came to.",
        ),
        "stationary_loss": Statistic(
            "number", ("stationary",), "The loss at that point."
        ),
        "gradient_norm": Statistic("number", ("stationary",), "‖∇L‖ at that point."),
        "smallest_eigenvalue": Statistic(
            "number", ("stationary",), "The smallest eigenvalue of the Hessian there."
        ),
        "largest_eigenvalue": Statistic(
            "number", ("stationary",), "The largest eigenvalue of the Hessian there."
        ),
        "eigenvalue_threshold": Statistic(
            "number",
            ("stationary",),
            "The size up to which an eigenvalue counts as zero.",
        ),
        "zero_eigenvalues": Statistic(
            "integer",
            ("stationary",),
            "How many eigenvalues are zero; −1 if not counted.",
        ),
        "symmetry_zero_eigenvalues": Statistic(
            "integer",
            ("stationary",),
            "How many of those the symmetries behind laws explain.",
        ),
        "polish_distance": Statistic(
            "number",
            ("stationary",),
            "How far Newton's method moved the flow's end, relative to ‖w‖.",
        ),
        "log_time_reached": Statistic(
            "number",
            ("stationary",),
            "The logarithm of the time up to which separable data were followed.",
        ),
        "normalized_margin": Statistic(
            "number",
            ("stationary",),
            "The smallest margin of the direction in which the weights diverge.",
        ),
        "kkt_residual": Statistic(
            "number",
            ("stationary",),
            "How far that direction is from fulfilling the conditions of a maximal margin.",
        ),
        "direction_distance": Statistic(
            "number",
            ("stationary",),
            "How far the flow's direction was from it at last, a length of unit vectors.",
        ),
    }
)


class Stats(eqx.Module, Mapping):
    """Numbers and facts about a run, read like a dictionary.

    Every run answers the same keys, those of `homoflow.Stats.schema`; where one does not
    apply it is `None`. The numbers are arrays, or members of an enumeration, and gain an
    axis under vmap. The facts (strings such as the solver's name, and the reason why it
    was chosen) are the same for a whole batch.
    """

    schema: ClassVar[Mapping[str, Statistic]] = SCHEMA

    numbers: dict[str, Any]
    facts: Facts = eqx.field(static=True, default=())

    def __check_init__(self) -> None:
        for key in (*self.numbers, *(name for name, _ in self.facts)):
            if key not in SCHEMA:
                raise ValueError(f"No run has a statistic {key!r}: add it to `SCHEMA`.")

    def __getitem__(self, key: str) -> Any:
        for name, fact in self.facts:
            if name == key:
                return fact
        if key not in SCHEMA:
            raise KeyError(f"No statistic {key!r}: there are {list(SCHEMA)}.")
        return self.numbers.get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(SCHEMA)

    def __len__(self) -> int:
        return len(SCHEMA)

    def with_facts(self, facts: Facts) -> "Stats":
        """These and more facts, which come first."""
        return Stats(self.numbers, (*facts, *self.facts))

    def with_numbers(self, **numbers: Any) -> "Stats":
        """These and more numbers, in place of those of the same names."""
        return Stats({**self.numbers, **numbers}, self.facts)

    def __repr__(self) -> str:
        known = [name for name in self if self[name] is not None]
        items = "\n".join(f"  {name}: {self[name]}" for name in known)
        return f"Stats(\n{items}\n)"
