"""One pass through a jaxpr that opens its kinks."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from ._constants_and_signs import facts_of_number, facts_of_result
from ._elementwise_relations import (
    choice,
    choice_of_multiples,
    extremum,
    is_jump,
    note_relations,
)
from ._interpreter import (
    CUSTOM_RULES,
    TRANSPARENT,
    Site,
    evaluated,
    inner_jaxprs,
    is_of_jax_nn,
    label_of,
    walk,
)
from ._max_reductions import contests_of, have_pairs_in_common
from ._piecewise_linear import (
    ABSOLUTE_VALUE,
    RELU,
    Piecewise,
    absolute_value,
    plus,
    times,
)
from ._smoothness import ACTIVATIONS, Trace, is_smooth_call, kinks_in, smoothed_at_once
from ._traced_value import Value, pending
from ._weight_products import Convolution, Product, product_of

#: Functions whose own derivative rule is that of their body off the kinks.
_OWN_RULE_AGREES = frozenset({"relu", "relu6"})
#: Operations that move entries about and keep every one of them once.
_MOVES = frozenset(
    {
        "broadcast_in_dim",
        "copy",
        "expand_dims",
        "reshape",
        "rev",
        "squeeze",
        "transpose",
    }
)
#: Those that also keep them in order.
_KEEPS_ORDER = _MOVES - {"rev", "transpose"}
#: Operations whose results jump.
_JUMPS = frozenset(
    {
        "argmax",
        "argmin",
        "ceil",
        "convert_element_type",
        "floor",
        "rem",
        "round",
        "sign",
    }
)


class Operation(NamedTuple):
    """A kinked operation as a person would call it (relu, abs, …), and its shape."""

    name: str
    shape: tuple[int, ...]


class Given(NamedTuple):
    """What the kinks and the products are given; without `slopes` one looks around.

    `slopes` may be a function of an operation's z and of the number of its first kink.
    """

    slopes: Array | Callable[[Array, int], Array] | None = None
    lift: Array | None = None
    taps: dict[int, Array] | None = None


class Reader:
    """A pass through a jaxpr: the outputs, and what was met on the way.

    - `pre`, `low`, `high`: z of each group of kinks, and the slopes on either side.
    - `count`, `depth`: of all kinks, and of those in a row; `operations`: what they
        are the kinks of; `within`: the functions that have been entered.
    - `refused`: what cannot be followed, by name.
    - `products`, `vectors`: see `Product` and `Convolution`, the vectors of which are
        images; `uses`: how often each weight enters.
    """

    def __init__(
        self, closed: ClosedJaxpr, leaves: Sequence, weights: int, given: Given
    ):
        self.given = given
        self.count, self.depth = 0, 0
        self.operations: list[Operation] = []
        self.within: list[str] = []
        self.name = ""
        self.pre: list[Array] = []
        self.low: list[Array] = []
        self.high: list[Array] = []
        self.refused: set[str] = set()
        self.uses: Counter[int] = Counter()
        self.products: list[Product | Convolution] = []
        self.vectors: dict[int, Array] = {}
        values = [
            Value(a, depends=i < weights, leaf=i if i < weights else None)
            for i, a in enumerate(leaves)
        ]
        outputs = walk(closed, values, self._visit, _known)
        self.outputs = [self._opened(v).array for v in outputs]
        self._count_uses(outputs)

    def preactivations(self, like: Array) -> Array:
        return jnp.concatenate([z.ravel() for z in self.pre]) if self.pre else like

    def _visit(self, eqn, operands: list[Value], site: Site) -> list[Value]:
        # What several operations use is opened once, for all of them.
        operands = [
            v if alone else self._opened(v)
            for v, alone in zip(operands, site.only_here, strict=True)
        ]
        traces = [Trace(v.depends, v.facts) for v in operands]
        body, inputs = _body_of(eqn, operands, traces, site)
        if body is not None:
            self.within.append(label_of(eqn))
            results = walk(body, inputs, self._visit, _known, site.reaches)
            self.within.pop()
            return results
        names, _ = kinks_in(eqn, traces, site)
        if not names:
            return self._moved(eqn, operands) or self._bound(eqn, operands)
        self.name = self._name_of(eqn)
        result = self._kinked(eqn, operands)
        if result is not None:
            result.name = self.name
            self._count_uses(operands)
            return [result]
        self.refused |= _refusal(eqn, operands, names)
        return self._bound(eqn, operands)

    def _name_of(self, eqn) -> str:
        labels = [*self.within, label_of(eqn)][::-1]
        named = (label for label in labels if label in ACTIVATIONS)
        return next(named, eqn.primitive.name)

    def _bound(self, eqn, operands: list[Value]) -> list[Value]:
        operands = [self._opened(v) for v in operands]
        self._count_uses(operands)
        arrays = evaluated(eqn, [v.array for v in operands])
        is_stopped = eqn.primitive.name == "stop_gradient"
        depends = not is_stopped and any(v.depends for v in operands)
        depth = max((v.depth for v in operands), default=0)
        results = [Value(a, depends, depth) for a in arrays]
        if results:
            results[0].facts = facts_of_result(eqn, [v.facts for v in operands])
            note_relations(eqn, operands, results[0])
            self._note_product(eqn, operands, results[0])
        return results

    def _moved(self, eqn, operands: list[Value]) -> list[Value] | None:
        """A pending value with its entries moved about is still pending."""
        if eqn.primitive.name not in _MOVES or len(operands) != 1:
            return None
        (v,) = operands
        if not v.is_pending:
            return None
        base, p = v.origin
        if not p.is_known or eqn.outvars[0].aval.size != base.array.size:
            return None
        (moved,) = self._bound(eqn, [base])
        ordered = eqn.primitive.name in _KEEPS_ORDER
        units = (v.units or base.array.shape) if ordered else None
        return [dataclasses.replace(pending(moved, p), name=v.name, units=units)]

    def _kinked(self, eqn, operands: list[Value]) -> Value | None:
        """The result of an equation with kinks, or `None` if it is not understood."""
        match eqn.primitive.name:
            case "abs":
                return self._absolute_value(operands[0])
            case "max" | "min" as name:
                a, b = operands
                return self._extremum(a, b, name == "max")
            case "clamp":
                low, z, high = operands
                return self._extremum(self._extremum(z, low, True), high, False)
            case "select_n":
                return self._choice(operands)
            case (
                "reduce_max" | "reduce_min" | "reduce_window_max" | "reduce_window_min"
            ):
                return self._contest(eqn, operands[0], eqn.primitive.name[-3:] == "max")
            case _ if label_of(eqn) == "elu" and is_of_jax_nn(eqn):
                return self._elu(*operands)
        return None

    def _absolute_value(self, z: Value) -> Value:
        if z.is_pending:
            base, p = z.origin
            absolute = absolute_value(p)
            if absolute is not None:
                return pending(base, absolute)
        return pending(self._opened(z), ABSOLUTE_VALUE)

    def _elu(self, z: Value, alpha: Value) -> Value:
        z, alpha = self._opened(z), self._opened(alpha)
        above = self._opened(pending(z, RELU)).array
        below = z.array - above
        array = above + jnp.asarray(alpha.array, below.dtype) * jnp.expm1(below)
        return Value(array, True, z.depth + 1)

    def _extremum(self, a: Value, b: Value, is_max: bool) -> Value:
        """The larger (or smaller) of two values."""
        result = extremum(a, b, is_max)
        if result is not None:
            return result
        if a.is_pending and b.is_pending:
            (first, p), (second, q) = a.origin, b.origin
            if p.is_known and q.is_known and p.is_increasing and p == q:
                return pending(self._opened(self._extremum(first, second, is_max)), p)
        return self._between(self._opened(a), self._opened(b), is_max)

    def _choice(self, operands: list[Value]) -> Value | None:
        predicate, *cases = operands
        if len(cases) == 2 and predicate.comparison is not None:
            if_false, if_true = cases
            for pair, is_max in (
                ((if_true, if_false), True),
                ((if_false, if_true), False),
            ):
                if all(a is b for a, b in zip(pair, predicate.comparison, strict=True)):
                    return self._extremum(if_true, if_false, is_max)
        result = choice(operands)
        if result is not None:
            return result
        multiples = choice_of_multiples(operands)
        if multiples is None:
            return None
        z, low, high = multiples
        above = self._opened(pending(z, RELU)).array
        depth = max(z.depth + 1, *(v.depth for v in cases))
        return Value(low * (z.array - above) + high * above, True, depth)

    def _contest(self, eqn, v: Value, is_max: bool) -> Value:
        """The largest (or smallest) of many, as a tournament."""
        if v.is_pending:
            base, p = v.origin
            # What never falls may as well be done to the winner, where it has fewer
            # kinks: relu after max-pooling instead of before.
            if p.is_known and p.is_increasing:
                return pending(self._contest(eqn, base, is_max), p)
        v = self._opened(v)
        flat, out = v.array.ravel(), eqn.outvars[0].aval
        contests = contests_of(eqn)
        if have_pairs_in_common(contests):
            self.refused.add(f"{eqn.primitive.name} with overlapping windows")
        winners = [self._winner(flat, v.depth, c.entries, is_max) for c in contests]
        order = np.argsort(np.concatenate([c.results for c in contests]))
        array = jnp.concatenate([w.array for w in winners])[order].reshape(out.shape)
        return Value(array, True, max(w.depth for w in winners))

    def _winner(self, flat: Array, depth: int, entries, is_max: bool) -> Value:
        players = [Value(flat[row], True, depth) for row in entries]
        if not players:
            worst = -jnp.inf if is_max else jnp.inf
            return Value(jnp.full(entries.shape[1], worst, flat.dtype))
        while len(players) > 1:
            pairs = zip(players[::2], players[1::2], strict=False)
            rest = players[len(players) // 2 * 2 :]
            players = [self._between(a, b, is_max) for a, b in pairs] + rest
        return players[0]

    def _between(self, a: Value, b: Value, is_max: bool) -> Value:
        """max(a, b) or min(a, b) as a kink at a = b."""
        first, second = a.array, b.array
        difference = first - second
        # An infinite bound is never met. A large one is brought to the scale of others.
        bounds = [v.array for v in (a, b) if not v.depends]
        far = ~jnp.isfinite(difference)
        size = _unit(bounds[0]).astype(difference.dtype) if bounds else 1.0
        z = jnp.where(far, jnp.where(first < second, -1.0, 1.0), difference / size)
        slopes = (0.0, 1.0) if is_max else (1.0, 0.0)
        depth = max(a.depth, b.depth) + 1
        low, high = (s * size for s in slopes)
        operation = Operation(self.name, z.shape)
        slope, lift = self._kink(z, low, high, depth, operation)
        slope = slope / size
        near = slope * first + (1 - slope) * second + lift
        exact = (jnp.maximum if is_max else jnp.minimum)(first, second)
        return Value(jnp.where(far, exact, near), True, depth)

    def _opened(self, v: Value) -> Value:
        """A value with the kinks between it and its parent opened."""
        if v.is_pending:
            base, p = v.origin
            units = v.units or base.array.shape
            v.array = self._open(base, p, Operation(v.name or self.name, units))
            if p.is_linear:
                v.depth = base.depth
            else:
                v.parent = None
        return v

    def _open(self, base: Value, p: Piecewise, operation: Operation) -> Array:
        z = base.array
        if p.is_linear:
            return p.lines[0].slope * z + p.lines[0].intercept
        total = p.lines[0].at(p.knots[0])
        slopes = [line.slope for line in p.lines]
        for i, knot in enumerate(p.knots):
            # The first kink carries the function up to the second, and so on: each of
            # the others adds nothing below its knot.
            low = slopes[0] if i == 0 else 0.0
            high = slopes[1] if i == 0 else slopes[i + 1] - slopes[i]
            size = float(_unit(knot))
            pre = z if knot == 0 else (z - knot) / size
            slope, lift = self._kink(
                pre, low * size, high * size, base.depth + 1, operation
            )
            slope = slope / size
            total = plus(plus(total, -times(slope, knot)), slope * z + lift)
        return total

    def _kink(
        self, z: Array, low, high, depth: int, operation: Operation
    ) -> tuple[Array, Array]:
        """Slope and lift of a kink at z = 0."""
        self.operations.append(operation)
        start, self.count = self.count, self.count + z.size
        low, high = (
            jnp.broadcast_to(jnp.asarray(slope, z.dtype), z.shape)
            for slope in (low, high)
        )
        self.pre.append(z)
        self.low.append(low)
        self.high.append(high)
        self.depth = max(self.depth, depth)
        if self.given.slopes is None or self.given.lift is None:
            return high, jnp.zeros_like(high)
        lift = self.given.lift[start : self.count].reshape(z.shape)
        if callable(self.given.slopes):
            return self.given.slopes(z, start), lift
        return self.given.slopes[start : self.count].reshape(z.shape), lift

    def _count_uses(self, values: list[Value]) -> None:
        self.uses.update(v.leaf for v in values if v.leaf is not None)

    def _note_product(self, eqn, operands: list[Value], result: Value) -> None:
        product = product_of(eqn, operands)
        if product is None:
            return
        leaf, (vector,) = product.leaf, (v for v in operands if v.leaf != product.leaf)
        self.products.append(product)
        self.vectors[leaf] = vector.array
        if self.given.taps and leaf in self.given.taps:
            result.array = result.array + self.given.taps[leaf]


def _known(number: Any) -> Value:
    return Value(number, facts=facts_of_number(number))


def _unit(bound: Any) -> Any:
    """A power of two of the size of a bound, at least 1: exact to divide by."""
    of = np if isinstance(bound, float | np.ndarray) else jnp
    _, exponent = of.frexp(of.where(of.isfinite(bound), bound, 1.0))
    return of.ldexp(1.0, of.maximum(exponent, 0))


def _body_of(
    eqn, operands: list[Value], traces: list[Trace], site: Site
) -> tuple[ClosedJaxpr | None, list[Value]]:
    """The jaxpr that an equation is no more than a call of, and what it is given."""
    name, label = eqn.primitive.name, label_of(eqn)
    if name == "cond":
        index = operands[0].facts.constant
        if index is None:
            return None, operands
        branches = eqn.params["branches"]
        return branches[min(max(int(index), 0), len(branches) - 1)], operands[1:]
    if name in TRANSPARENT:
        enters = not is_smooth_call(eqn, traces)
        enters &= not (label == "elu" and is_of_jax_nn(eqn))
    else:
        enters = name in CUSTOM_RULES and label in _OWN_RULE_AGREES
        enters &= is_of_jax_nn(eqn)
    if not enters or smoothed_at_once(site.jaxpr, eqn):
        return None, operands
    return next(inner_jaxprs(eqn)), operands


def _refusal(eqn, operands: list[Value], names: set[str]) -> set[str]:
    """What to call an operation that cannot be followed."""
    name = eqn.primitive.name
    if name in CUSTOM_RULES:
        return {label_of(eqn) or name}
    if any(True for _ in inner_jaxprs(eqn)):
        return {f"{inner} in {name}" for inner in names}
    if name in _JUMPS or (name == "select_n" and is_jump(operands)):
        return {f"{name} (a jump)"}
    return names
