"""The account of one step: 2⟨Aw, u⟩ + bᵀu + q(u), by what the parts of u come from."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._laws import Laws
from .._laws._bilinear_forms import LawValues, bilinear_forms, first_order_changes
from .._results._ledger import FIRST_ORDER, Account, BatchSplit, Ledger
from ._update_parts import Sources

#: Part → law → its sum so far.
Sums = dict[str, LawValues]
#: An optimizer's update and next state, from gradient, state and weights alone.
Response = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


class Step(eqx.Module):
    """One step of an optimizer: what went in, and the update that came out."""

    weights: PyTree
    gradient: PyTree
    state: PyTree
    update: PyTree


class Accountant(eqx.Module):
    """Adds up, step by step, what each part of the updates does to each law.

    `sources` is `None` where nothing is known but the update itself.
    """

    laws: Laws
    sources: Sources | None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the optimizer can have."""
        if self.sources is None:
            return ("discretization", FIRST_ORDER)
        return (
            "discretization",
            "gradient",
            *(("momentum",) if self.sources.memory == "adds" else ()),
            *(("decay",) if self.sources.weights == "adds" else ()),
            *(() if self.sources.is_multiple else ("transformation",)),
        )

    def values(self, weights: PyTree) -> LawValues:
        """Every law, in at least single precision."""
        return self.laws.values(wide(weights))

    def start(self, weights: PyTree) -> Sums:
        """The account before the first step."""
        values = self.values(weights)
        zeros = {name: jnp.zeros_like(value) for name, value in values.items()}
        return dict.fromkeys(self.parts, zeros)

    def add(self, sums: Sums, step: Step, respond: Response | None = None) -> Sums:
        """The account after one more step of the optimizer that `respond`s."""
        added = self._contributions(step, respond)
        # A law without a quadratic part has a q of another shape.
        return {
            part: {name: total + added[part][name] for name, total in of_part.items()}
            for part, of_part in sums.items()
        }

    def _contributions(self, step: Step, respond: Response | None) -> Sums:
        weights, update = wide(step.weights), wide(step.update)
        made = {"discretization": bilinear_forms(self.laws, update, update)}
        if self.sources is None or respond is None:
            return made | {FIRST_ORDER: first_order_changes(self.laws, weights, update)}
        apart = self._apart(step, respond)
        for name, part in apart.items():
            made[name] = first_order_changes(self.laws, weights, part)
        rest = self._rest(step, apart, respond)
        of_rest = first_order_changes(self.laws, weights, rest)
        if self.sources.is_multiple:
            return made | {"gradient": of_rest}
        gradient = wide(step.gradient)
        multiple = _multiple(rest, gradient)
        along = first_order_changes(self.laws, weights, gradient)
        along = {name: multiple * rate for name, rate in along.items()}
        turned = {name: rate - along[name] for name, rate in of_rest.items()}
        return made | {"gradient": along, "transformation": turned}

    def _apart(self, step: Step, respond: Response) -> dict[str, PyTree]:
        """What the memory alone and the weights alone add to the update."""
        assert self.sources is not None
        none = jax.tree.map(jnp.zeros_like, step.weights)
        made = {}
        if self.sources.memory == "adds":
            made["momentum"] = wide(respond(none, step.state, none)[0])
        if self.sources.weights == "adds":
            state = self.sources.without_memory(step.state)
            made["decay"] = wide(respond(none, state, step.weights)[0])
        return made

    def _rest(self, step: Step, apart: dict, respond: Response) -> PyTree:
        """What the present gradient contributes to the update."""
        assert self.sources is not None
        if "mixes" not in (self.sources.memory, self.sources.weights):
            # Not what is left of the update: of an optimizer that is not what it was
            # measured to be, the parts are not to add up.
            none = jax.tree.map(jnp.zeros_like, step.weights)
            state = self.sources.without_memory(step.state)
            return wide(respond(step.gradient, state, none)[0])
        rest = wide(step.update)
        for part in apart.values():
            rest = jax.tree.map(jnp.subtract, rest, part)
        return rest

    def split(self, mean: PyTree, step: Step, respond: Response) -> dict | None:
        """`BatchSplit` of every law, for a step of a batch; `mean` is the full gradient.

        `None` if the optimizer does not take a multiple of the gradient.
        """
        if self.sources is None or not self.sources.is_multiple:
            return None
        gradient, mean = wide((step.gradient, mean))
        rest = self._rest(step, self._apart(step, respond), respond)
        squared = _multiple(rest, gradient) ** 2
        noise = jax.tree.map(jnp.subtract, gradient, mean)
        forms = [
            bilinear_forms(self.laws, *pair)
            for pair in ((mean, mean), (mean, noise), (noise, noise))
        ]
        shapes = self.values(step.weights)
        return {
            name: BatchSplit(
                *(
                    jnp.broadcast_to(factor * squared * form[name], value.shape)
                    for factor, form in zip((1, 2, 1), forms, strict=True)
                )
            )
            for name, value in shapes.items()
        }

    def ledger(
        self, start: LawValues, now: LawValues, sums: Sums, splits: dict | None = None
    ) -> Ledger:
        """The account of laws that were `start` and are `now`."""
        accounts = {
            law.name: Account(
                observed=now[law.name] - start[law.name],
                parts={part: sums[part][law.name] for part in self.parts},
                batch=None if splits is None else splits[law.name],
            )
            for law in self.laws
        }
        return Ledger(accounts, "" if self.sources is None else self.sources.note)


def wide(tree: PyTree) -> PyTree:
    """Arrays of half precision in single: sums of squares are not for half precision."""

    def widened(a):
        is_half = jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits < 32
        return a.astype(jnp.float32) if is_half else a

    return jax.tree.map(widened, tree)


def _multiple(update: PyTree, gradient: PyTree) -> Float[Array, ""]:
    """The multiple of the gradient that is nearest to the update."""
    along, square = _dot(update, gradient), _dot(gradient, gradient)
    return jnp.where(square > 0, along / jnp.where(square > 0, square, 1), 0)


def _dot(a: PyTree, b: PyTree) -> Float[Array, ""]:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.sum(jnp.stack([jnp.sum(x * y) for x, y in pairs]))
