"""A Rosenbrock method: implicit in the linear part of the flow, by its dense Hessian."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax.flatten_util import ravel_pytree

from . import _rodas5p_tableau as tableau
from ._base import AbstractFlowSolver
from ._checks import require_single_dtype
from ._interpolation import AbstractStepPolynomial

#: Beyond this the Hessian alone takes gigabytes.
MAX_WEIGHTS = 10_000


class _Quartic(AbstractStepPolynomial):
    """The polynomial of degree 4 that Rodas5P's stages give between two steps."""

    @staticmethod
    def evaluate_leaf(s, start, end, coefficients):
        interior = coefficients[0] + s * (coefficients[1] + s * coefficients[2])
        return (1 - s) * start + s * (end + (1 - s) * interior)


class Rodas5P(AbstractFlowSolver, dfx.AbstractAdaptiveSolver):
    """Rodas5P, for stiff flows of up to about a thousand weights [Steinebach 2023].

    A linearly implicit (Rosenbrock) method of order 5, L-stable and stiffly accurate,
    with an embedded error estimate of order 4 and dense output of order 4. A step costs 8
    evaluations of the field, its Jacobian (for gradient flow minus the Hessian), and one
    LU decomposition; its length is bound by accuracy, never by stability. It is for
    flows that follow slow directions for long while fast ones have decayed. The number
    of steps grows as rtol^(−1/5): give `flow` an `rtol`, its default of 1e-10 is for
    explicit methods of higher order.

    It can stand wherever a Diffrax solver can: `solver=homoflow.Rodas5P()` in `flow`,
    or in `diffrax.diffeqsolve` with an `ODETerm` whose field can be differentiated in
    forward mode (symmetric or not, dependent on time or not). Derivatives in forward and
    reverse mode go through it. State: any PyTree of arrays of one floating-point dtype.

    **Arguments:**

    - `chunk`: how many columns of the Jacobian are computed at a time. More take more
        memory.

    **Raises:** `ValueError` where the state's dtype is not one floating-point dtype, or
    it has more than 10,000 numbers, whose dense Jacobian would take gigabytes.

    G. Steinebach, "Construction of Rosenbrock–Wanner method Rodas5P and numerical
    benchmarks within the Julia Differential Equations package", BIT Numerical
    Mathematics 63, 27 (2023).

    ```python
    model = hf.MLP((3, 8, 1), activation=jnp.tanh, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), t1=50.0, solver=hf.Rodas5P(), rtol=1e-6)
    ```
    """

    chunk: int = eqx.field(default=8, static=True)

    term_structure: ClassVar = dfx.AbstractTerm
    interpolation_cls: ClassVar[Callable[..., Any]] = _Quartic

    @property
    def runs_in_turn(self) -> bool:
        return True

    def __check_init__(self):
        if self.chunk < 1:
            raise ValueError(f"`chunk` must be at least 1; got {self.chunk}.")

    def cost(self, *, num_accepted, num_rejected, num_steps, solver_state, args):
        del num_accepted, num_rejected, solver_state, args
        return {
            "gradient_evaluations": tableau.NUM_STAGES * num_steps,
            "jacobian_evaluations": num_steps,
        }

    def order(self, terms):
        return 5

    def init(self, terms, t0, t1, y0, args):
        require_single_dtype("Rodas5P", y0)
        leaves = jax.tree.leaves(y0)
        size = sum(jnp.size(leaf) for leaf in leaves)
        if size > MAX_WEIGHTS:
            raise ValueError(
                f"Rodas5P decomposes a dense {size:,} × {size:,} Jacobian in every step: "
                f"it is made for about a thousand weights, and refuses more than "
                f"{MAX_WEIGHTS:,}."
            )

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        control = terms.contr(t0, t1)
        w, unravel = ravel_pytree(y0)
        t0, h = jnp.asarray(t0), jnp.asarray(t1 - t0)

        def increment(t, w):
            moved = terms.vf_prod(t, unravel(w), args, control)
            return ravel_pytree(moved)[0].astype(w.dtype)

        slope, jacobian_times = jax.linearize(lambda w: increment(t0, w), w)
        in_time = jax.jvp(lambda t: increment(t, w), (t0,), (h,))[1]
        identity = jnp.eye(w.size, dtype=w.dtype)
        columns = jax.lax.map(
            jacobian_times, identity, batch_size=min(self.chunk, w.size)
        )
        decomposed = jax.scipy.linalg.lu_factor(
            identity / tableau.GAMMA - columns.T, check_finite=False
        )

        def solve(right):
            return jax.scipy.linalg.lu_solve(decomposed, right, check_finite=False)

        def solve_stage(stages, row):
            a, c, time, time_slope, i = row
            right = increment(t0 + time.astype(h.dtype) * h, w + a @ stages)
            right = right + c @ stages + time_slope * in_time
            return stages.at[i].set(solve(right)), None

        first_stage = solve(slope + jnp.asarray(tableau.GAMMA, w.dtype) * in_time)
        stages = jnp.zeros((tableau.NUM_STAGES, w.size), w.dtype).at[0].set(first_stage)
        stages, _ = jax.lax.scan(solve_stage, stages, _rows(w.dtype))
        w1 = w + jnp.asarray(tableau.B, w.dtype) @ stages
        y1 = unravel(w1)
        # The last stage is the difference of both solutions.
        error = unravel(stages[-1])
        coefficients = jnp.asarray(tableau.DENSE, w.dtype) @ stages
        dense = {"y0": y0, "y1": y1, "coefficients": jax.vmap(unravel)(coefficients)}
        return y1, error, dense, solver_state, dfx.RESULTS.successful


def _rows(dtype: jnp.dtype):
    """What the stages after the first differ in."""
    parts = (tableau.A, tableau.C, tableau.TIMES, tableau.TIME_SLOPES)
    numbers = tuple(jnp.asarray(part[1:], dtype) for part in parts)
    return *numbers, jnp.arange(1, tableau.NUM_STAGES)
