"""The laws' budget of one step: 2⟨Aw, u⟩ + bᵀu + q(u), by the parts of the update u."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._jax._dtypes import widen_half_precision
from .._laws import Law, Laws
from .._laws._bilinear_forms import LawValues, bilinear_forms, first_order_changes
from .._results._ledger import FIRST_ORDER, Account, BatchSplit, Ledger
from ._read_update import Reading
from ._update_parts import Split, UpdateParts, split_update

#: Part → law → its sum so far.
BudgetTerms = dict[str, LawValues]


class Step(eqx.Module):
    """One step of an optimizer: what went in, and the update that came out.

    `reading`: what is known of the update; `None` if nothing but itself.
    """

    weights: PyTree
    gradient: PyTree
    update: PyTree
    reading: Reading | None = None


class LawBudget(eqx.Module):
    """Adds up, step by step, what each part of the updates does to each law.

    - `parts`: that the optimizer can have; `None` where nothing is known but the update.
    - `unit`: of rounding, in weights and memory.
    - `keeps_weights`: whether the memory starts from the weights.
    """

    laws: Laws
    update_parts: UpdateParts | None
    unit: float = eqx.field(static=True)
    keeps_weights: bool = eqx.field(static=True, default=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the optimizer can have."""
        if self.update_parts is None:
            return ("discretization", FIRST_ORDER)
        return self.update_parts.names

    def values(self, weights: PyTree) -> LawValues:
        """Every law, in at least single precision."""
        return self.laws.values(widen_half_precision(weights))

    def start(self, weights: PyTree) -> BudgetTerms:
        """The budget before the first step."""
        values = self.values(weights)
        zeros = {name: jnp.zeros_like(value) for name, value in values.items()}
        return dict.fromkeys(self.parts, zeros)

    def add(self, terms: BudgetTerms, step: Step) -> BudgetTerms:
        """The budget after one more step."""
        added = self._terms_of_step(step)
        # A law without a quadratic part has a q of another shape.
        return {
            part: {
                name: total + added[part][name] if part in added else total
                for name, total in totals.items()
            }
            for part, totals in terms.items()
        }

    def _terms_of_step(self, step: Step) -> BudgetTerms:
        weights = widen_half_precision(step.weights)
        update = widen_half_precision(step.update)
        terms = {"discretization": bilinear_forms(self.laws, update, update)}
        if self.update_parts is None:
            first_order = first_order_changes(self.laws, weights, update)
            return terms | {FIRST_ORDER: first_order}
        split = self._split(step)
        for name, part in split.separate.items():
            terms[name] = first_order_changes(self.laws, weights, part)
        gradient = widen_half_precision(step.gradient)
        along = first_order_changes(self.laws, weights, gradient)
        if split.turned is None:
            return terms | {"gradient": _times(split.multiple, along)}
        along = _times(_nearest_multiple(split.turned, gradient), along)
        of_rest = first_order_changes(self.laws, weights, split.turned)
        turned = {name: rate - along[name] for name, rate in of_rest.items()}
        return terms | {"gradient": along, "transformation": turned}

    def _split(self, step: Step) -> Split:
        assert step.reading is not None
        return split_update(
            step.reading,
            step.gradient,
            step.weights,
            keeps_weights=self.keeps_weights,
        )

    @property
    def has_split(self) -> bool:
        """Whether the optimizer takes a multiple of the gradient, whose noise splits."""
        return self.update_parts is not None and self.update_parts.is_multiple

    def no_split(self, weights: PyTree) -> dict[str, BatchSplit]:
        """A split of zeros."""
        zeros = jax.tree.map(jnp.zeros_like, self.values(weights))
        return {name: BatchSplit(zero, zero, zero) for name, zero in zeros.items()}

    def split(self, mean: PyTree, step: Step) -> dict[str, BatchSplit]:
        """`BatchSplit` of every law, for a step of a batch; `mean` is the full gradient."""
        gradient, mean = widen_half_precision((step.gradient, mean))
        squared = self._split(step).multiple ** 2
        noise = jax.tree.map(jnp.subtract, gradient, mean)
        forms = [
            bilinear_forms(self.laws, *pair)
            for pair in ((mean, mean), (mean, noise), (noise, noise))
        ]
        return {
            name: BatchSplit(
                *(
                    _as(
                        jnp.broadcast_to(factor * squared * form[name], value.shape),
                        value,
                    )
                    for factor, form in zip((1, 2, 1), forms, strict=True)
                )
            )
            for name, value in self.values(step.weights).items()
        }

    def size(self, weights: PyTree) -> Float[Array, ""]:
        """‖w‖² + ‖w‖: rounding is in proportion to it."""
        leaves = jax.tree.leaves(widen_half_precision(weights))
        square = jnp.sum(jnp.stack([jnp.sum(leaf**2) for leaf in leaves]))
        return square + jnp.sqrt(square)

    def possible_rounding(
        self, size: Float[Array, "..."], steps: Int[Array, "..."]
    ) -> Float[Array, "..."]:
        """The most that rounding can do to ‖w‖² + ‖w‖ of this size in so many steps.

        Each entry is rounded a few times in a step, and the account's parts as often.
        """
        return 8 * self.unit * size * (steps + 1).astype(size.dtype)

    def ledger(
        self,
        start: LawValues,
        now: LawValues,
        terms: BudgetTerms,
        *,
        rounding: Float[Array, "..."],
        splits: dict | None = None,
    ) -> Ledger:
        """The ledger of laws that were `start` and are `now`.

        `rounding`: what rounding may have done to a law with coefficients of size 1.
        """
        accounts = {
            law.name: Account(
                observed=now[law.name] - start[law.name],
                parts={part: terms[part][law.name] for part in self.parts},
                batch=None if splits is None else splits[law.name],
                largest_rounding=_largest_coefficient(law) * rounding,
            )
            for law in self.laws
        }
        note = "" if self.update_parts is None else self.update_parts.note
        return Ledger(accounts, note)


def unit_of_rounding(weights: PyTree, state: PyTree) -> float:
    """Of the least precise array that goes into the updates."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves((weights, state))]
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return max((float(jnp.finfo(dtype).eps) for dtype in floats), default=0.0)


def _largest_coefficient(law: Law) -> float:
    terms = (*law.quadratic_terms, *law.linear_terms)
    sizes = [abs(term.coefficient) for term in terms]
    sizes += [abs(c) for entries in law.entries for c in entries.coefficients]
    return float(max(sizes, default=1))


def _times(multiple: Any, rates: LawValues) -> LawValues:
    return {name: _as(multiple * rate, rate) for name, rate in rates.items()}


def _as(value: Array, like: Array) -> Array:
    return value.astype(like.dtype)


def _nearest_multiple(update: PyTree, gradient: PyTree) -> Float[Array, ""]:
    """The multiple of the gradient that is nearest to the update."""
    along, square = _dot(update, gradient), _dot(gradient, gradient)
    return jnp.where(square > 0, along / jnp.where(square > 0, square, 1), 0)


def _dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.sum(jnp.stack([jnp.sum(x * y) for x, y in pairs]))
