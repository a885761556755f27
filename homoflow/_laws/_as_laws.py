"""The laws that a run records: those that a user passes, or those that are known."""

from collections.abc import Iterable

from .._problem._data import sample_shape
from .._problem._losses import Risk, SquaredLoss
from .._problem._problem import Problem
from ._default_laws import default_laws
from ._law import Law, Laws
from ._laws import known_laws
from ._layer_laws import follows_layers


def laws_to_record(problem: Problem, given: Iterable[Law] | None) -> Laws:
    """The laws `given`, or else those that the problem's model has.

    Those of homoflow's models are read off the layers, others are searched for.
    """
    if given is not None:
        return as_laws(given)
    if not follows_layers(problem.model):
        return default_laws(problem)
    risk = problem.objective
    if isinstance(risk, Risk):
        example, loss, objective = sample_shape(problem.data[0]), risk.loss, None
    else:
        example, loss, objective = problem.data, SquaredLoss(), risk
    return known_laws(
        problem.model, example, loss, objective=objective, trainable=problem.mask
    )


def as_laws(given: Iterable[Law]) -> Laws:
    """Laws that a user passes, or an error if they are not laws."""
    if isinstance(given, Laws):
        return given
    items = tuple(given)
    for item in items:
        if not isinstance(item, Law):
            raise TypeError(
                f"`laws` must hold law objects as `homoflow.laws` returns them, not "
                f"{type(item).__name__}."
            )
    names = [law.name for law in items]
    if len(set(names)) < len(names):
        raise ValueError(f"Two of the laws have the same name: {names}.")
    return Laws(items)
