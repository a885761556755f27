"""The laws of any model: rescalings from its jaxpr, sums from its gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from ..._problem._losses import LossLike
from .._law import Law, Laws
from .._residuals import LIMIT, violation
from ..symmetry import Leaf, rescalings
from ._candidates import proposed_laws, renamed, unique_names
from ._linear_laws import linear_laws
from ._matrix_laws import promoted
from ._null_space import quadratic_laws
from ._random_points import FEWEST_POINTS, Probe, probe_loss, probe_objective
from ._vectorized import FlatProblem

#: How many (point, sample) pairs laws are certified at, and in how many samples a point.
_DRAWS, _SAMPLES = 32, 8
_FEWEST_USUAL, _MOST_USUAL = 4, 16
#: The most parameters for which every quadratic law is searched for.
_MOST_SEARCHED = 40
#: The violation above which a quantity is not even approximately conserved.
_APPROXIMATE = 1e-2


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
    probe = probe_of(model, mask, x_example, loss, objective, batched=batched)
    points = probe.points(_count(probe, x_example, batched))
    if len(points) < FEWEST_POINTS:
        return Laws(
            (),
            "No law can be certified: at hardly any random weights and data is the "
            "gradient finite and not 0.",
        )
    exact, arrays, opaque, has_epsilon = _structural(probe, batched, objective)
    certified = [law for law in exact if violation(law, points) <= LIMIT]
    certified = [promoted(law, points) for law in certified]
    certified += linear_laws(arrays, points)
    certified = unique_names(certified)
    certified += _unseen(probe, tuple(certified))
    nearly = ()
    if has_epsilon:
        nearly = _approximate(probe, batched, objective, exact, points)
    note = _note(exact, certified, opaque)
    return Laws(tuple(certified), note, nearly)


def probe_of(model, mask, x_example, loss, objective, *, batched: bool) -> Probe:
    """The training problem to certify laws against."""
    if objective is not None:
        return probe_objective(model, mask, x_example, objective)
    return probe_loss(model, mask, x_example, loss, batched=batched, samples=_SAMPLES)


def _structural(probe: Probe, batched, objective, *, ignores_small_constants=False):
    """Laws from the jaxpr, the arrays in them, and what the analysis met on its way."""
    weights, frozen = eqx.partition(probe.model, probe.mask)
    paths, structure = jax.tree_util.tree_flatten_with_path(weights)
    leaves = [Leaf(path, tuple(array.shape)) for path, array in paths]

    def function(arrays, x):
        model = eqx.combine(jax.tree.unflatten(structure, arrays), frozen)
        return model(x) if objective is None else objective(model, x)

    with jax.enable_x64(True):
        closed = jax.make_jaxpr(function)([array for _, array in paths], probe.example)
        found, arrays, opaque, has_epsilon = rescalings(
            closed, leaves, ignores_small_constants=ignores_small_constants
        )
    return proposed_laws(found, arrays), arrays, opaque, has_epsilon


def _approximate(probe, batched, objective, exact: list[Law], points):
    """What would be conserved if every small constant (ε) were zero, and nearly is."""
    nearly, *_ = _structural(probe, batched, objective, ignores_small_constants=True)
    known = {(law.formula, law.quadratic_terms) for law in exact}
    result = []
    for law in nearly:
        if (law.formula, law.quadratic_terms) in known:
            continue
        measured = violation(law, points)
        if LIMIT < measured <= _APPROXIMATE:
            result.append(renamed(law, violation=measured))
    return tuple(unique_names(result))


def _unseen(probe: Probe, known: tuple[Law, ...]) -> tuple[Law, ...]:
    """What the structure does not show, in a model that is small enough to search."""
    single = dataclasses.replace(probe, samples=min(probe.samples, 1))
    problem = FlatProblem(single)
    return quadratic_laws(problem, known) if problem.size <= _MOST_SEARCHED else ()


def _count(probe: Probe, x_example, batched: bool) -> int:
    rows = probe.samples or (_rows(x_example) if batched else 2)
    return max(_FEWEST_USUAL, min(_MOST_USUAL, -(-_DRAWS // rows)))


def _rows(x_example) -> int:
    shapes = [
        leaf.shape for leaf in jax.tree.leaves(x_example) if hasattr(leaf, "shape")
    ]
    return max((s[0] for s in shapes if s), default=1)


def _note(exact, certified, opaque: set[str]) -> str:
    notes = []
    lost = len(exact) - sum(bool(law.quadratic_terms) for law in certified)
    if lost > 0:
        notes.append(
            f"Left out: {lost} of the structure's laws, not conserved by the gradients "
            "that JAX computes in float64. A derivative rule that is not that of the "
            "function, or lower precision inside the model, breaks a law."
        )
    if not certified and not exact:
        names = ", ".join(sorted(opaque))
        because = f": the scale of what enters {names} is fixed" if names else ""
        notes.append(
            f"No rescaling of the weights leaves the function unchanged{because}."
        )
    return " ".join(notes)
