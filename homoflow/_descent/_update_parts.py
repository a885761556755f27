"""What an optimizer's step is made of: gradient, memory, weights, and what turns them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from .._jax._dtypes import widen_half_precision
from ._linear_form import Form, Source, is_number
from ._read_update import Reading

#: What adds to a step by itself, whatever the gradient does.
SEPARATE = ("momentum", "decay", "unattributed")


class UpdateParts(eqx.Module):
    """Which parts an optimizer's updates have; all of it is known before the first step.

    - `separate`: those of `SEPARATE` that there are.
    - `is_multiple`: whether what is left is a multiple of the gradient.
    - `coupled`: what cannot be told from the gradient's effect.
    """

    separate: tuple[str, ...] = eqx.field(static=True)
    is_multiple: bool = eqx.field(static=True)
    coupled: tuple[str, ...] = eqx.field(static=True)

    @property
    def names(self) -> tuple[str, ...]:
        """The parts, in the order in which they are shown."""
        turned = () if self.is_multiple else ("transformation",)
        first = tuple(name for name in self.separate if name != "unattributed")
        last = tuple(name for name in self.separate if name == "unattributed")
        return ("discretization", "gradient", *first, *turned, *last)

    @property
    def note(self) -> str:
        """What is put together, or has no source; empty if nothing."""
        sentences = []
        if self.coupled and not self.is_multiple:
            booked = {"memory": "momentum", "weights": "decay", "noise": "unattributed"}
            is_partial = any(booked[kind] in self.separate for kind in self.coupled)
            first = "Some of what" if is_partial else "What"
            sentences.append(
                f"{first} the optimizer makes of its {' and '.join(self.coupled)} cannot "
                "be told from the rest of the step: it is in `transformation`."
            )
        if "unattributed" in self.separate:
            sentences.append(
                "The optimizer adds what comes of neither gradient, memory nor weights, "
                "such as noise: it is in `unattributed`."
            )
        return " ".join(sentences)


#: Of an optimizer that cannot be read before the first step.
ALL_PARTS = UpdateParts(SEPARATE, False, ())


class Split(NamedTuple):
    """An update by its parts.

    - `separate`: part → what it adds to the weights.
    - `multiple`: of the gradient, if that is all of the rest.
    - `turned`: the rest, otherwise.
    """

    separate: dict[str, PyTree]
    multiple: Any
    turned: PyTree | None


def update_parts(reading: Reading, keeps_weights: bool) -> UpdateParts:
    """Which parts the updates that were read have.

    `keeps_weights`: whether the optimizer's memory starts from the weights. What it makes
    of the distance between the two is its memory's doing, and no decay.
    """
    present: dict[str, None] = {}
    coupled: dict[str, None] = {}
    for i, form in enumerate(reading.updates):
        for source in form.terms:
            present[_part_of(source, i, keeps_weights)] = None
        for rest in form.rest:
            part = _part_of_rest(rest.kinds)
            present[part] = None
            if part == "transformation":
                kinds = sorted(rest.kinds - {"gradient"})
                coupled |= dict.fromkeys(kinds)
    separate = tuple(name for name in SEPARATE if name in present)
    is_multiple = (
        "transformation" not in present and _common_multiple(reading) is not None
    )
    return UpdateParts(separate, is_multiple, tuple(sorted(coupled)))


def starts_from_weights(init: Callable, weights: PyTree) -> bool:
    """Whether an optimizer's first memory is a copy of the weights."""
    with jax.numpy_dtype_promotion("standard"):
        traced = jax.make_jaxpr(init)(weights).jaxpr
    copies = set(traced.invars)
    for eqn in traced.eqns:
        is_copy = eqn.primitive.name in ("copy", "convert_element_type")
        if is_copy and eqn.invars[0] in copies:
            copies.add(eqn.outvars[0])
    return any(out in copies for out in traced.outvars if not hasattr(out, "val"))


def split_update(
    reading: Reading,
    gradient: PyTree,
    weights: PyTree,
    *,
    keeps_weights: bool,
) -> Split:
    """The update that was read, by its parts, in at least single precision."""
    leaves = {
        "gradient": jax.tree.leaves(gradient),
        "memory": reading.remembered,
        "weights": jax.tree.leaves(weights),
    }
    parts = update_parts(reading, keeps_weights)
    wanted = (*parts.separate, *(() if parts.is_multiple else ("turned",)))
    sums: dict[str, list] = {name: [] for name in wanted}
    for i, form in enumerate(reading.updates):
        pieces = _pieces(form, i, leaves, keeps_weights)
        for name, arrays in sums.items():
            zeros = jnp.zeros_like(leaves["weights"][i])
            arrays.append(sum(pieces.get(name, []), start=widen_half_precision(zeros)))
    structure = jax.tree.structure(weights)
    trees = {
        name: jax.tree.unflatten(structure, arrays) for name, arrays in sums.items()
    }
    turned = trees.pop("turned", None)
    return Split(
        trees, None if turned is not None else _common_multiple(reading), turned
    )


def _pieces(
    form: Form, leaf: int, leaves: dict[str, list], keeps_weights: bool
) -> dict[str, list]:
    """Part → the arrays that it is the sum of, for one array of weights."""
    dtype = widen_half_precision(leaves["weights"][leaf]).dtype
    pieces: dict[str, list] = {}
    for source, coefficient in form.terms.items():
        part = _part_of(source, leaf, keeps_weights)
        array = _scaled(coefficient, leaves[source.kind][source.position], dtype)
        pieces.setdefault(_kept_as(part), []).append(array)
    for rest in form.rest:
        array = _scaled(rest.coefficient, rest.array, dtype)
        pieces.setdefault(_kept_as(_part_of_rest(rest.kinds)), []).append(array)
    return pieces


def _kept_as(part: str) -> str:
    return part if part in SEPARATE else "turned"


def _part_of(source: Source, leaf: int, keeps_weights: bool) -> str:
    if source.kind == "gradient":
        return "gradient" if source.position == leaf else "transformation"
    if source.kind == "memory" or keeps_weights:
        return "momentum"
    return "decay"


def _part_of_rest(kinds: frozenset[str]) -> str:
    if kinds <= {"noise"}:
        return "unattributed"
    if kinds == {"memory"}:
        return "momentum"
    return "decay" if kinds == {"weights"} else "transformation"


def _common_multiple(reading: Reading) -> Any:
    """The multiple of the gradient in every array's update; `None` if it differs."""
    multiples = [
        form.terms.get(Source("gradient", i), 0.0)
        for i, form in enumerate(reading.updates)
    ]
    first = multiples[0] if multiples else 0.0
    is_common = all(
        m is first or (is_number(m) and is_number(first) and m == first)
        for m in multiples
    )
    return first if is_common else None


def _scaled(coefficient: Any, array: Any, dtype: Any) -> Any:
    """Their product; memory may be kept in another dtype than weights."""
    with jax.numpy_dtype_promotion("standard"):
        scaled = coefficient * array.astype(dtype)
        # What is not chosen may be NaN.
        if not is_number(coefficient):
            scaled = jnp.where(coefficient == 0, 0, scaled)
        return scaled.astype(dtype)
