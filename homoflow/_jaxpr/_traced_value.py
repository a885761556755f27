"""An array on its way through a function, and how it was made from others."""

import dataclasses
from typing import Any

from ._constants_and_signs import UNKNOWN, AbstractValue
from ._piecewise_linear import IDENTITY, Piecewise, compose_with_line, is_zero, linear


@dataclasses.dataclass(eq=False)
class TracedValue:
    """A value is pending until its array is needed: then its kinks go on the tape.

    - `array`: `None` while the value is pending.
    - `depends`: whether on weights; `depth`: kinks in a row below it.
    - `leaf`: which of the weights it is.
    - `parent`: another value, and the function of its entries that this one is.
    - `factors`: two values whose product this is.
    - `comparison`: two values; this says whether the first is the larger one.
    - `name`: of the operation of a pending value; `kink_shape`: its shape, where the
        entries are in the same order in another shape by now.
    """

    array: Any
    depends: bool = False
    depth: int = 0
    abstract: AbstractValue = UNKNOWN
    leaf: int | None = None
    parent: "tuple[TracedValue, Piecewise] | None" = None
    factors: "tuple[TracedValue, TracedValue] | None" = None
    comparison: "tuple[TracedValue, TracedValue] | None" = None
    name: str = ""
    kink_shape: tuple[int, ...] | None = None

    @property
    def is_pending(self) -> bool:
        return self.array is None

    @property
    def origin(self) -> "tuple[TracedValue, Piecewise]":
        """What a pending value is, of what."""
        assert self.parent is not None
        return self.parent

    @property
    def shape(self) -> tuple[int, ...]:
        return self.origin[0].shape if self.array is None else self.array.shape

    def ancestors(self) -> "list[TracedValue]":
        """What this is a function of, entry by entry, the nearest first."""
        found: list[TracedValue] = [] if self.is_pending else [self]
        return found + ([] if self.parent is None else self.parent[0].ancestors())

    def as_function_of(self, base: "TracedValue") -> Piecewise | None:
        """This as a function of `base`, if it is known to be one."""
        if self is base:
            return IDENTITY
        if self.abstract.constant is not None:
            return linear(0.0, self.abstract.constant)
        if not self.depends and self.array is not None:
            return linear(0.0, self.array)
        if self.parent is None:
            return None
        above, p = self.parent
        if above is base:
            return p
        inner = above.as_function_of(base)
        if inner is None or not inner.is_linear:
            return None
        return compose_with_line(p, inner.lines[0])

    def factor_over(self, base: "TracedValue") -> Any:
        """c in self = c·base, where c may depend on weights; or `None`."""
        p = self.as_function_of(base)
        if p is not None and p.is_linear and is_zero(p.lines[0].intercept):
            return p.lines[0].slope
        if self.factors is None:
            return None
        first, second = self.factors
        return (
            second.array if first is base else first.array if second is base else None
        )


def make_pending(base: TracedValue, p: Piecewise) -> TracedValue:
    """p of `base`, its kinks to go on the tape when it is needed."""
    abstract = AbstractValue(None, p.is_nonnegative)
    return TracedValue(None, True, base.depth + 1, abstract, parent=(base, p))
