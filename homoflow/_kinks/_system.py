"""A risk minimization problem as the exact flow sees it: flat weights, exposed kinks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from .._dynamics._base import Descent
from .._jaxpr import PiecewiseSmoothFunction
from ._active_pairs import ActivePairs
from ._rows import Rows, WeightLayout


class Derivatives(NamedTuple):
    """L(w), z of every pair and ∇L; and the rows of the active pairs.

    - `dloss_da`: ∂L/∂a for the output a of every kink.
    - `dz_da[k, l]`: ∂z_k/∂a at the kink of the pair in slot l, in the sample of the pair
        in slot k.
    """

    loss: Float[Array, ""]
    z: Float[Array, "samples kinks"]
    gradient: Float[Array, " weights"]
    dloss_da: Float[Array, "samples kinks"]
    rows: Rows
    dz_da: Float[Array, "slots slots"]


class System(eqx.Module):
    """The loss L(w) of flat weights w, with the slopes at all kinks as further inputs.

    At a kink the network computes a = slope · z + offset. `low` and `high` are the slopes
    that its activation has for z < 0 and z > 0. Tables over all pairs have the shape
    (samples, kinks).

    - `constants`: the arrays of the model that are not trained, and those that its
        functions close over.
    - `layout`: how the flat weights are cut into arrays.
    - `descent`: what falls in place of L, and how fast; `None` where it is L itself. All
        that is called a loss here, or a derivative of it, is then of that.
    """

    function: PiecewiseSmoothFunction = eqx.field(static=True)
    loss_of_sample: Callable[[Any, Any], Array]
    is_mean: bool = eqx.field(static=True)
    constants: PyTree
    x: PyTree
    y: PyTree
    low: Float[Array, "samples kinks"]
    high: Float[Array, "samples kinks"]
    layout: WeightLayout
    descent: Descent | None = None

    @property
    def num_kinks(self) -> int:
        return self.function.count

    @property
    def num_samples(self) -> int:
        return self.low.shape[0]

    def slope(self, side: Int[Array, "samples kinks"]) -> Float[Array, "samples kinks"]:
        """The slope that each pair has on its side."""
        return jnp.where(side > 0, self.high, self.low)

    def preactivations(self, w: Array, slopes: Array, offsets: Array) -> Array:
        """z of every pair."""
        weights = self.layout.unravel(w)

        def evaluate_sample(slopes, offsets, x):
            return self.function.forward(weights, slopes, offsets, self.constants, x)[1]

        return jax.vmap(evaluate_sample)(slopes, offsets, self.x)

    def preactivation(
        self, w: Array, slopes: Array, offsets: Array, pair: Int[Array, ""]
    ) -> Float[Array, ""]:
        """z of one pair, from its own sample."""
        i, kink = pair // self.num_kinks, pair % self.num_kinks
        x = jax.tree.map(lambda a: a[i], self.x)
        weights = self.layout.unravel(w)
        z = self.function.forward(weights, slopes[i], offsets[i], self.constants, x)[1]
        return z[kink]

    def loss(self, w: Array, slopes: Array) -> tuple[Array, Array]:
        """L(w), and z of every pair."""
        predictions, z, _ = self._evaluate(w, slopes)
        return self._reduce_loss(predictions), z

    def derivatives(self, w: Array, slopes: Array, pairs: ActivePairs) -> Derivatives:
        """L and its gradient, and J for the active pairs.

        Backward passes start from ∂L/∂prediction, one for each sample, and from z, one
        for each active pair. A single batch of both compiles fastest, but makes the
        gradient of every sample. So it is used only where those are cheap.
        """
        predictions, z, inputs = self._evaluate(w, slopes)
        factors = self._factors(inputs)
        loss, seeds = jax.value_and_grad(self._reduce_loss)(predictions)
        m, from_pairs = self.num_samples, self._pair_seeds(pairs, seeds)
        from_samples = _Seeds(
            sample=jnp.arange(m, dtype=jnp.int32),
            prediction=seeds,
            kink=jnp.zeros(m, jnp.int32),
            z=jnp.zeros(m, w.dtype),
        )
        if self.layout.sums_samples_first():
            of_loss = self._pull_back(w, slopes, from_samples, is_sum=True)
            of_pairs = self._pull_back(w, slopes, from_pairs)
        else:
            batch = jax.tree.map(
                lambda *a: jnp.concatenate(a), from_samples, from_pairs
            )
            of_batch = self._pull_back(w, slopes, batch)
            of_loss = jax.tree.map(lambda a: a[:m], of_batch)
            of_loss = of_loss._replace(
                unfactored=[jnp.sum(g, 0) for g in of_loss.unfactored]
            )
            of_pairs = jax.tree.map(lambda a: a[m:], of_batch)
        return Derivatives(
            loss=loss,
            z=z,
            gradient=self._sum_gradients(of_loss, factors),
            dloss_da=of_loss.activations,
            rows=self._make_rows(of_pairs, [f[from_pairs.sample] for f in factors]),
            dz_da=of_pairs.activations[:, from_pairs.kink],
        )

    def rows(
        self, w: Array, slopes: Array, pairs: ActivePairs, inputs: list[Array]
    ) -> Rows:
        """J for the active pairs, given the `inputs` of products and convolutions."""
        predictions = jax.eval_shape(lambda: self._evaluate(w, slopes)[0])
        seeds = self._pair_seeds(pairs, predictions)
        factors = self._factors([a[seeds.sample] for a in inputs])
        return self._make_rows(self._pull_back(w, slopes, seeds), factors)

    def dloss_da_if_alone(
        self,
        w: Array,
        slopes: Array,
        disconnected: Bool[Array, "samples kinks"],
        pairs: ActivePairs,
    ) -> Float[Array, " slots"]:
        """∂L/∂a at the kink of each active pair, if that pair alone leaves its kink.

        This is a one-sided derivative: the pair connects disconnected pairs above it,
        which go to the sides to which it pushes them. These may be other ones than the
        sides that they have now.
        """
        weights, zeros = self.layout.unravel(w), jnp.zeros(self.num_kinks, w.dtype)
        seeds = jax.grad(self._reduce_loss)(self._evaluate(w, slopes)[0])

        def differentiate(pair):
            i, kink = pair // self.num_kinks, pair % self.num_kinks
            x, seed = jax.tree.map(lambda a: a[i], (self.x, seeds))
            kinks = jnp.arange(self.num_kinks, dtype=kink.dtype)
            direction = (kinks == kink).astype(w.dtype)

            def push_next_layer(_, carry):
                slopes, _ = carry
                _, (prediction, z) = jax.jvp(
                    lambda offsets: self.function.forward(
                        weights, slopes, offsets, self.constants, x
                    ),
                    (zeros,),
                    (direction,),
                )
                is_pushed = disconnected[i] & (z != 0)
                slope = jnp.where(z > 0, self.high[i], self.low[i])
                change = jax.tree.map(jnp.vdot, seed, prediction)
                return jnp.where(is_pushed, slope, slopes), sum(jax.tree.leaves(change))

            start = slopes[i], jnp.zeros((), w.dtype)
            return lax.fori_loop(0, self.function.depth + 1, push_next_layer, start)[1]

        return jax.vmap(differentiate)(pairs.flat_index)

    def _evaluate(self, w: Array, slopes: Array) -> tuple[PyTree, Array, list[Array]]:
        """Of all samples: predictions, z, and the inputs of products and convolutions."""
        weights, offsets = self.layout.unravel(w), jnp.zeros(self.num_kinks, w.dtype)

        def evaluate_sample(slopes, x):
            return self.function.evaluate(weights, slopes, offsets, self.constants, x)

        return jax.vmap(evaluate_sample)(slopes, self.x)

    def _reduce_loss(self, predictions: PyTree) -> Float[Array, ""]:
        if self.descent is not None:
            return self.descent.objective(predictions, self.y)
        losses = jax.vmap(self.loss_of_sample)(predictions, self.y)
        return jnp.mean(losses) if self.is_mean else jnp.sum(losses)

    def _pair_seeds(self, pairs: ActivePairs, predictions: PyTree) -> "_Seeds":
        """Seeds for z of each active pair; `predictions` tell the shapes of the others."""
        capacity = pairs.flat_index.size
        zeros = jax.tree.map(
            lambda a: jnp.zeros((capacity, *a.shape[1:]), a.dtype), predictions
        )
        sample, kink = (
            pairs.flat_index // self.num_kinks,
            pairs.flat_index % self.num_kinks,
        )
        return _Seeds(sample, zeros, kink, jnp.ones(capacity, self.low.dtype))

    def _pull_back(
        self,
        w: Array,
        slopes: Float[Array, "samples kinks"],
        seeds: "_Seeds",
        is_sum: bool = False,
    ) -> "_Cotangents":
        """Backward passes from the seeds, one row for each.

        For a sum, the gradients of unfactored weights are summed over the rows.
        """
        layout, function = self.layout, self.function
        leaves = jax.tree.leaves(layout.unravel(w))
        sample, count = seeds.sample, seeds.sample.size
        taps = [jnp.zeros((count, *p.shape), w.dtype) for p in function.factored]

        def evaluate_row(unfactored, taps, offsets, slopes, x, seed):
            weights = layout.insert_unfactored(leaves, unfactored)
            prediction, z = function.evaluate_with_taps(
                weights, taps, slopes, offsets, self.constants, x
            )
            products = jax.tree.map(jnp.vdot, seed.prediction, prediction)
            return sum(jax.tree.leaves(products), seed.z * z[seed.kink])

        def evaluate_sum(*arguments):
            return jnp.sum(jax.vmap(evaluate_row, axes)(*arguments))

        axes, by = (None, 0, 0, 0, 0, 0), (0, 1, 2)
        gradient = (
            jax.grad(evaluate_sum, by)
            if is_sum
            else jax.vmap(jax.grad(evaluate_row, by), axes)
        )
        x = jax.tree.map(lambda a: a[sample], self.x)
        offsets = jnp.zeros((count, self.num_kinks), w.dtype)
        unfactored, deltas, activations = gradient(
            layout.unfactored(leaves), taps, offsets, slopes[sample], x, seeds
        )
        products, others = self._split(deltas)
        convolved = zip(function.convolutions, others, strict=True)
        others = [jax.vmap(c.by_position)(delta) for c, delta in convolved]
        return _Cotangents(unfactored, [*products, *others], activations)

    def _factors(self, inputs: list[Array]) -> list[Array]:
        """The vectors of products, and the patches of convolutions."""
        vectors, images = self._split(inputs)
        convolved = zip(self.function.convolutions, images, strict=True)
        return [*vectors, *(jax.vmap(c.patches)(image) for c, image in convolved)]

    def _split(self, arrays: list[Array]) -> tuple[list[Array], list[Array]]:
        """Those for products, and those for convolutions."""
        count = len(self.function.products)
        return arrays[:count], arrays[count:]

    def _make_rows(self, found: "_Cotangents", factors: list[Array]) -> Rows:
        kernels = [jax.vmap(c.gradient) for c in self.function.convolutions]
        explicit = self._explicit_gradients(found, factors, kernels)
        flat = [g.reshape(g.shape[0], -1) for g in explicit]
        nothing = jnp.zeros((found.activations.shape[0], 0), self.low.dtype)
        vectors, deltas = (self._split(a)[0] for a in (factors, found.deltas))
        return Rows(jnp.concatenate([nothing, *flat], 1), deltas, vectors)

    def _sum_gradients(self, found: "_Cotangents", factors: list[Array]) -> Array:
        """The sum of all gradients, where those of unfactored weights are summed yet."""
        kernels = [
            lambda *pair, c=c: c.gradient(*map(jnp.concatenate, pair))
            for c in self.function.convolutions
        ]
        gradients = self._explicit_gradients(found, factors, kernels)
        explicit = self.layout.ravel_explicit(gradients, self.low.dtype)
        vectors, deltas = (self._split(a)[0] for a in (factors, found.deltas))
        return self.layout.assemble(explicit, deltas, vectors)

    def _explicit_gradients(
        self, found: "_Cotangents", factors: list[Array], kernels: list[Callable]
    ) -> list[Array]:
        """Gradients of what `Rows` hold as columns, in the order of the weights.

        `kernels` compute those of the convolutions from deltas and patches.
        """
        patches, deltas = (self._split(a)[1] for a in (factors, found.deltas))
        convolved = zip(
            self.function.convolutions, kernels, deltas, patches, strict=True
        )
        unfactored = iter(found.unfactored)
        kernel_of = {c.leaf: kernel(*pair) for c, kernel, *pair in convolved}
        return [
            kernel_of[i] if i in kernel_of else next(unfactored)
            for i in self.layout.explicit(range(self.layout.num_leaves))
        ]


class _Seeds(NamedTuple):
    """Where backward passes start: cotangents of a sample's prediction and of one z."""

    sample: Int[Array, " rows"]
    prediction: PyTree
    kink: Int[Array, " rows"]
    z: Float[Array, " rows"]


class _Cotangents(NamedTuple):
    """What backward passes give, one in a row.

    - `unfactored`: the gradients of weights that are not factored, or their sums.
    - `deltas`: those of the results of products and, by position, of convolutions.
    - `activations`: those of the output of every kink.
    """

    unfactored: list[Array]
    deltas: list[Array]
    activations: Float[Array, "rows kinks"]
