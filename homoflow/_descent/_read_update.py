"""What an optimizer's update is made of, read off its program on the run itself.

The update is traced at the true shapes, and evaluated operation by operation. Beside each
array goes what is known of it: the linear combination of gradient, memory and weights
that it is, as far as it is one. So coefficients are those of this very step: of schedules,
conditions and searches along a line too. What is not understood is never guessed: it is
a rest, of which it is known what it was made of.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._jaxpr._interpreter import evaluate_equation, inner_jaxprs, interpret
from .._jaxpr._primitives import TRANSPARENT_CALLS
from ._flat_memory import (
    TrackedArray,
    are_separable,
    by_piece,
    join_memory,
    rearranged,
    spread_memory,
)
from ._linear_form import NOISE, NOTHING, Coefficients, Form, Source, Sources
from ._unchanged import unless_changed

#: Entry by entry, so that equal entries stay equal.
_ELEMENTWISE = frozenset(
    {
        "abs", "add", "add_any", "and", "convert_element_type", "copy", "cos", "div", "eq",
        "exp", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "lt", "max",
        "min", "mul", "ne", "neg", "not", "or", "pow", "rsqrt", "select_n", "sign", "sin",
        "sqrt", "square", "sub", "tanh",
    }
)  # fmt: skip
#: Hand an array on, up to rounding.
_SAME = frozenset({"copy", "convert_element_type", "reduce_precision"})
#: Draw random numbers, from keys that are settings.
_DRAWS = frozenset(
    {"random_bits", "random_gamma", "rng_bit_generator", "rng_uniform", "threefry2x32"}
)
_FOLDED: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "convert_element_type": lambda a: a,
    "copy": lambda a: a,
    "broadcast_in_dim": lambda a: a,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "square": lambda a: a * a,
    "sub": lambda a, b: a - b,
}


class Reading(NamedTuple):
    """An update and the state after it, and what they are made of.

    - `updates`: the form of each leaf of the update.
    - `remembered`: the arrays of the state before it; vectors of all weights are cut into
        arrays like the weights.
    - `memory`: the form of each array of the new state that is memory, by its number
        among those.
    - `owners`: of memory kept for one array of weights, which of them.
    - `coefficients`: how to go on computing with the coefficients.
    """

    update: PyTree
    state: PyTree
    updates: list[Form]
    remembered: list
    memory: dict[int, Form]
    owners: dict[int, int]
    coefficients: Coefficients


def read_update(
    update_fn: Callable, gradient: PyTree, state: PyTree, weights: PyTree, value: Any
) -> Reading:
    """`update_fn(gradient, state, weights, value)`, evaluated and read.

    It returns an update like the weights, and the next state like the state.
    """
    joined = jax.tree.structure(state)

    def spread(state: PyTree) -> PyTree:
        return spread_memory(state, weights, set(memory_owners(state, weights)))

    def update_spread(gradient, state, weights, value):
        update, after = update_fn(gradient, join_memory(state, joined), weights, value)
        return update, spread(after)

    state = spread(state)
    owners = memory_owners(state, weights)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes on purpose.
        traced, shapes = jax.make_jaxpr(update_spread, return_shape=True)(
            gradient, state, weights, value
        )
        reader = _Reader(weights, owners)
        results = interpret(
            traced,
            reader.inputs(gradient, state, weights, value),
            reader.visit,
            reader.lift_constant,
        )
    arrays = [result.array for result in results]
    update, new_state = jax.tree.unflatten(jax.tree.structure(shapes), arrays)
    split = len(jax.tree.leaves(update))
    return Reading(
        update,
        join_memory(new_state, joined),
        [result.as_form(result.array) for result in results[:split]],
        jax.tree.leaves(state),
        {
            i: result.as_form(result.array)
            for i, result in enumerate(results[split:])
            if is_memory(result.array, i, owners)
        },
        owners,
        reader.coefficients,
    )


def is_memory(leaf: Any, index: int, owners: dict[int, int]) -> bool:
    """Whether a leaf of the state remembers gradients, rather than being a setting."""
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return is_float and (jnp.ndim(leaf) > 0 or index in owners)


def memory_owners(state: PyTree, weights: PyTree) -> dict[int, int]:
    """Which array of weights each array of the state is kept for.

    Its place ends as that of the weights does, and it has the same shape.
    """
    places = [
        (tuple(map(str, path)), jnp.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    ]
    owners = {}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            continue
        names = tuple(map(str, path))
        fitting = [
            (len(place), j)
            for j, (place, shape) in enumerate(places)
            if shape == jnp.shape(leaf) and names[len(names) - len(place) :] == place
        ]
        if fitting:
            owners[i] = max(fitting)[1]
    return owners


class _Reader:
    """Follows the arrays of one update."""

    def __init__(self, weights: PyTree, owners: dict[int, int]) -> None:
        self.coefficients = Coefficients()
        self._owners = owners
        #: What is made of these alone is an entry of a weight that is a number.
        self._scalars = [
            frozenset(
                {
                    Source("gradient", i),
                    Source("weights", i),
                    *(Source("memory", j) for j, owner in owners.items() if owner == i),
                }
            )
            for i, leaf in enumerate(jax.tree.leaves(weights))
            if jnp.ndim(leaf) == 0
        ]

    def inputs(self, gradient, state, weights, value) -> list[TrackedArray]:
        def lift(kind, tree):
            return [
                self._source(Source(kind, i), leaf)
                if kind != "memory" or is_memory(leaf, i, self._owners)
                else self._setting(leaf)
                for i, leaf in enumerate(jax.tree.leaves(tree))
            ]

        return [
            *lift("gradient", gradient),
            *lift("memory", state),
            *lift("weights", weights),
            *(self._setting(leaf) for leaf in jax.tree.leaves(value)),
        ]

    def _source(self, source: Source, leaf: Any) -> TrackedArray:
        tracked = self._setting(leaf)
        form = Form({source: 1.0})
        return tracked._replace(sources=frozenset({source}), form=form)

    def _setting(self, leaf: Any) -> TrackedArray:
        self.coefficients.mark_varying(leaf)
        return TrackedArray(leaf, entry=leaf if jnp.ndim(leaf) == 0 else None)

    def lift_constant(self, number: Any) -> TrackedArray:
        if jnp.ndim(number) != 0:
            return TrackedArray(number)
        is_known = isinstance(number, bool | int | float | np.generic | np.ndarray)
        return TrackedArray(
            number, entry=number, number=float(number) if is_known else None
        )

    def visit(self, eqn, operands: list[TrackedArray], _: Any) -> list[TrackedArray]:
        """The results of one operation."""
        name = eqn.primitive.name
        if name in TRANSPARENT_CALLS:
            body = next(inner_jaxprs(eqn))
            return interpret(body, operands, self.visit, self.lift_constant)
        if name == "cond":
            return self._visit_condition(eqn, operands)
        arrays = self._evaluate(eqn, [o.array for o in operands], operands)
        sources = (NOISE if name in _DRAWS else NOTHING).union(
            *(o.sources for o in operands)
        )
        moved = rearranged(eqn, operands, arrays, sources)
        if moved is not None:
            return moved
        if len(arrays) == 1:
            return [self._result(eqn, operands, arrays[0], sources)]
        return [
            TrackedArray(a, sources, entry=a if jnp.ndim(a) == 0 else None)
            for a in arrays
        ]

    def _evaluate(self, eqn, arrays: list, operands: list[TrackedArray]) -> list:
        """The arrays; those of numbers only once."""
        is_small = all(jnp.ndim(a) == 0 for a in arrays)
        varies = any(self.coefficients.is_varying(a) for a in arrays)
        if is_small and len(eqn.outvars) == 1 and arrays:
            try:
                key = (eqn.primitive.name, *sorted(eqn.params.items(), key=str))
                hash(key)
            except TypeError:
                key = None
            if key is not None and eqn.outvars[0].aval.shape == ():
                known = [
                    a if o.number is None else (o.number, str(v.aval.dtype))
                    for a, o, v in zip(arrays, operands, eqn.invars, strict=True)
                ]
                return [
                    self.coefficients.keep(
                        key, known, lambda: evaluate_equation(eqn, arrays)[0]
                    )
                ]
        results = evaluate_equation(eqn, arrays)
        if varies or any(jnp.ndim(a) for a in arrays) or not arrays:
            for result in results:
                self.coefficients.mark_varying(result)
        return results

    def _visit_condition(self, eqn, operands) -> list[TrackedArray]:
        which, *arguments = operands
        branches = eqn.params["branches"]
        if which.number is not None:
            chosen = branches[int(np.clip(which.number, 0, len(branches) - 1))]
            return interpret(chosen, arguments, self.visit, self.lift_constant)
        arrays = evaluate_equation(eqn, [o.array for o in operands])
        cases = [
            interpret(branch, arguments, self.visit, self.lift_constant)
            for branch in branches
        ]
        results = []
        for i, array in enumerate(arrays):
            self.coefficients.mark_varying(array)
            outcomes = [case[i] for case in cases]
            result = TrackedArray(
                array,
                NOTHING.union(*(o.sources for o in outcomes)),
                entry=array if jnp.ndim(array) == 0 else None,
            )
            results.append(
                by_piece(
                    result,
                    outcomes,
                    lambda r, o: self._chosen(r, which.coefficient, o),
                )
            )
        return results

    def _chosen(self, result, which, outcomes: list[TrackedArray]) -> TrackedArray:
        if all(o.form is None for o in outcomes):
            return result
        forms = [o.as_form(result.array) for o in outcomes]
        return result._replace(form=self.coefficients.chosen(which, forms))

    def _result(self, eqn, operands, array, sources: Sources) -> TrackedArray:
        name = eqn.primitive.name
        entry, number = self._entry(eqn, operands, array)
        result = TrackedArray(array, sources, None, entry, number)
        first = operands[0] if operands else None
        if first is None:
            return result
        if name in _SAME or name == "broadcast_in_dim":
            result = result._replace(
                is_power=first.is_power, is_correction=first.is_correction
            )
        elif name == "pow":
            is_count = jnp.issubdtype(jnp.result_type(operands[1].array), jnp.integer)
            result = result._replace(is_power=is_count)
        elif name == "sub":
            is_correction = first.number == 1 and operands[1].is_power
            result = result._replace(is_correction=is_correction)
        if name in _ELEMENTWISE:
            return by_piece(result, operands, lambda r, o: self._with_form(eqn, o, r))
        return self._with_form(eqn, operands, result)

    def _entry(self, eqn, operands, array) -> tuple[Any, float | None]:
        """The one entry of the result, and its value if it is known."""
        name = eqn.primitive.name
        numbers = [o.number for o in operands]
        number = None
        if name in _FOLDED and None not in numbers:
            number = float(_FOLDED[name](*numbers))
        if jnp.ndim(array) == 0:
            return array, number
        entries = [o.entry for o in operands]
        if not entries or any(entry is None for entry in entries):
            return None, None
        if name in ("broadcast_in_dim", "reshape"):
            return entries[0], number
        if name not in _ELEMENTWISE:
            return None, None
        entries = [
            jnp.asarray(entry, v.aval.dtype)
            for entry, v in zip(entries, eqn.invars, strict=True)
        ]
        (entry,) = evaluate_equation(eqn, entries)
        self.coefficients.mark_varying(entry)
        return entry, number

    def _with_form(self, eqn, operands, result: TrackedArray) -> TrackedArray:
        """The result with its form, if the operation is linear."""
        name, algebra = eqn.primitive.name, self.coefficients
        match name, operands:
            case (_, [a]) if _is_same(eqn) and a.form is not None:
                return result._replace(form=a.form)
            case ("neg", [a]) if a.form is not None:
                return result._replace(form=algebra.scaled(a.form, self._times(-1.0)))
            case ("add" | "add_any" | "sub", [a, b]) if are_separable(a, b):
                forms = a.as_form(result.array), b.as_form(result.array)
                if name == "sub":
                    forms = forms[0], algebra.scaled(forms[1], self._times(-1.0))
                return result._replace(form=algebra.added(*forms))
            case ("mul", [a, b]):
                for array, factor in ((a, b), (b, a)):
                    if self._is_coefficient(factor, array):
                        return self._scaled(
                            result, array, self._times(factor.coefficient)
                        )
            case ("div", [a, b]) if self._is_coefficient(b, a):
                return self._divided(result, a, b)
            case ("select_n", [which, *cases]):
                if self._is_coefficient(which, result):
                    sources = NOTHING.union(*(case.sources for case in cases))
                    result = result._replace(sources=sources)
                    return self._chosen(result, which.coefficient, cases)
                return unless_changed(result, cases, algebra)
            case ("max" | "min", _):
                return unless_changed(result, operands, algebra)
        return result

    def _times(self, factor: Any) -> Callable[[Any], Any]:
        return lambda c: self.coefficients.product(factor, c)

    def _scaled(self, result, array: TrackedArray, by: Callable) -> TrackedArray:
        if array.entry is None:
            result = result._replace(sources=array.sources)
        if array.form is None:
            return result
        return result._replace(form=self.coefficients.scaled(array.form, by))

    def _divided(self, result, a: TrackedArray, b: TrackedArray) -> TrackedArray:
        result = self._scaled(
            result, a, lambda c: self.coefficients.quotient(c, b.coefficient)
        )
        if result.form is None or not b.is_correction:
            return result
        corrected = result.form.corrected | {frozenset(result.form.terms)}
        return result._replace(form=result.form._replace(corrected=corrected))

    def _is_coefficient(self, factor: TrackedArray, array: TrackedArray) -> bool:
        """Whether a factor multiplies all of an array by the same number.

        Of a weight that is a number alone, what is made of it is an entry of its own.
        """
        if factor.entry is None:
            return False
        if jnp.ndim(array.array) > 0:
            return True
        is_entry = factor.sources and any(
            factor.sources <= own for own in self._scalars
        )
        return not is_entry


def _is_same(eqn) -> bool:
    name = eqn.primitive.name
    if name == "integer_pow":
        return eqn.params["y"] == 1
    is_float = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    return name in _SAME and is_float
