"""Operations that hand an array on, unless they change some of its entries.

A clip in which no entry is too large gives the array that it was given, and so does a
replacement of NaN where there is none. Whether it is so is found on each step.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from ._flat_memory import TrackedArray
from ._linear_form import Coefficients, Form, Rest


def unless_changed(
    result: TrackedArray, operands: Sequence[TrackedArray], algebra: Coefficients
) -> TrackedArray:
    """`result` with the form of an operand that it is equal to, else all of it a rest.

    Only of what comes of several sources. What comes of the gradient alone is compared
    with the gradient itself.
    """
    kinds = {source.kind for source in result.sources}
    known = [
        (operand.array, operand.form)
        for operand in operands
        if operand.form is not None
        and jnp.shape(operand.array) == jnp.shape(result.array)
    ]
    if len(kinds) < 2 or not known:
        return result
    rest = Rest(1.0, result.array, result.sources, is_exception=True)
    form = Form({}, (rest,))
    for array, its_form in known:
        is_same = jnp.all(result.array == array)
        algebra.mark_varying(is_same)
        form = algebra.chosen(is_same, [form, its_form])
    return result._replace(form=form)
