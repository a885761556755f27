"""The edge of stability: a set, and how weights move while eigenvalues stay at it."""

from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from ..._jax._top_eigenvalues import follow_eigenpairs
from ._complementarity import solve_complementarity
from ._curvature import Curvature
from ._frame import Course, Frame, Slopes
from ._secant import secant_shift
from ._symmetric import are_leading, as_matrix, as_vector, num_pairs

#: How often weights are moved back to the set, at most.
_MAX_RETURNS = 4
#: How far from the threshold, relatively, an eigenvalue counts as being there: so far, or
#: the tolerance of its vector times this.
_MAX_EXCESS, _EXCESS = 1e-7, 1e-2


class Work(NamedTuple):
    """What was computed so far.

    - `products`: of the Hessian with a vector; `slopes`: of an entry of UᵀHU.
    - `searches`: how often eigenvalues were looked for.
    """

    gradients: Int[Array, ""]
    products: Int[Array, ""]
    slopes: Int[Array, ""]
    searches: Int[Array, ""]

    @staticmethod
    def none() -> "Work":
        return Work(*(jnp.asarray(0) for _ in range(4)))

    def plus(
        self,
        gradients: Int[ArrayLike, ""] = 0,
        products: Int[ArrayLike, ""] = 0,
        slopes: Int[ArrayLike, ""] = 0,
        searches: Int[ArrayLike, ""] = 0,
    ) -> "Work":
        return Work(
            self.gradients + gradients,
            self.products + products,
            self.slopes + slopes,
            self.searches + searches,
        )


class Spectrum(NamedTuple):
    """The largest eigenvalues in falling order, and their vectors."""

    values: Float[Array, " rows"]
    vectors: Float[Array, "rows size"]
    residuals: Float[Array, " rows"]


class Motion(NamedTuple):
    """How weights move while the leading eigenvalues stay at the threshold.

    - `gradient`: ∇L; `velocity`: dw/dτ, its part along which these eigenvalues stay.
    - `pull`: the opposite of the velocity that the flow would have without the edge.
    - `oscillation`: X with Σ = UXUᵀ, the covariance of the oscillation around the weights,
        U the first `critical` eigenvectors.
    - `hold`: what X would have to be for these eigenvalues to stay in spite of the pull. It
        decides whether they do; to first order it is X.
    - `mean_gradient`: ∇L + ½∇⟨∇²L, Σ⟩, the mean of the gradient over the oscillation.
    - `rise`: the rate at which gradient flow would raise these eigenvalues, in the
        mean.
    - `way_back`: the least change of weights, to first order, that takes away what these
        eigenvalues have above the threshold, to be subtracted.
    - `slopes`: J of these eigenvalues, by rows.
    """

    gradient: Float[Array, " size"]
    velocity: Float[Array, " size"]
    pull: Float[Array, " size"]
    oscillation: Float[Array, "critical critical"]
    hold: Float[Array, "critical critical"]
    mean_gradient: Float[Array, " size"]
    rise: Float[Array, ""]
    way_back: Float[Array, " size"]
    slopes: Float[Array, "pairs size"]
    spectrum: Spectrum

    def frame(self) -> Frame:
        """The eigenvectors at the threshold with their slopes."""
        num = self.oscillation.shape[0]
        return Frame(self.spectrum.vectors[:num], self.slopes)


class Edge(NamedTuple):
    """The set {λ_max(∇²L) ≤ threshold}, and how its spectrum is followed.

    - `max_critical`: how many eigenvalues may be at the threshold.
    - `rtol`: of an eigenvector's residual, relative to the norm of the Hessian.
    - `lag`: the learning rate η̃ to second order in which steps are not a flow, or `None`.
    """

    curvature: Curvature
    threshold: Float[Array, ""]
    max_critical: int
    rtol: Float[Array, ""]
    lag: Float[Array, ""] | None = None

    def fastest(self, value: Float[Array, ""]) -> Float[Array, ""]:
        """The rate at which the direction of an eigenvalue decays."""
        return value if self.lag is None else value * (1 + self.lag * value / 2)

    def spectrum(
        self,
        w: Array,
        guess: Array,
        num_wanted: Int[Array, ""],
        num_watched: Int[Array, ""],
        work: Work,
    ) -> tuple[Float[Array, " size"], Spectrum, Work]:
        """∇L and the largest eigenvalues."""
        gradient, product = self.curvature.linearize(w)
        found = follow_eigenpairs(product, guess, num_wanted, num_watched, self.rtol)
        work = work.plus(gradients=1, products=found.num_products, searches=1)
        return gradient, Spectrum(found.values, found.vectors, found.residuals), work

    def glide(
        self,
        w: Array,
        course: Course,
        elapsed: Float[Array, ""],
        num: Int[Array, ""],
        work: Work,
    ) -> tuple[Motion, Work]:
        """The motion at a point near the set, with eigenvectors where they are expected.

        To second order, which looks back by more than a short step, that is not good enough
        and they are looked for. Without eigenvalues at the threshold it is −∇L.
        """

        def free(work: Work) -> tuple[Motion, Work]:
            gradient, pull, work = self.pull(w, work)
            motion = self.unknown_motion(w, course.vectors(elapsed))
            return motion._replace(gradient=gradient, velocity=-pull), work

        def expected(work: Work) -> tuple[Motion, Work]:
            vectors = course.vectors(elapsed)
            values = jnp.full(vectors.shape[0], self.threshold, w.dtype)
            spectrum = Spectrum(values, vectors, jnp.zeros_like(values))
            gradient, slopes = self.curvature.gradient(w), course.slopes(elapsed)
            work = work.plus(gradients=1)
            return self._motion(gradient, slopes, spectrum, num), work

        def found(work: Work) -> tuple[Motion, Work]:
            guess = course.vectors(elapsed)
            gradient, spectrum, work = self.spectrum(w, guess, num, num, work)
            motion, work = self.motion(w, gradient, spectrum, num, work)
            return self.with_lag(w, motion, num, work)

        pinned = expected if self.lag is None else found
        return lax.cond(num > 0, pinned, free, work)

    def settle(
        self,
        w: Array,
        guess: Array,
        num: Int[Array, ""],
        num_wanted: Int[Array, ""],
        work: Work,
    ) -> tuple[Float[Array, " size"], Motion, Work]:
        """The weights moved back to where the first `num` eigenvalues are the threshold.

        By Newton's method, each time by the shortest way; and the motion there, with
        `num_wanted` accurate eigenvalues. The row after these is a random vector, which
        sees eigenvalues rise that the others know nothing of.
        """
        # Of few weights all eigenvalues may be in sight already.
        num_wanted = jnp.minimum(num_wanted, guess.shape[0])
        num_watched = jnp.minimum(num_wanted + 1, guess.shape[0])
        stray = jr.normal(jr.fold_in(jr.key(0), work.searches), w.shape, w.dtype)
        guess = guess.at[num_wanted].set(stray, mode="drop")
        tolerance = jnp.minimum(_MAX_EXCESS, _EXCESS * self.rtol)
        tolerance = jnp.maximum(tolerance, 20 * jnp.finfo(w.dtype).eps)

        def is_off(loop) -> Array:
            *_, is_off, count, _ = loop
            return is_off & (count <= _MAX_RETURNS)

        def go_back(loop):
            w, old, _, count, work = loop
            w = w - old.way_back
            gradient, spectrum, work = self.spectrum(
                w, old.spectrum.vectors, num_wanted, num_watched, work
            )
            motion, work = self.motion(w, gradient, spectrum, num, work)
            is_off = self.excess(spectrum, num) > tolerance
            return w, motion, is_off, count + 1, work

        start = self.unknown_motion(w, guess)
        loop = (w, start, jnp.asarray(True), jnp.asarray(0), work)
        w, motion, _, _, work = lax.while_loop(is_off, go_back, loop)
        if self.lag is not None:
            motion, work = self.with_lag(w, motion, num, work)
        return w, motion, work

    def pull(
        self, w: Array, work: Work
    ) -> tuple[Float[Array, " size"], Float[Array, " size"], Work]:
        """∇L, and what moves the weights where no eigenvalue is at the threshold."""
        if self.lag is None:
            gradient = self.curvature.gradient(w)
            return gradient, gradient, work.plus(gradients=1)
        gradient, product = self.curvature.linearize(w)
        pull = gradient + self.lag / 2 * product(gradient)
        return gradient, pull, work.plus(gradients=1, products=1)

    def with_lag(
        self, w: Array, motion: Motion, num: Int[Array, ""], work: Work
    ) -> tuple[Motion, Work]:
        """The motion to second order in the learning rate, from that to first order.

        Steps w⁺ = w − η·(mean gradient) follow a smooth path with w' + (η/2)w″ = −(mean
        gradient). Along the first-order velocity F, (η/2)w″ is F(w) − F(w − (η/2)F), and
        without an edge (η/2)∇²L∇L.
        """
        lag = self.lag
        assert lag is not None
        gradient, pull, work = self.pull(w, work)
        slopes = Slopes.from_rows(motion.slopes)
        hold = -2 * solve_scaled(slopes.gram, slopes.along(pull), num)

        def bend(work: Work) -> tuple[Array, Work]:
            behind = w - lag / 2 * motion.velocity
            vectors = motion.spectrum.vectors
            there, spectrum, work = self.spectrum(behind, vectors, num, num, work)
            before, work = self.motion(behind, there, spectrum, num, work)
            return gradient + motion.velocity - before.velocity, work

        force, work = lax.cond(num > 0, bend, lambda work: (pull, work), work)
        motion = motion._replace(pull=pull, hold=as_matrix(hold, self.max_critical))
        x = -2 * solve_scaled(slopes.gram, slopes.along(force), num)
        mean_force = slopes.force(x) / 2
        motion = motion._replace(
            velocity=-force - mean_force,
            oscillation=as_matrix(x, self.max_critical),
            mean_gradient=gradient + mean_force,
        )
        return motion, work

    def unknown_motion(self, w: Array, guess: Float[Array, "rows size"]) -> Motion:
        """A motion of which nothing is known but a guess of the eigenvectors."""
        nothing, rows = jnp.zeros_like(w), jnp.zeros(guess.shape[0], w.dtype)
        still = jnp.zeros((self.max_critical, self.max_critical), w.dtype)
        return Motion(
            gradient=nothing,
            velocity=nothing,
            pull=nothing,
            oscillation=still,
            hold=still,
            mean_gradient=nothing,
            rise=jnp.zeros((), w.dtype),
            way_back=nothing,
            slopes=jnp.zeros((num_pairs(self.max_critical), w.size), w.dtype),
            spectrum=Spectrum(rows, guess, rows),
        )

    def excess(self, spectrum: Spectrum, num: Int[Array, ""]) -> Float[Array, ""]:
        """How far, relatively, the first eigenvalues are from the threshold."""
        is_pinned = jnp.arange(spectrum.values.size) < num
        off = jnp.abs(spectrum.values / self.threshold - 1)
        return jnp.max(jnp.where(is_pinned, off, 0))

    def shift(
        self, w: Array, motion: Motion, num: Int[Array, ""], work: Work
    ) -> tuple[Float[Array, ""], Work]:
        """How far descent's sharpness is from the threshold: see `secant_shift`."""
        vectors = motion.spectrum.vectors[: self.max_critical]
        shift = secant_shift(
            self.curvature, w, vectors, motion.oscillation, num, self.threshold
        )
        return shift, work.plus(gradients=2 * num)

    def slopes(
        self, w: Array, spectrum: Spectrum, num: Int[Array, ""], work: Work
    ) -> tuple[Float[Array, "pairs size"], Work]:
        """Of the entries of UᵀHU, as `Curvature.slopes` has them."""
        vectors = spectrum.vectors[: self.max_critical]
        return self.curvature.slopes(w, vectors, num), work.plus(slopes=num_pairs(num))

    def weigh(
        self,
        w: Array,
        pull: Array,
        spectrum: Spectrum,
        near: Int[Array, ""],
        rate: float | Float[Array, ""],
        work: Work,
    ) -> tuple[Float[Array, "critical critical"], Float[Array, " size"], Work]:
        """X and the velocity that let none of the `near` first eigenvalues pass the edge.

        Each may rise by its gap times `rate` in a unit of time; 0 stands for no gaps. Those
        that fall by themselves are not in X.
        """
        slopes, work = self.slopes(w, spectrum, near, work)
        values = spectrum.values[: self.max_critical]
        is_near = jnp.arange(values.size) < near
        gaps = rate * jnp.where(is_near, self.threshold - values, 0)
        linear = slopes @ pull + as_vector(jnp.diag(gaps))
        gram = slopes @ slopes.T / 2
        found = solve_complementarity(gram, linear, self.max_critical).matrix
        return found, -pull - as_vector(found) @ slopes / 2, work

    def motion(
        self,
        w: Array,
        gradient: Array,
        spectrum: Spectrum,
        num: Int[Array, ""],
        work: Work,
    ) -> tuple[Motion, Work]:
        """X from −d(UᵀHU)/dτ = J∇L + ½JJ*X = 0, and the velocity −∇L − ½J*X.

        To first order in the learning rate: see `with_lag`.
        """
        slopes, work = self.slopes(w, spectrum, num, work)
        return self._motion(gradient, Slopes.from_rows(slopes), spectrum, num), work

    def _motion(
        self, gradient: Array, slopes: Slopes, spectrum: Spectrum, num: Int[Array, ""]
    ) -> Motion:
        fall = slopes.along(gradient)
        x = -2 * solve_scaled(slopes.gram, fall, num)
        count = jnp.maximum(num, 1).astype(gradient.dtype)
        velocity = -gradient - slopes.force(x) / 2
        oscillation = as_matrix(x, self.max_critical)
        values = spectrum.values[: self.max_critical]
        off = jnp.where(jnp.arange(values.size) < num, values - self.threshold, 0)
        back = solve_scaled(slopes.gram, as_vector(jnp.diag(off)), num)
        return Motion(
            gradient=gradient,
            velocity=velocity,
            pull=gradient,
            oscillation=oscillation,
            hold=oscillation,
            mean_gradient=-velocity,
            rise=-jnp.trace(as_matrix(fall, self.max_critical)) / count,
            way_back=slopes.force(back),
            slopes=slopes.rows,
            spectrum=spectrum,
        )


def solve_scaled(
    gram: Float[Array, "pairs pairs"],
    right: Float[Array, " pairs"],
    num: Int[Array, ""],
) -> Float[Array, " pairs"]:
    """gram⁻¹·right over the pairs of the first `num` vectors, 0 for all others."""
    size = round(((1 + 8 * right.size) ** 0.5 - 1) / 2)
    diagonal = jnp.diagonal(gram)
    is_used = are_leading(size, num) & (diagonal > 0)
    scale = jnp.where(is_used, jnp.where(is_used, diagonal, 1) ** -0.5, 0)
    identity = jnp.diag(jnp.where(is_used, 0, 1).astype(gram.dtype))
    scaled = scale[:, None] * gram * scale + identity
    return scale * jnp.linalg.solve(scaled, scale * right)
