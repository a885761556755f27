"""The name under which the exact flow is asked for."""

from typing import final

import equinox as eqx


@final
class Filippov(eqx.Module):
    """The exact flow of a network with kinks, as `solver` of `homoflow.flow`.

    For ReLU-like networks gradient flow is the differential inclusion ẇ ∈ −∂L(w) with
    Clarke's sub-differential [Du, Hu & Lee 2018, eq. 5]. This solver follows Filippov's
    solution of it [Filippov 1988]: between events the flow is analytic and is
    integrated by the classical Runge–Kutta method; where a pre-activation reaches 0 the
    pair (sample, unit) crosses its kink, or slides along it with a multiplier; it
    leaves when its slope reaches an end of its interval. Cost is set by the number of
    events, hardly by the tolerance.

    **Arguments:**

    - `max_active`: how many pairs may be at their kinks at one time. A run that needs more
        ends with a result that says so. Time and memory grow with its square. By
        default 120, and outside of jit and vmap a run that needs more is done again
        with twice as many, up to 960. Where more than 127 pairs are at their kinks LAPACK
        takes several threads, which on busy cores wait for each other for many times as
        long as they work: set `OPENBLAS_NUM_THREADS=1` there, before Python starts.
    - `events`: how many events to keep for `trajectory.events` (none: no list is made).
        Further ones are counted as dropped. `stats` say how many of each sort there are.

    It computes in float64: also the flow of float32 weights, which is then rounded, so
    that its error is float32's rounding. With JAX's float64 switched off that works
    outside of jit and vmap only. It needs a loss over samples (mean or sum), and a model
    whose kinks it finds, in any Equinox module, dense, convolutional, residual or with
    shared weights:

    - maximum and minimum of two values, or over axes (maxout), and max-pooling, with
        one kink less than there are values; but not over windows that have more than
        one value in common;
    - |z|, relu, leaky relu, relu6, clip, hard tanh, and other continuous
        piecewise-linear functions made by maximum, minimum or by `jnp.where(z > c,
        ...)`: a kink for each knot. `eqx.nn.PReLU`, its slopes fixed or trained;
    - elu with any α, selu. (elu with α = 1 and celu have no kink, only a second
        derivative that jumps.)

    Anything else that is not smooth is refused by name: jumps (sign, round, argmax, a
    discontinuous `where`: they have no such flow), sorting, kinks inside loops or inside
    branches that data choose, and functions with a derivative rule of their own. An error
    estimate is made where `estimate_error=True` asks for a second solve.

    **Derivatives.** `jax.jvp` and `jax.jacfwd` work, with respect to weights (also ones
    that are not trained), data, arrays of the loss, `t1` and `ts`, of the final model
    and of everything recorded, under jit and vmap. They are those of the solution along
    the events that it meets, whose times move [saltation matrices: Kong et al. 2023].
    Where the solution itself has no derivative they are NaN: at a start on a kink that
    the direction leaves; where different pairs meet their kinks at one time and the
    direction parts them; where a direction separates kinks that coincide (one of two
    equal inputs moves). They grow without bound where the flow grazes a kink. `stats`
    have none; those of the times in `events` are NaN. Reverse mode (`jax.grad`) and
    second derivatives are refused.

    **Raises:** `ValueError` if `max_active` is not a positive integer, or `events` not an
    integer of 0 or more; in reverse mode `NotImplementedError`.

    ```python
    model = hf.MLP((3, 8, 1), key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (20, 3))
    flow = hf.flow(model, (x, x[:, :1]), 5.0, solver=hf.Filippov(max_active=32, events=500))
    print(flow.stats["crossings"], flow.stats["largest_sliding_set"])
    print(flow.events)
    ```
    """

    max_active: int | None = eqx.field(static=True, default=None)
    events: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        most = self.max_active
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ValueError(f"`max_active` must be a positive integer; got {most!r}.")
        if type(self.events) is not int or self.events < 0:
            raise ValueError(
                f"`events` must be an integer, 0 or more; got {self.events!r}."
            )
