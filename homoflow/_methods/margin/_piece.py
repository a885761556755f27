"""The smooth function that a network with kinks is while each stays on its side."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..._jax._compilation import fast_compile_jit
from ..._jax._precision import full_matmul_precision
from ..._kinks import System, as_system, find_sides
from ..._problem._log_risk import margins_of
from ..._problem._losses import Risk
from ..._problem._problem import Problem
from ..._problem._smoothness import kinks_of
from .._filippov import obstacle

#: A kink no further from the weights than this, relative to them, is one that they are on.
ON_KINK = 1e-9
#: Rows for the kinks that are held come in so many at a time, so that few programs do.
_FEWEST_ROWS = 8


class Piece(NamedTuple):
    """The side of every pair of a sample and a kink, and which pairs are on their kinks.

    A pair that is `held` has the side from which the multiplier of its kink counts: −1.
    """

    side: Int[np.ndarray, "samples kinks"]
    held: Bool[np.ndarray, "samples kinks"]

    @property
    def key(self) -> bytes:
        return self.side.tobytes() + self.held.tobytes()


class Kinks(NamedTuple):
    """What the kinks of all pairs are at some weights.

    - `distances`: z / (‖∇z‖·‖w‖) of each pair, how far its kink is; 0 where z has no slope.
    - `held_slopes`: ∇z of the pairs that are held.
    - `jumps`: (high − low)·∂m/∂a of each margin and pair of its sample: by how much of ∇z
        the margin's slope jumps at the kink.
    """

    distances: Float[np.ndarray, "samples kinks"]
    held_slopes: Float[np.ndarray, "held weights"]
    jumps: Float[np.ndarray, "samples outputs kinks"]


def has_pieces(problem: Problem) -> bool:
    """Whether a problem has kinks that can be told one by one."""
    return bool(kinks_of(problem)) and obstacle(problem) is None


def piece_at(problem: Problem, w: np.ndarray) -> Piece:
    """The piece that the weights are on; held are kinks at rounding from them."""
    side = np.asarray(_sides(problem, jnp.asarray(w)))
    free = Piece(side, np.zeros(side.shape, bool))
    held = np.abs(kinks_at(problem, w, free).distances) <= ON_KINK
    return Piece(np.where(held, -1, side), held)


def kinks_at(problem: Problem, w: np.ndarray, piece: Piece) -> Kinks:
    index = np.flatnonzero(piece.held)
    room = _FEWEST_ROWS
    while room < index.size:
        room *= 2
    padded = np.zeros(room, int)
    padded[: index.size] = index
    found = _kinks(problem, jnp.asarray(w), piece.side, jnp.asarray(padded))
    z, squares, rows, jumps = map(np.asarray, found)
    lengths = np.sqrt(squares) * np.linalg.norm(w)
    distances = np.where(lengths > 0, z / np.where(lengths > 0, lengths, 1), 0)
    return Kinks(distances, rows[: index.size], jumps)


def margins_on(
    problem: Problem, piece_side: Array, flat: Float[Array, " weights"]
) -> tuple[Float[Array, "m outputs"], Float[Array, "samples kinks"]]:
    """The margins of the network on a piece, and z of every pair, also away from it."""
    assert isinstance(problem.objective, Risk)
    system = as_system(problem)
    predictions, z = _forward(
        system, flat, system.slope(piece_side), jnp.zeros_like(system.low)
    )
    return margins_of(problem.objective, predictions, system.y), z


def _forward(system: System, flat: Array, slopes: Array, offsets: Array):
    weights = system.layout.unravel(flat)
    return jax.vmap(
        lambda s, o, x: system.function.forward(weights, s, o, system.constants, x)
    )(slopes, offsets, system.x)


@fast_compile_jit
@full_matmul_precision()
def _sides(problem: Problem, flat: Float[Array, " weights"]) -> Array:
    return find_sides(as_system(problem), flat)[0]


@fast_compile_jit
@full_matmul_precision()
def _kinks(
    problem: Problem, flat: Float[Array, " weights"], side: Array, index: Array
) -> tuple[Array, Array, Array, Array]:
    assert isinstance(problem.objective, Risk)
    risk, system = problem.objective, as_system(problem)
    slopes, zeros = system.slope(side), jnp.zeros_like(system.low)
    z, pull = jax.vjp(lambda v: _forward(system, v, slopes, zeros)[1], flat)

    def row(i: Array) -> Array:
        one = jnp.zeros(z.size, z.dtype).at[i].set(1)
        return pull(one.reshape(z.shape))[0]

    squares = jax.lax.map(lambda i: jnp.sum(row(i) ** 2), jnp.arange(z.size))

    def of_sample(slopes, zeros, x, y):
        weights = system.layout.unravel(flat)

        def margins(offsets):
            found = system.function.forward(
                weights, slopes, offsets, system.constants, x
            )
            one = jax.tree.map(lambda a: a[None], (found[0], y))
            return margins_of(risk, *one)[0]

        return jax.jacrev(margins)(zeros)

    by_offset = jax.vmap(of_sample)(slopes, zeros, system.x, system.y)
    jumps = by_offset * (system.high - system.low)[:, None, :]
    return z, squares.reshape(z.shape), jax.vmap(row)(index), jumps
