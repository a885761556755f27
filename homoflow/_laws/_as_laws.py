"""The laws that a run records: those that a user passes, or those that are known."""

import dataclasses
import math
from collections.abc import Iterable

from .._problem._data import sample_shape
from .._problem._losses import Risk, SquaredLoss
from .._problem._problem import Problem
from ._default_laws import default_laws
from ._law import Law, Laws
from ._laws import known_laws
from ._layer_laws import follows_layers

#: Entries up to which a matrix law is recorded whole: at 101 times, a million numbers.
MAX_WHOLE = 10_000


def laws_to_record(problem: Problem, given: Iterable[Law] | None) -> Laws:
    """The laws `given`, or else those that the problem's model has.

    Those of homoflow's models are read off the layers, others are searched for. Of matrix
    laws of more than 10,000 entries that nobody has asked for, a summary is recorded.
    """
    if given is not None:
        return as_laws(given)
    return _summarize_large(_laws_of(problem), problem)


def _summarize_large(found: Laws, problem: Problem) -> Laws:
    """The laws, with those named that are too large to be recorded whole unasked."""
    large = [
        law.name
        for law in found
        if law.contraction == "matrix"
        and law.blocks == 1
        and math.prod(law.shape(problem.weights)) > MAX_WHOLE
    ]
    if not large:
        return found
    note = (
        f"Of {', '.join(large)}, with more than {MAX_WHOLE:,} entries, a run records norm, "
        "drift and diagonal, in `observed`. To record them whole, pass "
        "`laws=homoflow.laws(model, x_example)`."
    )
    notes = " ".join([found.note, note] if found.note else [note])
    return dataclasses.replace(found, note=notes, large=frozenset(large))


def _laws_of(problem: Problem) -> Laws:
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
