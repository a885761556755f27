"""An array on its way through a function, and how it was made from others."""

import dataclasses
from typing import Any

from ._constants_and_signs import NOTHING, Facts
from ._piecewise_linear import IDENTITY, Piecewise, after_line, is_zero, linear


@dataclasses.dataclass(eq=False)
class Value:
    """- `array`: `None` while kinks between `parent` and this have not been opened.
    - `depends`: whether on weights; `depth`: kinks in a row below it.
    - `leaf`: which of the weights it is.
    - `parent`: another value, and what this one is of each of its entries.
    - `factors`: two values whose product this is.
    - `comparison`: two values; this says whether the first is the larger one.
    - `name`: of the operation whose kinks are not opened yet; `units`: its shape, where
        the entries are in the same order in another shape by now.
    """

    array: Any
    depends: bool = False
    depth: int = 0
    facts: Facts = NOTHING
    leaf: int | None = None
    parent: "tuple[Value, Piecewise] | None" = None
    factors: "tuple[Value, Value] | None" = None
    comparison: "tuple[Value, Value] | None" = None
    name: str = ""
    units: tuple[int, ...] | None = None

    @property
    def is_pending(self) -> bool:
        return self.array is None

    @property
    def origin(self) -> "tuple[Value, Piecewise]":
        """What a pending value is, of what."""
        assert self.parent is not None
        return self.parent

    @property
    def shape(self) -> tuple[int, ...]:
        return self.origin[0].shape if self.array is None else self.array.shape

    def ancestors(self) -> "list[Value]":
        """What this is a function of, entry by entry, the nearest first."""
        found: list[Value] = [] if self.is_pending else [self]
        return found + ([] if self.parent is None else self.parent[0].ancestors())

    def over(self, base: "Value") -> Piecewise | None:
        """This as a function of `base`, if it is known to be one."""
        if self is base:
            return IDENTITY
        if self.facts.constant is not None:
            return linear(0.0, self.facts.constant)
        if not self.depends and self.array is not None:
            return linear(0.0, self.array)
        if self.parent is None:
            return None
        above, p = self.parent
        if above is base:
            return p
        rest = above.over(base)
        if rest is None or not rest.is_linear:
            return None
        return after_line(p, rest.lines[0])

    def multiple_of(self, base: "Value") -> Any:
        """c in self = c·base, where c may depend on weights; or `None`."""
        p = self.over(base)
        if p is not None and p.is_linear and is_zero(p.lines[0].intercept):
            return p.lines[0].slope
        if self.factors is None:
            return None
        first, second = self.factors
        return (
            second.array if first is base else first.array if second is base else None
        )


def pending(base: Value, p: Piecewise) -> Value:
    """p of `base`, its kinks to be opened when it is needed."""
    facts = Facts(None, p.is_nonnegative)
    return Value(None, True, base.depth + 1, facts, parent=(base, p))
