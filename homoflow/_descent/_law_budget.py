"""The laws' budget of one step: 2⟨Aw, u⟩ + bᵀu + q(u), by the parts of the update u."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._jax._dtypes import widen_half_precision
from .._laws import Laws
from .._laws._bilinear_forms import LawValues, bilinear_forms, first_order_changes
from .._results._ledger import FIRST_ORDER, Account, BatchSplit, Ledger
from ._update_parts import UpdateParts

#: Part → law → its sum so far.
BudgetTerms = dict[str, LawValues]
#: An optimizer's update and next state, from gradient, state and weights alone.
UpdateFn = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


class Step(eqx.Module):
    """One step of an optimizer: what went in, and the update that came out."""

    weights: PyTree
    gradient: PyTree
    state: PyTree
    update: PyTree


class LawBudget(eqx.Module):
    """Adds up, step by step, what each part of the updates does to each law.

    `update_parts` is `None` where nothing is known but the update itself.
    """

    laws: Laws
    update_parts: UpdateParts | None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the optimizer can have."""
        if self.update_parts is None:
            return ("discretization", FIRST_ORDER)
        return (
            "discretization",
            "gradient",
            *(("momentum",) if self.update_parts.memory == "additive" else ()),
            *(("decay",) if self.update_parts.weights == "additive" else ()),
            *(() if self.update_parts.is_multiple else ("transformation",)),
        )

    def values(self, weights: PyTree) -> LawValues:
        """Every law, in at least single precision."""
        return self.laws.values(widen_half_precision(weights))

    def start(self, weights: PyTree) -> BudgetTerms:
        """The budget before the first step."""
        values = self.values(weights)
        zeros = {name: jnp.zeros_like(value) for name, value in values.items()}
        return dict.fromkeys(self.parts, zeros)

    def add(
        self, terms: BudgetTerms, step: Step, update_fn: UpdateFn | None = None
    ) -> BudgetTerms:
        """The budget after one more step of the optimizer with that `update_fn`."""
        added = self._terms_of_step(step, update_fn)
        # A law without a quadratic part has a q of another shape.
        return {
            part: {name: total + added[part][name] for name, total in totals.items()}
            for part, totals in terms.items()
        }

    def _terms_of_step(self, step: Step, update_fn: UpdateFn | None) -> BudgetTerms:
        weights = widen_half_precision(step.weights)
        update = widen_half_precision(step.update)
        terms = {"discretization": bilinear_forms(self.laws, update, update)}
        if self.update_parts is None or update_fn is None:
            return terms | {
                FIRST_ORDER: first_order_changes(self.laws, weights, update)
            }
        separate = self._separate_updates(step, update_fn)
        for name, part in separate.items():
            terms[name] = first_order_changes(self.laws, weights, part)
        remainder = self._remainder(step, separate, update_fn)
        of_remainder = first_order_changes(self.laws, weights, remainder)
        if self.update_parts.is_multiple:
            return terms | {"gradient": of_remainder}
        gradient = widen_half_precision(step.gradient)
        multiple = _nearest_multiple(remainder, gradient)
        along = first_order_changes(self.laws, weights, gradient)
        along = {name: multiple * rate for name, rate in along.items()}
        turned = {name: rate - along[name] for name, rate in of_remainder.items()}
        return terms | {"gradient": along, "transformation": turned}

    def _separate_updates(self, step: Step, update_fn: UpdateFn) -> dict[str, PyTree]:
        """What the memory alone and the weights alone add to the update."""
        assert self.update_parts is not None
        zeros = jax.tree.map(jnp.zeros_like, step.weights)
        updates = {}
        if self.update_parts.memory == "additive":
            updates["momentum"] = update_fn(zeros, step.state, zeros)[0]
        if self.update_parts.weights == "additive":
            state = self.update_parts.clear_memory(step.state)
            updates["decay"] = update_fn(zeros, state, step.weights)[0]
        return {name: widen_half_precision(update) for name, update in updates.items()}

    def _remainder(self, step: Step, separate: dict, update_fn: UpdateFn) -> PyTree:
        """What the present gradient contributes to the update."""
        assert self.update_parts is not None
        if not self.update_parts.coupled:
            # Not what is left of the update: of an optimizer that is not what it was
            # measured to be, the parts are not to add up.
            zeros = jax.tree.map(jnp.zeros_like, step.weights)
            state = self.update_parts.clear_memory(step.state)
            return widen_half_precision(update_fn(step.gradient, state, zeros)[0])
        remainder = widen_half_precision(step.update)
        for part in separate.values():
            remainder = jax.tree.map(jnp.subtract, remainder, part)
        return remainder

    def split(self, mean: PyTree, step: Step, update_fn: UpdateFn) -> dict | None:
        """`BatchSplit` of every law, for a step of a batch; `mean` is the full gradient.

        `None` if the optimizer does not take a multiple of the gradient.
        """
        if self.update_parts is None or not self.update_parts.is_multiple:
            return None
        gradient, mean = widen_half_precision((step.gradient, mean))
        separate = self._separate_updates(step, update_fn)
        remainder = self._remainder(step, separate, update_fn)
        squared = _nearest_multiple(remainder, gradient) ** 2
        noise = jax.tree.map(jnp.subtract, gradient, mean)
        forms = [
            bilinear_forms(self.laws, *pair)
            for pair in ((mean, mean), (mean, noise), (noise, noise))
        ]
        return {
            name: BatchSplit(
                *(
                    jnp.broadcast_to(factor * squared * form[name], value.shape)
                    for factor, form in zip((1, 2, 1), forms, strict=True)
                )
            )
            for name, value in self.values(step.weights).items()
        }

    def ledger(
        self,
        start: LawValues,
        now: LawValues,
        terms: BudgetTerms,
        splits: dict | None = None,
    ) -> Ledger:
        """The ledger of laws that were `start` and are `now`."""
        accounts = {
            law.name: Account(
                observed=now[law.name] - start[law.name],
                parts={part: terms[part][law.name] for part in self.parts},
                batch=None if splits is None else splits[law.name],
            )
            for law in self.laws
        }
        note = "" if self.update_parts is None else self.update_parts.note
        return Ledger(accounts, note)


def _nearest_multiple(update: PyTree, gradient: PyTree) -> Float[Array, ""]:
    """The multiple of the gradient that is nearest to the update."""
    along, square = _dot(update, gradient), _dot(gradient, gradient)
    return jnp.where(square > 0, along / jnp.where(square > 0, square, 1), 0)


def _dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.sum(jnp.stack([jnp.sum(x * y) for x, y in pairs]))
