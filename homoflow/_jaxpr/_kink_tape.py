"""The kinks that a pass through a jaxpr meets, and the slopes that they are given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._piecewise_linear import Piecewise, add, multiply
from ._traced_value import TracedValue


class Operation(NamedTuple):
    """A kinked operation as a person would call it (relu, abs, …), and its shape."""

    name: str
    shape: tuple[int, ...]


class Overrides(NamedTuple):
    """Slopes and offsets of the kinks, and what is added to products with weights.

    Without `slopes` every kink has the slope above it, and the offset 0. `slopes` may be
    a function of an operation's z and of the number of its first kink.
    """

    slopes: Array | Callable[[Array, int], Array] | None = None
    offset: Array | None = None
    taps: dict[int, Array] | None = None


class KinkTape:
    """The kinks in order of evaluation.

    - `z`, `low`, `high`: of each group of kinks, the pre-activations and the slopes on
        either side; `operations`: what they are the kinks of.
    - `count`, `depth`: of all kinks, and of those in a row.
    - `unsupported`: what cannot be followed, by name.
    """

    def __init__(self, overrides: Overrides):
        self._overrides = overrides
        self.z: list[Array] = []
        self.low: list[Array] = []
        self.high: list[Array] = []
        self.operations: list[Operation] = []
        self.count, self.depth = 0, 0
        self.unsupported: set[str] = set()

    def add_kink(
        self, z: Array, low, high, depth: int, operation: Operation
    ) -> tuple[Array, Array]:
        """The slope and the offset of a kink at z = 0."""
        start, self.count = self.count, self.count + z.size
        low, high = (
            jnp.broadcast_to(jnp.asarray(slope, z.dtype), z.shape)
            for slope in (low, high)
        )
        self.z.append(z)
        self.low.append(low)
        self.high.append(high)
        self.operations.append(operation)
        self.depth = max(self.depth, depth)
        slopes, offset = self._overrides.slopes, self._overrides.offset
        if slopes is None or offset is None:
            return high, jnp.zeros_like(high)
        offset = offset[start : self.count].reshape(z.shape)
        if callable(slopes):
            return slopes(z, start), offset
        return slopes[start : self.count].reshape(z.shape), offset

    def evaluate(self, value: TracedValue, name: str = "") -> TracedValue:
        """The value with its array, the kinks between it and its base on the tape.

        `name` is that of the operation, for a value that does not say it itself.
        """
        if value.is_pending:
            base, p = value.origin
            shape = value.kink_shape or base.array.shape
            operation = Operation(value.name or name, shape)
            value.array = self._evaluate_pieces(base, p, operation)
            if p.is_linear:
                value.depth = base.depth
            else:
                value.parent = None
        return value

    def _evaluate_pieces(
        self, base: TracedValue, p: Piecewise, operation: Operation
    ) -> Array:
        """p of the base, as a sum with one kink for each knot.

        The first kink carries the function up to the second knot, and so on: each of the
        others adds nothing below its knot.
        """
        z, slopes = base.array, [line.slope for line in p.lines]
        if p.is_linear:
            return slopes[0] * z + p.lines[0].intercept
        total = p.lines[0].at(p.knots[0])
        for i, knot in enumerate(p.knots):
            low = slopes[0] if i == 0 else 0.0
            high = slopes[1] if i == 0 else slopes[i + 1] - slopes[i]
            size = float(power_of_two(knot))
            shifted = z if knot == 0 else (z - knot) / size
            slope, offset = self.add_kink(
                shifted, low * size, high * size, base.depth + 1, operation
            )
            slope = slope / size
            total = add(add(total, -multiply(slope, knot)), slope * z + offset)
        return total


def power_of_two(bound: Any) -> Any:
    """One of the size of a bound, at least 1: it is exact to divide by it."""
    np_or_jnp = np if isinstance(bound, float | np.ndarray) else jnp
    finite = np_or_jnp.where(np_or_jnp.isfinite(bound), bound, 1.0)
    _, exponent = np_or_jnp.frexp(finite)
    return np_or_jnp.ldexp(1.0, np_or_jnp.maximum(exponent, 0))
