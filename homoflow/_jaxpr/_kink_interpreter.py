"""One pass through a jaxpr that exposes its kinks."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from ._constants_and_signs import abstract_constant, abstract_result
from ._custom_rules import has_reverse_rule
from ._elementwise_relations import has_jump, record_relations
from ._interpreter import (
    Site,
    evaluate_equation,
    function_name,
    inner_jaxprs,
    interpret,
    is_of_jax_nn,
)
from ._kink_rules import apply_kink_rule, is_elu
from ._kink_tape import KinkTape, Overrides
from ._primitives import (
    CUSTOM_RULES,
    JUMPS,
    KEEPS_ORDER,
    MOVES_ENTRIES,
    TRANSPARENT_CALLS,
)
from ._smoothness import (
    ACTIVATIONS,
    Dependence,
    find_kinks,
    is_smooth_call,
    is_smoothed_by_uses,
)
from ._traced_value import TracedValue, make_pending
from ._weight_products import Convolution, MatrixProduct, find_weight_product

#: Functions whose own derivative rule is that of their body off the kinks.
_RULE_AGREES_WITH_BODY = frozenset({"relu", "relu6"})


class KinkInterpreter:
    """The outputs of a jaxpr with its kinks exposed, and what was met on the way.

    - `tape`: the kinks.
    - `products`, `vectors`: the weights' products, and by leaf the vector or image that a
        weight is multiplied with; `uses`: how often each weight enters.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        leaves: Sequence,
        num_weights: int,
        overrides: Overrides,
    ):
        self.tape = KinkTape(overrides)
        self.uses: Counter[int] = Counter()
        self.products: list[MatrixProduct | Convolution] = []
        self.vectors: dict[int, Array] = {}
        self._taps = overrides.taps or {}
        values = [
            TracedValue(a, depends=i < num_weights, leaf=i if i < num_weights else None)
            for i, a in enumerate(leaves)
        ]
        visit = functools.partial(self._visit, callers=())
        outputs = interpret(closed, values, visit, _trace_constant)
        self.outputs = [self.tape.evaluate(v).array for v in outputs]
        self._count_uses(outputs)

    def preactivations(self, like: Array) -> Array:
        """All z in one vector; `like` has its type, should there be none."""
        z = self.tape.z
        return jnp.concatenate([part.ravel() for part in z]) if z else like

    def _visit(
        self,
        eqn,
        operands: list[TracedValue],
        site: Site,
        *,
        callers: tuple[str, ...],
    ) -> list[TracedValue]:
        """The results of an equation inside the functions `callers`."""
        # What several operations use is evaluated once, for all of them.
        operands = [
            v if is_only_use else self.tape.evaluate(v)
            for v, is_only_use in zip(operands, site.is_only_use, strict=True)
        ]
        dependences = [Dependence(v.depends, v.abstract) for v in operands]
        body, inputs = _body_of(eqn, operands, dependences, site)
        if body is not None:
            callers = (*callers, function_name(eqn))
            visit = functools.partial(self._visit, callers=callers)
            return interpret(
                body, inputs, visit, _trace_constant, site.is_differentiated
            )
        if any(v.depends for v in operands) and has_reverse_rule(eqn):
            name = function_name(eqn) or eqn.primitive.name
            self.tape.unsupported.add(f"{name} (without forward-mode derivatives)")
        kinks, _ = find_kinks(eqn, dependences, site)
        if not kinks:
            return self._move_pending(eqn, operands) or self._bind(eqn, operands)
        name = _name_for_people(eqn, callers)
        result = apply_kink_rule(self.tape, eqn, operands, name)
        if result is not None:
            self._count_uses(operands)
            return [result]
        self.tape.unsupported |= _unsupported_names(eqn, operands, kinks)
        return self._bind(eqn, operands)

    def _bind(self, eqn, operands: list[TracedValue]) -> list[TracedValue]:
        """The results of an equation as it stands."""
        operands = [self.tape.evaluate(v) for v in operands]
        self._count_uses(operands)
        arrays = evaluate_equation(eqn, [v.array for v in operands])
        is_stopped = eqn.primitive.name == "stop_gradient"
        depends = not is_stopped and any(v.depends for v in operands)
        depth = max((v.depth for v in operands), default=0)
        results = [TracedValue(a, depends, depth) for a in arrays]
        if results:
            results[0].abstract = abstract_result(eqn, [v.abstract for v in operands])
            record_relations(eqn, operands, results[0])
            self._record_product(eqn, operands, results[0])
        return results

    def _move_pending(
        self, eqn, operands: list[TracedValue]
    ) -> list[TracedValue] | None:
        """A pending value with its entries moved about is still pending."""
        if eqn.primitive.name not in MOVES_ENTRIES or len(operands) != 1:
            return None
        (value,) = operands
        if not value.is_pending:
            return None
        base, p = value.origin
        if not p.is_known or eqn.outvars[0].aval.size != base.array.size:
            return None
        (moved,) = self._bind(eqn, [base])
        keeps_order = eqn.primitive.name in KEEPS_ORDER
        shape = (value.kink_shape or base.array.shape) if keeps_order else None
        pending = make_pending(moved, p)
        return [dataclasses.replace(pending, name=value.name, kink_shape=shape)]

    def _count_uses(self, values: list[TracedValue]) -> None:
        self.uses.update(v.leaf for v in values if v.leaf is not None)

    def _record_product(
        self, eqn, operands: list[TracedValue], result: TracedValue
    ) -> None:
        product = find_weight_product(eqn, operands)
        if product is None:
            return
        leaf, (vector,) = product.leaf, (v for v in operands if v.leaf != product.leaf)
        self.products.append(product)
        self.vectors[leaf] = vector.array
        if leaf in self._taps:
            result.array = result.array + self._taps[leaf]


def _trace_constant(number: Any) -> TracedValue:
    return TracedValue(number, abstract=abstract_constant(number))


def _name_for_people(eqn, callers: tuple[str, ...]) -> str:
    """That of the innermost activation function around an equation, or its own."""
    names = [function_name(eqn), *reversed(callers)]
    activations = (name for name in names if name in ACTIVATIONS)
    return next(activations, eqn.primitive.name)


def _body_of(
    eqn, operands: list[TracedValue], dependences: list[Dependence], site: Site
) -> tuple[ClosedJaxpr | None, list[TracedValue]]:
    """The jaxpr that an equation is no more than a call of, and its inputs."""
    name = eqn.primitive.name
    if name == "cond":
        index = operands[0].abstract.constant
        if index is None:
            return None, operands
        branches = eqn.params["branches"]
        return branches[min(max(int(index), 0), len(branches) - 1)], operands[1:]
    if name in TRANSPARENT_CALLS:
        is_call = not is_smooth_call(eqn, dependences) and not is_elu(eqn)
    elif name in CUSTOM_RULES:
        is_call = function_name(eqn) in _RULE_AGREES_WITH_BODY and is_of_jax_nn(eqn)
    else:
        is_call = False
    if not is_call or is_smoothed_by_uses(site.jaxpr, eqn):
        return None, operands
    return next(inner_jaxprs(eqn)), operands


def _unsupported_names(eqn, operands: list[TracedValue], kinks: set[str]) -> set[str]:
    """What to call an operation that cannot be followed."""
    name = eqn.primitive.name
    if name in CUSTOM_RULES:
        return {function_name(eqn) or name}
    if next(inner_jaxprs(eqn), None) is not None:
        return {f"{inner} in {name}" for inner in kinks}
    is_jump = name in JUMPS or name == "convert_element_type"
    if is_jump or (name == "select_n" and has_jump(operands)):
        return {f"{name} (a jump)"}
    return kinks
