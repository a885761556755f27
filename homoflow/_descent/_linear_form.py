"""Arrays as linear combinations of a gradient, of memory and of weights.

The coefficients are numbers: one for the whole array. They are kept once each, so that
two that are the same computation are the same object.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

Kind = Literal["gradient", "memory", "weights", "noise"]


class Source(NamedTuple):
    """An array that goes into an update.

    `position` counts the leaves of the gradient, of the weights or of the state. Noise is
    one source, in no form's terms.
    """

    kind: Kind
    position: int


Sources = frozenset[Source]
NOTHING: Sources = frozenset()
NOISE: Sources = frozenset({Source("noise", 0)})


class Rest(NamedTuple):
    """What is no linear combination: `coefficient` times `array`, made of `sources`.

    `is_exception`: it is 0 on every step on which nothing is clipped or replaced.
    """

    coefficient: Any
    array: Any
    sources: Sources
    is_exception: bool = False

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(source.kind for source in self.sources)


class Form(NamedTuple):
    """Σ coefficient · source, and what else there is.

    `corrected`: sources that were together divided by 1 − βᵏ after k steps, as an average
    that starts from 0 is, with what it is the average of. It is not behind at the start.
    """

    terms: Mapping[Source, Any] = MappingProxyType({})
    rest: tuple[Rest, ...] = ()
    corrected: frozenset[Sources] = frozenset()


def is_number(coefficient: Any) -> bool:
    """Whether a coefficient is known while the program is being traced."""
    return isinstance(coefficient, float)


class Coefficients:
    """Arithmetic of coefficients; the same operands give the same object."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}
        # By identity; to be kept alive, or another object may get the same.
        self._varying: dict[int, Any] = {}
        self._alive: list[Any] = []

    def keep(self, key: Hashable, operands: Iterable[Any], make: Callable) -> Any:
        """`make()`, or what it was for the same key and the same operands."""
        operands = tuple(operands)
        full_key = (key, *map(_identity, operands))
        if full_key not in self._known:
            result = make()
            self._known[full_key] = result
            self._alive.append(operands)
            if any(map(self.is_varying, operands)):
                self.mark_varying(result)
        return self._known[full_key]

    def mark_varying(self, number: Any) -> None:
        """Say that a number may be another one at the next step."""
        self._varying[id(number)] = number

    def is_varying(self, number: Any) -> bool:
        """Whether it may be another one at the next step."""
        return id(number) in self._varying

    def product(self, a: Any, b: Any) -> Any:
        if is_number(a) and is_number(b):
            return a * b
        for one, other in ((a, b), (b, a)):
            if is_number(one) and one in (0.0, 1.0):
                return other if one else 0.0
        return self.keep("product", (a, b), lambda: _wide(a) * _wide(b))

    def quotient(self, a: Any, b: Any) -> Any:
        if is_number(b) and (is_number(a) or b == 1):
            return a if b == 1 else (a / b if b else jnp.divide(a, b))
        if is_number(a) and a == 0:
            return 0.0
        return self.keep("quotient", (a, b), lambda: _wide(a) / _wide(b))

    def sum(self, a: Any, b: Any) -> Any:
        if is_number(a) and is_number(b):
            return a + b
        for one, other in ((a, b), (b, a)):
            if is_number(one) and one == 0:
                return other
        return self.keep("sum", (a, b), lambda: _wide(a) + _wide(b))

    def choice(self, which: Any, cases: list[Any]) -> Any:
        if all(case is cases[0] or _equal(case, cases[0]) for case in cases):
            return cases[0]

        def choose():
            return select(
                which, [jnp.asarray(_wide(case), _widest()) for case in cases]
            )

        return self.keep("choice", (which, *cases), choose)

    # The same of whole forms.

    def scaled(self, form: Form, by: Callable[[Any], Any]) -> Form:
        """A form with every coefficient c replaced by `by(c)`, which is linear in c."""
        terms = {source: by(c) for source, c in form.terms.items()}
        rest = tuple(r._replace(coefficient=by(r.coefficient)) for r in form.rest)
        return Form(_without_zeros(terms), rest, form.corrected)

    def added(self, a: Form, b: Form) -> Form:
        terms = dict(a.terms)
        for source, c in b.terms.items():
            terms[source] = self.sum(terms.get(source, 0.0), c)
        return Form(_without_zeros(terms), a.rest + b.rest, a.corrected | b.corrected)

    def chosen(self, which: Any, forms: list[Form]) -> Form:
        """The form of the number `which` says."""
        sources = dict.fromkeys(s for form in forms for s in form.terms)
        terms = {
            source: self.choice(which, [f.terms.get(source, 0.0) for f in forms])
            for source in sources
        }
        rest = []
        for i, form in enumerate(forms):
            for part in form.rest:
                # Zeros, not zero times an array, which may be NaN where it is not chosen.
                zeros = jnp.zeros_like(part.array)
                arrays = [zeros] * i + [part.array] + [zeros] * (len(forms) - i - 1)
                rest.append(part._replace(array=select(which, arrays)))
        corrected = frozenset[Sources]().union(*(form.corrected for form in forms))
        return Form(_without_zeros(terms), tuple(rest), corrected)


def select(which: Any, cases: list[Any]) -> Any:
    """The case of the number `which`, a boolean or an integer."""
    chosen = cases[0]
    for i, case in enumerate(cases[1:], 1):
        # What is beyond the last case is the last.
        chosen = jnp.where(which >= i, case, chosen)
    return chosen


def _without_zeros(terms: Mapping[Source, Any]) -> dict[Source, Any]:
    return {s: c for s, c in terms.items() if not (is_number(c) and c == 0)}


def _identity(operand: Any) -> Hashable:
    return operand if isinstance(operand, float | tuple) else id(operand)


def _equal(a: Any, b: Any) -> bool:
    return is_number(a) and is_number(b) and a == b


def _wide(coefficient: Any) -> Any:
    """In the widest precision there is: a number costs nothing, and must not round."""
    if is_number(coefficient):
        return coefficient
    return jnp.asarray(coefficient, _widest())


def _widest() -> Any:
    return jnp.zeros(()).dtype
