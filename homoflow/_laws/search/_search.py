"""The laws of any model: rescalings from its jaxpr, sums from its gradients."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..._problem._losses import LossLike
from .._law import Law, Laws
from .._residuals import MAX_RESIDUAL, is_conserved, max_relative_residual
from ..symmetry import Leaf, find_rescalings
from ._candidates import Candidate, make_names_unique, propose_laws
from ._linear_laws import linear_laws
from ._matrix_laws import extend_to_pairs
from ._quadratic_laws import Found, quadratic_laws
from ._random_points import (
    MIN_POINTS,
    Point,
    Probe,
    is_usual,
    probe_loss,
    probe_objective,
)
from ._slices import refer_to_arrays
from ._vectorized import VectorizedProblem

#: How many (point, sample) pairs laws are certified at, and in how many samples a point.
_NUM_DRAWS, _NUM_SAMPLES = 32, 8
_MIN_USUAL, _MAX_USUAL = 4, 16
#: The residual above which a quantity is not even approximately conserved.
_MAX_APPROXIMATE = 1e-2


class Structure(NamedTuple):
    """What the jaxpr of a model shows.

    - `candidates`: quantities that its rescalings conserve.
    - `leaves`: the arrays of parameters, or the slices that loops take them apart into.
    - `opaque`: names of operations that hide parameters from the analysis.
    - `has_small_constants`: whether x + ε was met.
    """

    candidates: list[Candidate]
    leaves: list[Leaf]
    opaque: set[str]
    has_small_constants: bool


def search(
    model: PyTree,
    mask: PyTree,
    x_example: PyTree,
    loss: LossLike,
    objective: Callable[[PyTree, PyTree], Any] | None,
    *,
    batched: bool,
) -> Laws:
    """Every law that the structure of the model shows, certified numerically."""
    probes = make_probes(model, mask, x_example, loss, objective, batched=batched)
    probe = probes[0]
    if not probe.size:
        return Laws((), "No weights are trained: the trained arrays are all empty.")
    count = _count_points(probe, x_example, batched=batched)
    by_kind = [p.draw_points(count) for p in probes]
    points = [point for points in by_kind for point in points]
    if min(map(len, by_kind)) < MIN_POINTS:
        return Laws(
            (),
            "No law can be certified: at hardly any random weights and data is the "
            "gradient finite and not 0. There may be laws all the same.",
        )
    structure = _analyze_structure(probe, objective)
    candidates = [c for c in structure.candidates if is_conserved(c.law(), points)]
    found = [law for c in candidates for law in extend_to_pairs(c, points)]
    found += linear_laws(structure.leaves, points, _find_untouched(probe))
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(probe.trained)[0]
    }
    found = [refer_to_arrays(law, shapes) for law in make_names_unique(found)]
    searched = quadratic_laws(VectorizedProblem(probe), found, points)
    found += searched.laws
    approximate = ()
    if structure.has_small_constants:
        approximate = _approximate_laws(probe, objective, structure, points)
    note = _note(probe, structure, len(candidates), found, searched)
    return Laws(tuple(found), note, approximate)


def make_probes(model, mask, x_example, loss, objective, *, batched: bool):
    """The training problem to certify laws against, for each kind of targets."""
    if objective is not None:
        return [probe_objective(model, mask, x_example, objective)]
    return probe_loss(
        model, mask, x_example, loss, batched=batched, samples=_NUM_SAMPLES
    )


def _find_untouched(probe: Probe) -> Callable[[Leaf], bool]:
    """Whether no derivative flows to an array, as the traced gradient shows it."""

    @functools.cache
    def untouched() -> list[tuple]:
        paths = jax.tree_util.tree_flatten_with_path(probe.trained)[0]
        unused = probe.find_unused()
        return [path for (path, _), u in zip(paths, unused, strict=True) if u]

    def is_untouched(leaf: Leaf) -> bool:
        return any(leaf.path[: len(path)] == path for path in untouched())

    return is_untouched


def _analyze_structure(
    probe: Probe, objective, *, ignores_small_constants: bool = False
) -> Structure:
    weights, frozen = eqx.partition(probe.model, probe.mask)
    paths, structure = jax.tree_util.tree_flatten_with_path(weights)
    leaves = [Leaf(path, tuple(array.shape)) for path, array in paths]

    def function(arrays, x):
        model = eqx.combine(jax.tree.unflatten(structure, arrays), frozen)
        return model(x) if objective is None else objective(model, x)

    with jax.enable_x64(True):
        closed = jax.make_jaxpr(function)([array for _, array in paths], probe.example)
        found = find_rescalings(
            closed, leaves, ignores_small_constants=ignores_small_constants
        )
    return Structure(
        propose_laws(found.families, found.leaves),
        found.leaves,
        found.opaque,
        found.has_small_constants,
    )


def _approximate_laws(
    probe: Probe, objective, exact: Structure, points: list[Point]
) -> tuple[Law, ...]:
    """What would be conserved if every small constant (ε) were zero, and nearly is."""
    nearly = _analyze_structure(probe, objective, ignores_small_constants=True)
    known = {(c.terms, c.slices) for c in exact.candidates}
    result = []
    for candidate in nearly.candidates:
        if (candidate.terms, candidate.slices) in known:
            continue
        law = candidate.law()
        residual = max_relative_residual(law, filter(is_usual, points))
        if MAX_RESIDUAL < residual <= _MAX_APPROXIMATE:
            result.append(dataclasses.replace(law, violation=residual))
    return tuple(make_names_unique(result))


def _count_points(probe: Probe, x_example, *, batched: bool) -> int:
    rows = probe.samples or (_count_rows(x_example) if batched else 2)
    return max(_MIN_USUAL, min(_MAX_USUAL, -(-_NUM_DRAWS // rows)))


def _count_rows(x_example) -> int:
    leaves = jax.tree.leaves(x_example)
    shapes = [leaf.shape for leaf in leaves if hasattr(leaf, "shape")]
    return max((s[0] for s in shapes if s), default=1)


def _note(
    probe: Probe,
    structure: Structure,
    num_certified: int,
    found: Sequence[Law],
    searched: Found,
) -> str:
    notes = []
    if (lost := len(structure.candidates) - num_certified) > 0:
        notes.append(
            f"Left out: {lost} of the structure's laws, not conserved by the gradients "
            "that JAX computes in float64. A derivative rule that is not that of the "
            "function, or lower precision inside the model, breaks a law."
        )
    if searched.has_unreached:
        notes.append(
            "To some weights no gradient came at any random weights and data, so that "
            "nothing is said of them."
        )
    if searched.has_refuted:
        notes.append(
            "More may exist: what the numerical search has proposed did not all hold at "
            "other weights and data, and may have hidden laws that do."
        )
    if searched.is_exhaustive:
        if not found:
            notes.append(f"No quadratic law was found{_because(structure)}.")
        return " ".join(notes)
    if not found:
        notes.append(f"No law was found{_because(structure)}.")
    notes.append(
        f"More may exist: of {probe.size} weights not every quadratic law was looked "
        "for, only "
        + (
            "those of the structure, of sums, and of arrays joined along an axis."
            if searched.is_searched
            else "those of the structure and of sums."
        )
    )
    return " ".join(notes)


def _because(structure: Structure) -> str:
    """What the structure says of why there is no rescaling."""
    if structure.candidates:
        return ""
    names = ", ".join(sorted(structure.opaque))
    because = f", as the scale of what enters {names} is taken to be fixed"
    return ": no rescaling of whole units leaves the function unchanged" + (
        because if names else ""
    )
