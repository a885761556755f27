"""A risk minimization problem as the exact flow needs it: flat weights, open kinks."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._jaxpr import PiecewiseSmoothFunction, expose_kinks
from .._problem._losses import Risk
from .._problem._problem import Problem
from ._active_pairs import Slots


class Rows(NamedTuple):
    """J_k = ∇_w z_k for the pairs k in the slots.

    The weights that enter as Wx once (most of a network) have outer products for
    gradients, kept as factors: `deltas[i][k]` ⊗ `vectors[i][k]`. The others' gradients
    are the columns of `explicit`.
    """

    explicit: Float[Array, "slots rest"]
    deltas: list[Float[Array, "slots _"]]
    vectors: list[Float[Array, "slots _"]]

    def gram(self) -> Float[Array, "slots slots"]:
        """J Jᵀ."""
        factored = (
            (v @ v.T) * (d @ d.T)
            for v, d in zip(self.vectors, self.deltas, strict=True)
        )
        return sum(factored, start=self.explicit @ self.explicit.T)

    def squares(self) -> Float[Array, " slots"]:
        """The diagonal of J Jᵀ."""
        factored = (
            jnp.sum(v**2, 1) * jnp.sum(d**2, 1)
            for v, d in zip(self.vectors, self.deltas, strict=True)
        )
        return sum(factored, start=jnp.sum(self.explicit**2, 1))


class Derivatives(NamedTuple):
    """L(w), z of every pair, ∇L; rows of the pairs in the slots.

    - `jump`: ∂L/∂a at every kink; `above[k, l]`: ∂z_k/∂a at the kink of slot l in the
        sample of slot k.
    """

    loss: Float[Array, ""]
    z: Float[Array, "samples kinks"]
    gradient: Float[Array, " weights"]
    jump: Float[Array, "samples kinks"]
    rows: Rows
    above: Float[Array, "slots slots"]


class System(eqx.Module):
    """L(w) for flat weights w, with the slopes at all kinks as inputs.

    Tables over pairs have shape (samples, kinks). `low` and `high` are the slopes
    below and above each kink.
    """

    function: PiecewiseSmoothFunction = eqx.field(static=True)
    loss_of_sample: Callable[[Any, Any], Array]
    is_mean: bool = eqx.field(static=True)
    others: PyTree
    x: PyTree
    y: PyTree
    low: Float[Array, "samples kinks"]
    high: Float[Array, "samples kinks"]
    template: PyTree

    @property
    def kinks(self) -> int:
        return self.function.count

    @property
    def samples(self) -> int:
        return self.low.shape[0]

    def unravel(self, w: Float[Array, " weights"]) -> PyTree:
        return jax.flatten_util.ravel_pytree(self.template)[1](w)

    def slope(self, side: Int[Array, "samples kinks"]) -> Float[Array, "samples kinks"]:
        """The slope of each pair's side."""
        return jnp.where(side > 0, self.high, self.low)

    def preactivations(self, w: Array, slopes: Array, lift: Array) -> Array:
        """z of every pair."""
        weights = self.unravel(w)

        def of_sample(slopes, lift, x):
            return self.function.forward(weights, slopes, lift, self.others, x)[1]

        return jax.vmap(of_sample)(slopes, lift, self.x)

    def preactivation(self, w: Array, slopes: Array, lift: Array, pair: Array) -> Array:
        """z of one pair, from its own sample."""
        i, u = pair // self.kinks, pair % self.kinks
        x = jax.tree.map(lambda a: a[i], self.x)
        weights = self.unravel(w)
        z = self.function.forward(weights, slopes[i], lift[i], self.others, x)[1]
        return z[u]

    def loss(self, w: Array, slopes: Array) -> tuple[Array, Array]:
        """L(w), and z of every pair."""
        predictions, z, _ = self._opened(w, slopes)
        return self._loss(predictions), z

    def derivatives(self, w: Array, slopes: Array, slots: Slots) -> Derivatives:
        """L and its gradient, and J for the pairs in the slots.

        Backward passes start with ∂L/∂prediction for a sample, with 1 at its z for a
        slot. One pass over both compiles fastest, but gives each sample's gradient.
        """
        predictions, z, images = self._opened(w, slopes)
        factors = self._factors(images)
        loss, seeds = jax.value_and_grad(self._loss)(predictions)
        m, at_slots = self.samples, self._at_slots(slots, seeds)
        everyone = _Starts(
            jnp.arange(m, dtype=jnp.int32), seeds,
            jnp.zeros(m, jnp.int32), jnp.zeros(m, w.dtype),
        )  # fmt: skip
        if self._sums_first():
            of_all = self._backward(w, slopes, everyone, is_sum=True)
            of_slots = self._backward(w, slopes, at_slots)
        else:
            starts = jax.tree.map(lambda *a: jnp.concatenate(a), everyone, at_slots)
            found = self._backward(w, slopes, starts)
            of_all = jax.tree.map(lambda a: a[:m], found)
            of_all = of_all._replace(rest=[jnp.sum(g, 0) for g in of_all.rest])
            of_slots = jax.tree.map(lambda a: a[m:], found)
        return Derivatives(
            loss=loss,
            z=z,
            gradient=self._summed(of_all, factors),
            jump=of_all.reached,
            rows=self._rows(of_slots, [f[at_slots.sample] for f in factors]),
            above=of_slots.reached[:, at_slots.kink],
        )

    def rows(self, w: Array, slopes: Array, slots: Slots, images: list[Array]) -> Rows:
        """J for the pairs in the slots, given what the function is `factored` with."""
        predictions = jax.eval_shape(lambda: self._opened(w, slopes)[0])
        starts = self._at_slots(slots, predictions)
        factors = self._factors([image[starts.sample] for image in images])
        return self._rows(self._backward(w, slopes, starts), factors)

    def openings(
        self,
        w: Array,
        slopes: Array,
        dormant: Bool[Array, "samples kinks"],
        slots: Slots,
    ) -> Float[Array, " slots"]:
        """∂L/∂a at every slot's kink if that alone opens, from one-sided derivatives.

        It takes the dormant pairs above to sides that may be others than those they have.
        """
        weights, still = self.unravel(w), jnp.zeros(self.kinks, w.dtype)
        seeds = jax.grad(self._loss)(self._opened(w, slopes)[0])

        def of_slot(pair):
            i, kink = pair // self.kinks, pair % self.kinks
            x, seed = jax.tree.map(lambda a: a[i], (self.x, seeds))
            numbers = jnp.arange(self.kinks, dtype=kink.dtype)
            lift = (numbers == kink).astype(w.dtype)

            def one_layer(_, carry):
                slopes, _ = carry
                _, (prediction, z) = jax.jvp(
                    lambda lift: self.function.forward(
                        weights, slopes, lift, self.others, x
                    ),
                    (still,),
                    (lift,),
                )
                turned = dormant[i] & (z != 0)
                side = jnp.where(z > 0, self.high[i], self.low[i])
                change = jax.tree.map(jnp.vdot, seed, prediction)
                return jnp.where(turned, side, slopes), sum(jax.tree.leaves(change))

            start = slopes[i], jnp.zeros((), w.dtype)
            return lax.fori_loop(0, self.function.depth + 1, one_layer, start)[1]

        return jax.vmap(of_slot)(slots.pair)

    def _sums_first(self) -> bool:
        """Whether single samples' gradients cost far more than the gradient of a sum.

        All weights once for each sample is much to hold, and what a weight goes through
        may be slow with a weight for each sample. Biases are neither.
        """
        rest = self._unfactored(jax.tree.leaves(self.template))
        outputs = self.kinks + sum(math.prod(p.shape) for p in self.function.factored)
        is_wide = any(sum(n > 1 for n in a.shape) > 1 for a in rest)
        return is_wide or sum(a.size for a in rest) > outputs

    def _opened(self, w: Array, slopes: Array) -> tuple[PyTree, Array, list[Array]]:
        """Predictions, all z, and what the function is `factored` with, of all samples."""
        weights, lift = self.unravel(w), jnp.zeros(self.kinks, w.dtype)

        def of_sample(slopes, x):
            return self.function.evaluate(weights, slopes, lift, self.others, x)

        return jax.vmap(of_sample)(slopes, self.x)

    def _loss(self, predictions: PyTree) -> Float[Array, ""]:
        losses = jax.vmap(self.loss_of_sample)(predictions, self.y)
        return jnp.mean(losses) if self.is_mean else jnp.sum(losses)

    def _at_slots(self, slots: Slots, predictions: PyTree) -> "_Starts":
        """Of z at each slot; predictions tell the shapes of their seeds."""
        room = slots.pair.size
        nothing = jax.tree.map(
            lambda a: jnp.zeros((room, *a.shape[1:]), a.dtype), predictions
        )
        sample, kink = slots.pair // self.kinks, slots.pair % self.kinks
        return _Starts(sample, nothing, kink, jnp.ones(room, self.low.dtype))

    def _backward(
        self,
        w: Array,
        slopes: Float[Array, "samples kinks"],
        starts: "_Starts",
        is_sum: bool = False,
    ) -> "_Backward":
        """Gradients of ⟨seeds, prediction⟩ + of_kink · z, one for each row.

        For a sum, those of weights that are not factored are summed over rows.
        """
        leaves, structure = jax.tree.flatten(self.unravel(w))
        factored = {p.leaf for p in self.function.factored}
        rest = self._unfactored(leaves)
        sample, count = starts.sample, starts.sample.size
        taps = [jnp.zeros((count, *p.shape), w.dtype) for p in self.function.factored]

        def value(rest, taps, lift, slopes, x, start):
            given = iter(rest)
            all_leaves = [
                leaf if i in factored else next(given) for i, leaf in enumerate(leaves)
            ]
            weights = jax.tree.unflatten(structure, all_leaves)
            prediction, z = self.function.evaluate_with_taps(
                weights, taps, slopes, lift, self.others, x
            )
            products = jax.tree.map(jnp.vdot, start.seeds, prediction)
            return sum(jax.tree.leaves(products), start.of_kink * z[start.kink])

        def total(*arguments):
            return jnp.sum(jax.vmap(value, axes)(*arguments))

        axes, by = (None, 0, 0, 0, 0, 0), (0, 1, 2)
        gradient = (
            jax.grad(total, by) if is_sum else jax.vmap(jax.grad(value, by), axes)
        )
        x = jax.tree.map(lambda a: a[sample], self.x)
        lift = jnp.zeros((count, self.kinks), w.dtype)
        rest, deltas, reached = gradient(rest, taps, lift, slopes[sample], x, starts)
        products, others = self._by_kind(deltas)
        convolved = zip(self.function.convolutions, others, strict=True)
        others = [jax.vmap(c.by_position)(delta) for c, delta in convolved]
        return _Backward(rest, [*products, *others], reached)

    def _factors(self, images: list[Array]) -> list[Array]:
        """The vectors of products, and the patches of convolutions."""
        vectors, images = self._by_kind(images)
        convolved = zip(self.function.convolutions, images, strict=True)
        return [*vectors, *(jax.vmap(c.patches)(image) for c, image in convolved)]

    def _by_kind(self, arrays: list[Array]) -> tuple[list[Array], list[Array]]:
        """Those for products, and those for convolutions."""
        count = len(self.function.products)
        return arrays[:count], arrays[count:]

    def _rows(self, found: "_Backward", factors: list[Array]) -> Rows:
        kernels = [jax.vmap(c.gradient) for c in self.function.convolutions]
        explicit = self._explicit(found, factors, kernels)
        flat = [g.reshape(g.shape[0], -1) for g in explicit]
        nothing = jnp.zeros((found.reached.shape[0], 0), self.low.dtype)
        vectors, deltas = (self._by_kind(a)[0] for a in (factors, found.deltas))
        return Rows(jnp.concatenate([nothing, *flat], 1), deltas, vectors)

    def _summed(self, found: "_Backward", factors: list[Array]) -> Array:
        """The sum of the gradients, given that of those in `rest`."""
        kernels = [
            lambda *pair, c=c: c.gradient(*map(jnp.concatenate, pair))
            for c in self.function.convolutions
        ]
        explicit = _flat(self._explicit(found, factors, kernels), self.low.dtype)
        vectors, deltas = (self._by_kind(a)[0] for a in (factors, found.deltas))
        return self._assembled(explicit, deltas, vectors)

    def _explicit(
        self, found: "_Backward", factors: list[Array], kernels: list[Callable]
    ) -> list[Array]:
        """Gradients of what is not held as factors, in the order of the weights.

        `kernels` tell how convolutions find theirs.
        """
        patches, deltas = (self._by_kind(a)[1] for a in (factors, found.deltas))
        convolved = zip(
            self.function.convolutions, kernels, deltas, patches, strict=True
        )
        given = iter(found.rest)
        kernel_of = {c.leaf: kernel(*pair) for c, kernel, *pair in convolved}
        return [
            kernel_of[i] if i in kernel_of else next(given)
            for i in self._unheld(range(len(jax.tree.leaves(self.template))))
        ]

    def along(self, rows: Rows, v: Float[Array, " weights"]) -> Float[Array, " slots"]:
        """J v."""
        leaves = jax.tree.leaves(self.unravel(v))
        out = rows.explicit @ self._rest(leaves)
        for p, delta, vector in zip(
            self.function.products, rows.deltas, rows.vectors, strict=True
        ):
            matrix = leaves[p.leaf].T if p.is_transposed else leaves[p.leaf]
            out = out + jnp.sum((delta @ matrix) * vector, 1)
        return out

    def against(
        self, rows: Rows, v: Float[Array, " slots"]
    ) -> Float[Array, " weights"]:
        """Jᵀ v."""
        deltas = [delta * v[:, None] for delta in rows.deltas]
        return self._assembled(v @ rows.explicit, deltas, rows.vectors)

    def _assembled(
        self, rest: Array, deltas: list[Array], vectors: list[Array]
    ) -> Float[Array, " weights"]:
        """Flat weights from those that `Rows` has as columns and the sums of products."""
        leaves, structure = jax.tree.flatten(self.template)
        out: list[Array | None] = [None] * len(leaves)
        for p, delta, vector in zip(
            self.function.products, deltas, vectors, strict=True
        ):
            matrix = delta.T @ vector
            out[p.leaf] = matrix.T if p.is_transposed else matrix
        start = 0
        for i, leaf in enumerate(leaves):
            if out[i] is None:
                out[i] = rest[start : start + leaf.size].reshape(leaf.shape)
                start += leaf.size
        return jax.flatten_util.ravel_pytree(jax.tree.unflatten(structure, out))[0]

    def _rest(self, leaves: list[Array]) -> Array:
        return _flat(self._unheld(leaves), self.low.dtype)

    def _unheld(self, leaves: Sequence[Any]) -> list[Any]:
        """Those that `Rows` does not hold as factors."""
        held = {p.leaf for p in self.function.products}
        return [a for i, a in enumerate(leaves) if i not in held]

    def _unfactored(self, leaves: list[Array]) -> list[Array]:
        factored = {p.leaf for p in self.function.factored}
        return [a for i, a in enumerate(leaves) if i not in factored]


class _Backward(NamedTuple):
    """What backward passes give, one in a row.

    - `rest`: the gradients of weights that are not factored, or their sums over rows.
    - `deltas`: of the results of products, and, by position, of convolutions.
    - `reached`: of the output of every unit.
    """

    rest: list[Array]
    deltas: list[Array]
    reached: Float[Array, "rows kinks"]


class _Starts(NamedTuple):
    """What backward passes start with: ∂/∂prediction and ∂/∂z_kink, for a sample each."""

    sample: Int[Array, " rows"]
    seeds: PyTree
    kink: Int[Array, " rows"]
    of_kink: Float[Array, " rows"]


def _flat(arrays: list[Array], dtype) -> Array:
    return jnp.concatenate([jnp.zeros(0, dtype), *(a.ravel() for a in arrays)])


def kinked_function(problem: Problem) -> PiecewiseSmoothFunction:
    """The model of a problem with its kinks laid open, from shapes alone."""
    return _opened(problem)[0]


def as_system(problem: Problem) -> System:
    """The problem in the form that the exact flow needs."""
    function, weights, others = _opened(problem)
    objective = problem.objective
    assert isinstance(objective, Risk)
    x, y = problem.data
    low, high = jax.vmap(lambda xi: function.slopes(weights, others, xi))(x)
    prediction = eqx.filter_eval_shape(problem.model, _one_of(x))
    return System(
        function=function,
        loss_of_sample=_Hoisted.of(objective.loss, prediction, _one_of(y)),
        is_mean=objective.is_mean,
        others=others,
        x=x,
        y=y,
        low=low,
        high=high,
        template=weights,
    )


class _Hoisted(eqx.Module):
    """A function with the traced arrays of its closure as leaves.

    A rule for derivatives sees no others: what a user's function closes over would
    count as constant.
    """

    fn: Callable = eqx.field(static=True)
    captured: list[Array]

    @staticmethod
    def of(fn: Callable, *shapes: PyTree) -> "_Hoisted":
        # A module with traced leaves cannot be hashed, as this needs; a function can.
        converted, captured = jax.closure_convert(lambda *a: fn(*a), *shapes)
        return _Hoisted(converted if captured else fn, captured)

    def __call__(self, *arguments):
        return self.fn(*arguments, *self.captured)


def _opened(problem: Problem) -> tuple[PiecewiseSmoothFunction, PyTree, PyTree]:
    """The model with its kinks laid open, trained arrays, and all other arrays."""
    weights = problem.weights
    arrays, rest = eqx.partition(problem.frozen, eqx.is_array)

    def predict(weights, arrays, x):
        return eqx.combine(weights, arrays, rest)(x)

    shapes = jax.tree.map(_shape, (weights, arrays)), _one_of(problem.data[0])
    hoisted = _Hoisted.of(predict, *shapes[0], shapes[1])
    others = arrays, hoisted.captured

    def predict_with(weights, others, x):
        arrays, captured = others
        return hoisted.fn(weights, arrays, x, *captured)

    return expose_kinks(predict_with, weights, others, shapes[1]), weights, others


def _shape(a: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype)


def _one_of(samples: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), samples)
