"""What an optimizer makes of a gradient that stays as it is: the flow time of a step.

If an update is a combination of present and earlier gradients with the same numbers for
all weights, then under a constant gradient g it is −τg, and the step takes flow time τ.
The memory is s·g then, and s follows a recursion of numbers: A·s + B.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jax._dtypes import widen_half_precision
from ._linear_form import Coefficients, Form, Source, Sources
from ._read_update import Reading

NONLINEAR = (
    "steps are not a linear function of the gradients, as far as their program shows (in "
    "Adam they are not), so no gradient-flow limit is known."
)
NOISY = "steps add what is no gradient (noise), so the limit is no gradient flow."
MIXED = (
    "steps mix the gradients of different arrays, so there is no gradient-flow limit."
)
#: Rests that may turn out to be multiples of the gradient: nothing is remembered.
_MEASURED = ({"gradient"}, {"gradient", "weights"})


class Recursion(NamedTuple):
    """Numbers of one or several arrays of weights: u = D·g + C·m, m⁺ = A·m + B·g.

    - `memory`: which arrays of the state m are, for the first of those weights.
    - `corrected`: for each, whether what the start lacks is made up for.
    """

    direct: Any
    reads: tuple[Any, ...]
    transition: tuple[tuple[Any, ...], ...]
    drive: tuple[Any, ...]
    memory: tuple[int, ...]
    corrected: tuple[bool, ...]

    @property
    def numbers(self) -> tuple[Any, ...]:
        rows = (number for row in self.transition for number in row)
        return (self.direct, *self.reads, *rows, *self.drive)


class Response(NamedTuple):
    """How an optimizer responds to gradients.

    - `reason`: why it has no flow time; empty if it may have.
    - `recursions`: one for each different treatment of arrays.
    - `has_decay`: whether weights themselves add to the update.
    - `is_measured`: whether something was compared with the gradient; `off_gradient` is
        the largest relative part of it that is no multiple of the gradient.
    """

    reason: str
    recursions: tuple[Recursion, ...] = ()
    has_decay: bool = False
    is_measured: bool = False
    off_gradient: Any = 0.0


class _NoFlowTime(Exception):
    pass


def read_response(reading: Reading, gradient: PyTree) -> Response:
    """The response of an optimizer whose update was read at that gradient."""
    builder = _Builder(reading, jax.tree.leaves(gradient))
    try:
        with jax.numpy_dtype_promotion("standard"):
            recursions = [builder.recursion(i) for i in range(len(reading.updates))]
    except _NoFlowTime as why:
        return Response(str(why))
    distinct = {
        (r.corrected, *map(_identity, r.numbers)): r for r in reversed(recursions)
    }
    return Response(
        "",
        tuple(reversed(distinct.values())),
        builder.has_decay,
        bool(builder.measured or builder.changed),
        builder.off_gradient(),
    )


def _identity(number: Any) -> Any:
    return number if isinstance(number, float) else id(number)


class _Measured(NamedTuple):
    """A rest beside the gradient g: the nearest multiple of g, and what is left.

    - `size`: the largest entry of g; without one there is nothing to compare with.
    - `place`: the same for all arrays of weights that are treated alike.
    """

    multiple: Any
    residual: Any
    size: Any
    place: tuple[int, int]


class _Builder:
    """Collects the recursions of the arrays of weights."""

    def __init__(self, reading: Reading, gradient: list) -> None:
        self._reading, self._gradient = reading, gradient
        self._algebra: Coefficients = reading.coefficients
        self.has_decay = False
        self.measured: dict[tuple[int, int], _Measured] = {}
        #: Of rests that are 0 as long as nothing is clipped: whether something is.
        self.changed: dict[int, Any] = {}
        self._multiples: dict[tuple[int, int], Any] = {}
        for leaf, update in enumerate(reading.updates):
            memory = self._memory_of(update)
            forms = [update, *(reading.memory.get(j, Form()) for j in memory)]
            for i, form in enumerate(forms):
                self._measure(leaf, i, form)
        for key, found in self.measured.items():
            self._multiples[key] = self._multiple(found)
            self._algebra.mark_varying(self._multiples[key])

    def off_gradient(self) -> Any:
        largest = 0.0
        for found in self.measured.values():
            largest = jnp.maximum(largest, found.residual)
        for is_changed in self.changed.values():
            largest = jnp.maximum(largest, jnp.where(is_changed, 1.0, 0.0))
        return largest

    def _multiple(self, found: _Measured) -> Any:
        """The multiple; where the gradient is 0, what it is for other arrays."""
        alike = [m for m in self.measured.values() if m.place == found.place]
        whole = sum(m.size for m in alike)
        common = sum(m.multiple * m.size for m in alike)
        common = common / jnp.where(whole > 0, whole, 1)
        return jnp.where(found.size > 0, found.multiple, common)

    def recursion(self, leaf: int) -> Recursion:
        """The numbers of one array of weights."""
        update = self._reading.updates[leaf]
        memory = self._memory_of(update)
        rows = [self._reading.memory[j] for j in memory]
        for form in (update, *rows):
            self._check(leaf, form)
        divided = update.corrected.union(*(row.corrected for row in rows))
        corrected = frozenset[int]().union(*map(self._averages, divided))
        return Recursion(
            self._gain(leaf, update),
            tuple(update.terms.get(Source("memory", j), 0.0) for j in memory),
            tuple(
                tuple(row.terms.get(Source("memory", j), 0.0) for j in memory)
                for row in rows
            ),
            tuple(self._gain(leaf, row) for row in rows),
            memory,
            tuple(j in corrected for j in memory),
        )

    def _averages(self, divided: Sources) -> frozenset[int]:
        """The averages among the memory that a correction divided by 1 − βᵏ.

        What such an average is made of may be memory too, whose start it does not mend: it
        does not depend on the average.
        """
        memory = {s.position for s in divided if s.kind == "memory"}

        def reads(i: int, j: int) -> bool:
            return Source("memory", j) in self._reading.memory.get(i, Form()).terms

        return frozenset(
            j for j in memory
            if not any(reads(i, j) and not reads(j, i) for i in memory - {j})
        )  # fmt: skip

    def _memory_of(self, form: Form) -> tuple[int, ...]:
        """The arrays of the state that a form depends on, sooner or later."""
        found: dict[int, None] = {}
        waiting = [form]
        while waiting:
            for source in waiting.pop().terms:
                if source.kind == "memory" and source.position not in found:
                    found[source.position] = None
                    waiting.append(self._reading.memory.get(source.position, Form()))
        return tuple(found)

    def _check(self, leaf: int, form: Form) -> None:
        for source in form.terms:
            owner = source.position
            if source.kind == "memory":
                owner = self._reading.owners.get(source.position, -1)
            if owner != leaf:
                raise _NoFlowTime(MIXED)
            self.has_decay |= source.kind == "weights"
        for rest in form.rest:
            kinds = rest.kinds
            if kinds <= {"noise"}:
                raise _NoFlowTime(NOISY)
            if kinds == {"weights"}:
                self.has_decay = True
            elif kinds not in _MEASURED and not rest.is_exception:
                raise _NoFlowTime(NONLINEAR)

    def _gain(self, leaf: int, form: Form) -> Any:
        """The number of gradients in a form."""
        gain = form.terms.get(Source("gradient", leaf), 0.0)
        for rest in form.rest:
            key = leaf, id(rest.array)
            if key in self._multiples:
                part = self._algebra.product(rest.coefficient, self._multiples[key])
                gain = self._algebra.sum(gain, part)
        return gain

    def _measure(self, leaf: int, place: int, form: Form) -> None:
        """Compare rests that come of the gradient with the gradient, others with 0."""
        for i, rest in enumerate(form.rest):
            key = leaf, id(rest.array)
            if rest.kinds in _MEASURED and key not in self.measured:
                found = _compare(rest.array, self._gradient[leaf])
                self.measured[key] = _Measured(*found, (place, i))
            elif rest.is_exception and rest.kinds not in _MEASURED:
                is_there = jnp.any(rest.array != 0) & jnp.any(rest.coefficient != 0)
                self.changed[id(rest.array)] = is_there


def _compare(array: Array, gradient: Array) -> tuple[Array, Array, Array]:
    """The nearest multiple of the gradient, the relative part that is none, its size."""
    array, gradient = widen_half_precision((array, gradient))
    # Of a unit vector: squares of small numbers are zero in single precision.
    size = jnp.max(jnp.abs(gradient), initial=0)
    unit = gradient / jnp.where(size > 0, size, 1)
    square = jnp.sum(unit**2)
    along = jnp.sum(array * unit) / jnp.where(square > 0, square, 1)
    off = jnp.max(jnp.abs(array - along * unit), initial=0)
    whole = jnp.max(jnp.abs(array), initial=0)
    residual = off / jnp.where(whole > 0, whole, 1)
    return along / jnp.where(size > 0, size, 1), residual, size


class Memory(NamedTuple):
    """The numbers s of the recursions, one entry for each array of memory.

    - `settled`: s, had the gradient been the same for ever.
    - `left`: how much of the start is still remembered; −1 before the first gradient.
    """

    settled: Float[Array, " memory"]
    left: Float[Array, " memory"]

    @staticmethod
    def start(num_memory: int, dtype: Any) -> "Memory":
        return Memory(jnp.zeros(num_memory, dtype), -jnp.ones(num_memory, dtype))


def respond(
    recursions: tuple[Recursion, ...], memory: Memory
) -> tuple[Float[Array, " recursions"], Memory]:
    """The flow time of a step by each recursion, and the memory after it."""
    times, settled, left = [], [], []
    first, dtype = 0, memory.settled.dtype
    with jax.numpy_dtype_promotion("standard"):
        for recursion in recursions:
            last = first + len(recursion.memory)
            s, kept = list(memory.settled[first:last]), list(memory.left[first:last])
            time, s, kept = _respond(recursion, s, kept)
            times.append(time)
            settled += s
            left += kept
            first = last

        def packed(numbers):
            numbers = [jnp.asarray(number, dtype) for number in numbers]
            return jnp.stack(numbers) if numbers else jnp.zeros(0, dtype)

        return packed(times), Memory(packed(settled), packed(left))


def _respond(recursion: Recursion, s: list, left: list) -> tuple[Any, list, list]:
    size = range(len(s))
    decay = [recursion.transition[i][i] for i in size]
    is_used = [_is_used(recursion, i) for i in size]
    starts = [(left[i] < 0) & is_used[i] for i in size]
    # A memory that forgets starts as if it had seen this gradient for ever. Of those that
    # build on each other, each pass settles one more.
    for _ in size:
        for i in size:
            if recursion.corrected[i]:
                continue
            others = sum(
                (recursion.transition[i][j] * s[j] for j in size if j != i),
                start=recursion.drive[i],
            )
            forgets = jnp.abs(decay[i]) < 1
            fixed = others / jnp.where(forgets, 1 - decay[i], 1)
            s[i] = jnp.where(starts[i] & forgets, fixed, s[i])
    read = sum((recursion.reads[i] * s[i] for i in size), start=recursion.direct)
    after = [
        sum((recursion.transition[i][j] * s[j] for j in size), start=recursion.drive[i])
        for i in size
    ]
    kept = [jnp.where(starts[i], 1, left[i]) * jnp.abs(decay[i]) for i in size]
    return -read, after, [jnp.where(kept[i] < 0, -1, kept[i]) for i in size]


def _is_used(recursion: Recursion, i: int) -> Any:
    """Whether the memory is not just kept as it is."""
    others = [c for j, c in enumerate(recursion.transition[i]) if j != i]
    moved = [recursion.transition[i][i] != 1]
    moved += [c != 0 for c in (recursion.drive[i], *others)]
    return jnp.any(jnp.stack([jnp.asarray(m) for m in moved]))
