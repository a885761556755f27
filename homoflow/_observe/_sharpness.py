"""The largest eigenvalues of the Hessian of a loss, along a run."""

from collections.abc import Callable
from typing import NamedTuple, final

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PyTree

from .._jax._top_eigenvalues import Known, top_eigenvalues
from .._jax._when_differentiated import when_differentiated
from .._problem._problem import Problem
from ._base import AbstractObservable, Point

#: ‖Hv − λv‖ relative to ‖H‖ at which the iteration stops.
RESIDUAL = 3e-4


class TopEigenvalues(NamedTuple):
    """The largest eigenvalues of ∇²L, in falling order.

    - `values`: NaN where the iteration did not converge.
    - `residuals`: ‖Hv − λv‖: so far away an eigenvalue is at most, and usually much less.
    - `num_products`: Hessian-vector products that it took. A float: what Diffrax records
        has to have room for inf.
    """

    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    num_products: Float[Array, ""]


@final
class Sharpness(AbstractObservable):
    """The `k` largest eigenvalues of ∇²L at the recorded times.

    The iteration for them starts from the vectors of the time before, and from a random
    one that looks for what those know nothing of. See `homoflow.sharpness` for the
    accuracy. At kinks (ReLU) there is no Hessian; elsewhere the kinks are not in it. The
    values can be differentiated where the eigenvalues are simple.

    Each recorded time costs about ten Hessian-vector products and more: with `every=n`
    every n-th of the run's times is looked at.

    - `at`: `"iterates"`, or `"midpoints"` of a descent, (w_{t−2} + 2w_{t−1} + w_t)/4, which
        are free of its swing from side to side: the value at a step is that around the
        step before. Every step of the descent has to be a time of the run.
    - `preconditioner`: a function from a `homoflow.observe.Point` to the positive diagonal
        of P, a pytree like the weights; then eigenvalues are those of P⁻¹∇²L. It finds
        the optimizer's state in `point.memory`.

    A step w⁺ = w − ηP⁻¹∇L is unstable beyond λ_max(P⁻¹∇²L) = 2/η. Of RMSProp P is the
    root of the mean squares, of heavy ball the identity (with 2(1 + μ)/η).

    ```python
    model = hf.MLP((3, 8, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    observe = {"sharpness": hf.observe.Sharpness(k=2, every=10)}
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0, observe=observe)
    flow.observed["sharpness"].values.shape  # (11, 2)

    import optax

    def root(point):
        squares = optax.tree.get(point.memory, "nu")
        return jax.tree.map(lambda s: jnp.sqrt(s + 1e-8), squares)

    midpoints = hf.observe.Sharpness(at="midpoints", every=10, preconditioner=root)
    gd = hf.descend(
        model, (x, x[:, :1]), 20, learning_rate=0.01, optimizer=optax.rmsprop,
        observe={"preconditioned": midpoints},
    )
    ```
    """

    k: int = eqx.field(static=True, default=1)
    every: int = eqx.field(static=True, default=1)
    at: str = eqx.field(static=True, default="iterates")
    preconditioner: Callable[[Point], PyTree] | None = None

    def __check_init__(self) -> None:
        if self.at not in ("iterates", "midpoints"):
            raise ValueError(
                f"`at` must be 'iterates' or 'midpoints'; got {self.at!r}."
            )
        if self.preconditioner is not None and not callable(self.preconditioner):
            raise TypeError("`preconditioner` must be a function of a point.")
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"`k` must be a positive integer; got {self.k!r}.")

    @property
    def is_sequential(self) -> bool:
        return self.follows_steps

    @property
    def follows_steps(self) -> bool:
        return self.at == "midpoints"

    def init(self, point: Point) -> "_Handed":
        guess = random_vectors(point.weights, self.k)
        w = point.weights if self.follows_steps else None
        return _Handed(guess, Known(guess[-1], jnp.asarray(0)), w, w)

    def pass_by(self, point: Point, carry: "_Handed") -> "_Handed":
        if not self.follows_steps:
            return carry
        return carry._replace(last=point.weights, before=carry.last)

    def __call__(
        self, point: Point, carry: "_Handed"
    ) -> tuple[TopEigenvalues, "_Handed"]:
        weights, scale = point.weights, None
        if self.follows_steps:
            weights = jax.tree.map(
                lambda a, b, c: (a + 2 * b + c) / 4, carry.before, carry.last, weights
            )
        if self.preconditioner is not None:
            diagonal = self.preconditioner(point)
            scale = jax.tree.map(
                lambda w, p: 1 / jnp.sqrt(jnp.broadcast_to(p, w.shape)),
                point.weights,
                diagonal,
            )
            scale = ravel_pytree(scale)[0]
        found, vectors = hessian_eigenvalues(
            point.problem, weights, carry.guess, scale=scale, known=carry.known
        )
        # A NaN must not be where the next time starts from.
        is_good = jnp.all(jnp.isfinite(found.values))
        guess = jnp.where(jnp.isfinite(vectors[: self.k]), vectors[: self.k], carry.guess)
        guard = jnp.where(jnp.isfinite(vectors[-1]), vectors[-1], carry.known.guard)
        known = Known(guard, jnp.where(is_good, carry.known.count + 1, 0))
        return found, self.pass_by(point, carry)._replace(guess=guess, known=known)


class _Handed(NamedTuple):
    """What one time hands on: eigenvectors, and the weights of the last two steps."""

    guess: Float[Array, "k size"]
    known: Known
    last: PyTree
    before: PyTree


def random_vectors(weights: PyTree, k: int) -> Float[Array, "k size"]:
    """Where the iteration for `k` eigenvalues starts from if nothing is known."""
    flat = ravel_pytree(weights)[0]
    if k > flat.size:
        raise ValueError(f"The Hessian of {flat.size} weights has no {k} eigenvalues.")
    return jr.normal(jr.key(1), (k, flat.size), flat.dtype)


def hessian_eigenvalues(
    problem: Problem,
    weights: PyTree,
    guess: Float[Array, "k size"],
    sign: float | Float[Array, ""] = 1.0,
    scale: Float[Array, " size"] | None = None,
    known: Known | None = None,
) -> tuple[TopEigenvalues, Float[Array, "rows size"]]:
    """The largest eigenvalues of `sign`·∇²L at `weights`, their vectors, and the next.

    With `scale` those of ∇²L between two diagonal matrices that have it. The values can be
    differentiated: with the derivative of a simple eigenvalue.
    """
    flat, unravel = ravel_pytree(weights)

    def gradient(problem, flat):
        return jax.grad(lambda v: sign * problem.loss(unravel(v)))(flat)

    # The iteration is not to be differentiated: with its vector v held still, the
    # derivative of vᵀHv is that of the eigenvalue.
    numbers, static = eqx.partition(problem, eqx.is_array)
    still = eqx.combine(jax.lax.stop_gradient(numbers), static)
    _, unscaled = jax.linearize(
        lambda v: gradient(still, v), jax.lax.stop_gradient(flat)
    )
    size = jnp.ones_like(flat) if scale is None else scale
    fixed = jax.lax.stop_gradient(size)

    def product(v):
        return fixed * unscaled(fixed * v) if scale is not None else unscaled(v)

    found = top_eigenvalues(product, jax.lax.stop_gradient(guess), RESIDUAL, known)
    found = jax.lax.stop_gradient(found)

    def moving(values, vectors, problem, flat, size):
        def curvature(v):
            v = size * v
            _, image = jax.jvp(lambda u: gradient(problem, u), (flat,), (v,))
            return v @ image

        curvatures = jax.lax.map(curvature, vectors)
        return values + (curvatures - jax.lax.stop_gradient(curvatures))

    values = when_differentiated(
        lambda values, *_: values,
        moving,
        (found.values, found.vectors[: guess.shape[0]], problem, flat, size),
        in_reverse=False,
    )
    num_products = found.num_products.astype(values.dtype)
    return TopEigenvalues(values, found.residuals, num_products), found.vectors
