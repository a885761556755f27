"""Gauss–Legendre collocation: it conserves every quadratic law, at any step size."""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from ._base import AbstractFlowSolver
from ._checks import require_single_dtype
from ._interpolation import AbstractStepPolynomial

#: Beyond this many unknowns the dense Jacobian of the stages takes gigabytes.
MAX_UNKNOWNS = 20_000
#: Iterations until a step has failed.
_MAX_ITERATIONS = {"newton": 25, "fixed point": 100}
#: In units of rounding of the step's size: to what its stages are to be found, below
#: which change an iteration whose changes grow has met rounding, and above which last
#: change it has failed.
_TOLERANCE, _NEAR_ROUNDING, _FAILURE = 0.5, 10, 1e4
#: Columns of the Jacobian that are computed at a time.
_CHUNK = 8


class _Tableau(NamedTuple):
    """Nodes, coefficients and weights; what turns stages into the polynomial's powers.

    `coefficients[p, i]` is the weight of stage i in the coefficient of θ^(p+1); `start`
    gives the slope at the step's start from those at the nodes.
    """

    nodes: np.ndarray
    a: np.ndarray
    b: np.ndarray
    coefficients: np.ndarray
    start: np.ndarray


def _tableau(stages: int) -> _Tableau:
    """Collocation at the zeros of Legendre's polynomial [Hairer & Wanner 1996, IV.5]."""
    at, weights = np.polynomial.legendre.leggauss(stages)
    nodes, b = (at + 1) / 2, weights / 2
    # Lagrange's polynomials: column i is the coefficients of the one that is 1 at node i.
    lagrange = np.linalg.inv(np.vander(nodes, increasing=True))
    powers = np.arange(1, stages + 1)
    coefficients = lagrange / powers[:, None]
    a = (nodes[:, None] ** powers) @ coefficients
    return _Tableau(nodes, a, b, coefficients, lagrange[0])


class _Collocation(AbstractStepPolynomial):
    """The polynomial of degree s with the field's slopes at the nodes."""

    @staticmethod
    def evaluate_leaf(s, start, end, coefficients):
        powers = s ** jnp.arange(1, coefficients.shape[0] + 1, dtype=start.dtype)
        # To the last digit what the step ends with.
        return jnp.where(
            s == 1, end, start + jnp.tensordot(powers, coefficients, axes=1)
        )


class GaussLegendre(AbstractFlowSolver, dfx.AbstractAdaptiveSolver):
    """Gauss–Legendre collocation with 1, 2 or 3 stages, of order 2, 4 or 6.

    It conserves every quadratic quantity of the differential equation, so all laws of
    homoflow, to rounding at any step size [Cooper 1987]: the laws hold by construction,
    with nothing known of them. It is A-stable; with one stage it is the implicit midpoint
    method. Between steps it has the collocation polynomial, of order s + 1, on which laws
    hold to that order only: `flow(…, project=True)` restores them there too.

    The stages are found to rounding, by Newton's method with the Jacobian of the step's
    start, for stiff flows of up to some hundred weights; or by `iteration="fixed point"`,
    without a Jacobian, for steps shorter than about 1/λ_max of the Hessian. Where that
    fails the step is rejected, or at constant steps the solve ends with
    `diffrax.RESULTS.nonlinear_divergence`. Steps may be constant, or chosen by an estimate
    of order s + 1: the difference between the field at the step's start and the
    polynomial's slope there, which is cautious, since it belongs to a method of lower
    order. For long runs constant steps are as good, unless errors must be tiny.

    It can stand wherever a Diffrax solver can, with an `ODETerm` on any PyTree of arrays
    of one floating-point dtype. Derivatives in forward and reverse mode are those of the
    stages' equations.

    **Arguments:**

    - `stages`: 1, 2 or 3.
    - `iteration`: `"newton"` or `"fixed point"`.

    **Raises:** `ValueError` for other arguments, where the state's dtype is not one
    floating-point dtype, or for Newton's method with more than 20,000 unknowns (stages ×
    weights).

    G. J. Cooper, "Stability of Runge–Kutta methods for trajectory problems", IMA Journal
    of Numerical Analysis 7, 1 (1987).

    ```python
    import diffrax

    model = hf.MLP((3, 4, 1), activation="linear", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), t1=5.0, solver=hf.GaussLegendre(), dt0=0.1,
                   stepsize_controller=diffrax.ConstantStepSize())
    ```
    """

    stages: int = eqx.field(default=2, static=True)
    iteration: str = eqx.field(default="newton", static=True)

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = _Collocation

    @property
    def runs_in_turn(self) -> bool:
        return True

    def __check_init__(self):
        if self.stages not in (1, 2, 3):
            raise ValueError(f"`stages` must be 1, 2 or 3; got {self.stages}.")
        if self.iteration not in _MAX_ITERATIONS:
            raise ValueError(
                f"`iteration` must be 'newton' or 'fixed point'; got {self.iteration!r}."
            )

    def order(self, terms):
        return 2 * self.stages

    def error_order(self, terms):
        return self.stages + 1

    def init(self, terms, t0, t1, y0, args):
        require_single_dtype("GaussLegendre", y0)
        unknowns = self.stages * sum(jnp.size(leaf) for leaf in jax.tree.leaves(y0))
        if self.iteration == "newton" and unknowns > MAX_UNKNOWNS:
            raise ValueError(
                f"GaussLegendre decomposes a dense {unknowns:,} × {unknowns:,} matrix in "
                f"every step and refuses more than {MAX_UNKNOWNS:,} unknowns: use "
                "`iteration='fixed point'`."
            )

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del made_jump
        tableau = _tableau(self.stages)
        w, unravel = ravel_pytree(y0)
        control = terms.contr(t0, t1)
        t0, h = jnp.asarray(t0), jnp.asarray(t1 - t0)
        times = t0 + jnp.asarray(tableau.nodes, h.dtype) * h

        def increment(t, w):
            moved = terms.vf_prod(t, unravel(w), args, control)
            return ravel_pytree(moved)[0].astype(w.dtype)

        def stage_increments(z):
            return jax.vmap(increment)(times, w + z)

        # The field at the start gives the first guess, and later the error.
        start_increment = increment(t0, w)
        correct = _identity
        if self.iteration == "newton":
            a = jnp.asarray(tableau.a, w.dtype)
            correct = _newton_correction(lambda w: increment(t0, w), w, a)
        z, last_change = self._solve_stages(
            tableau, w, start_increment, stage_increments, correct
        )
        is_found = last_change <= _FAILURE * float(jnp.finfo(w.dtype).eps)
        d = stage_increments(z)
        w1 = w + jnp.asarray(tableau.b, w.dtype) @ d
        polynomial_slope = jnp.asarray(tableau.start, w.dtype) @ d
        error = (start_increment - polynomial_slope) / (self.stages + 1) ** 2
        if self.iteration == "newton":
            # As for Radau IIA: stiff parts of it have decayed.
            error = lax.stop_gradient(correct(jnp.broadcast_to(error, z.shape)))[-1]
        error = jnp.where(is_found, error, jnp.inf)
        y1 = unravel(w1)
        coefficients = jax.vmap(unravel)(jnp.asarray(tableau.coefficients, w.dtype) @ d)
        dense = {"y0": y0, "y1": y1, "coefficients": coefficients}
        result = dfx.RESULTS.where(
            is_found,
            dfx.RESULTS.successful,
            dfx.RESULTS.nonlinear_divergence,  # pyright: ignore[reportArgumentType]
        )
        return y1, unravel(error), dense, solver_state, result

    def _solve_stages(
        self,
        tableau: _Tableau,
        w: Float[Array, " n"],
        start_increment: Float[Array, " n"],
        stage_increments: Callable[[Array], Array],
        correct: Callable[[Array], Array],
    ) -> tuple[Float[Array, "stages n"], Float[Array, ""]]:
        """z with z = A·h·f(w + z), and the last change of its iteration."""
        a = jnp.asarray(tableau.a, w.dtype)
        solve_linear = _solve_dense if self.iteration == "newton" else _solve_by_series
        return lax.custom_root(
            lambda z: z - a @ stage_increments(z),
            jnp.asarray(tableau.nodes, w.dtype)[:, None] * start_increment,
            lambda residual, z: _iterate(
                residual,
                z,
                jnp.linalg.norm(w),
                correct,
                _MAX_ITERATIONS[self.iteration],
            ),
            solve_linear,
            has_aux=True,
        )


def _iterate(
    residual: Callable[[Array], Array],
    z: Float[Array, "stages n"],
    size: Float[Array, ""],
    correct: Callable[[Array], Array],
    max_iterations: int,
) -> tuple[Float[Array, "stages n"], Float[Array, ""]]:
    """z with residual 0 to rounding of something of that size, and its last change."""
    eps = float(jnp.finfo(z.dtype).eps)

    def relative(change: Array, z: Array) -> Array:
        whole = size + jnp.linalg.norm(z)
        return jnp.linalg.norm(change) / jnp.where(whole > 0, whole, 1)

    def should_continue(state):
        _, change, previous_change, count = state
        # At the level of rounding changes become no smaller.
        has_met_rounding = (change >= previous_change) & (
            change <= _NEAR_ROUNDING * eps
        )
        is_unfinished = change > _TOLERANCE * eps
        return is_unfinished & ~has_met_rounding & (count < max_iterations)

    def improve(state):
        z, previous_change, _, count = state
        change = correct(residual(z))
        return z - change, relative(change, z), previous_change, count + 1

    unknown = jnp.asarray(jnp.inf, z.dtype)
    z, change, *_ = lax.while_loop(
        should_continue, improve, (z, unknown, unknown, jnp.zeros((), jnp.int32))
    )
    return z, change


def _newton_correction(
    increment: Callable[[Array], Array], w: Float[Array, " n"], a: Array
) -> Callable[[Array], Array]:
    """(I − A⊗hJ)⁻¹ with the Jacobian J of the step's start."""
    _, jacobian_times = jax.linearize(increment, w)
    identity = jnp.eye(w.size, dtype=w.dtype)
    columns = lax.map(jacobian_times, identity, batch_size=min(_CHUNK, w.size))
    matrix = jnp.eye(a.shape[0] * w.size, dtype=w.dtype) - jnp.kron(a, columns.T)
    decomposed = jax.scipy.linalg.lu_factor(matrix, check_finite=False)

    def correct(r):
        solved = jax.scipy.linalg.lu_solve(
            decomposed, r.reshape(-1), check_finite=False
        )
        return solved.reshape(r.shape)

    return correct


def _identity(r: Array) -> Array:
    return r


def _solve_dense(linear: Callable[[Array], Array], b: Array) -> Array:
    """x with linear(x) = b, for derivatives."""
    matrix = jax.jacfwd(linear)(jnp.zeros_like(b)).reshape(b.size, b.size)
    return jnp.linalg.solve(matrix, b.reshape(-1)).reshape(b.shape)


def _solve_by_series(linear: Callable[[Array], Array], b: Array) -> Array:
    """The same where linear is the identity and a contraction."""

    def solve(linear, b):
        max_iterations = _MAX_ITERATIONS["fixed point"]
        size = jnp.zeros((), b.dtype)
        return _iterate(lambda x: linear(x) - b, b, size, _identity, max_iterations)[0]

    return lax.custom_linear_solve(linear, b, solve, transpose_solve=solve)
