"""Where along a step the mode ends: a pair leaves its side, or a slider its interval."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._active_set import LIFT

#: z is interpolated from this many Chebyshev points of a step …
_NODES = (1 - np.cos(np.arange(5) * np.pi / 4)) / 2
_POWERS_OF_NODES = np.vander(_NODES, increasing=True)
#: … to these, at first, and for pairs that may leave their side to many more.
_GRID = (np.arange(8) + 1) / 8
_FINE = np.arange(129) / 128


def _from_nodes(rows: np.ndarray) -> np.ndarray:
    """What takes values at the nodes to `rows` @ coefficients of the interpolant."""
    return np.linalg.solve(_POWERS_OF_NODES.T, rows.T).T


_TO_GRID, _TO_FINE = (
    _from_nodes(np.vander(at, 5, increasing=True)) for at in (_GRID, _FINE)
)
#: The second derivative is between the entries of this: Bernstein's coefficients.
_TO_BEND = _from_nodes(np.array([[0, 0, 2, 0, 0], [0, 0, 2, 3, 0], [0, 0, 2, 6, 12]]))
#: Between grid points z is no lower than at them by more than this times the bend.
_SAG = _GRID[0] ** 2 / 8
#: z below this times the largest |z| is rounding.
_ROUNDING = 1e-14
_ROOT_STEPS = 40
#: Between grid points a pair must leave its side by this many times the rounding: one
#: whose z stays near 0 for long would be seen to leave and return without end.
_NOISE = 100.0
#: Evaluations before those: both ends of the bracket, and a point inside the lower one.
_ENDS = 3
_RECHECKS = 20


class Path(NamedTuple):
    """w(θ) = start + Σ_j coefficients[j] θ^(j+1): one step of the flow."""

    start: Float[Array, " weights"]
    coefficients: Float[Array, "powers weights"]

    def __call__(self, theta: Array) -> Array:
        return self.start + theta * _horner(theta, list(self.coefficients))

    def slope(self, theta: Array) -> Array:
        """dw/dθ."""
        return _horner(theta, [j * c for j, c in enumerate(self.coefficients, 1)])

    def curvature(self, theta: Array) -> Array:
        """d²w/dθ²."""
        terms = [j * (j - 1) * c for j, c in enumerate(self.coefficients, 1)]
        return _horner(theta, terms[1:])


def _horner(theta: Array, coefficients: list[Array]) -> Array:
    """Σ_j coefficients[j] θ^j."""
    value = coefficients[-1]
    for c in coefficients[-2::-1]:
        value = c + theta * value
    return value


class Watch(NamedTuple):
    """z of all pairs that have a side to leave, along paths at fixed slopes.

    Sliding units are lifted a little: a unit above them whose z is 0 while they slide
    then shows the side that it is about to change.

    A pair that has just been given its side may be `behind` its kink still, by what
    counts as 0: it is on its way, and leaves its side only if it falls back further.
    """

    system: System
    slopes: Float[Array, "samples kinks"]
    side: Int[Array, "samples kinks"]
    lift: Float[Array, "samples kinks"]
    rounding: Float[Array, ""]
    behind: Float[Array, " pairs"]

    def distances(self, w: Array) -> Float[Array, " pairs"]:
        """How far each pair is inside its side; 0 for those without one."""
        z = self.system.preactivations(w, self.slopes, self.lift)
        return (self.side.astype(w.dtype) * z).ravel() + self.behind

    def distance(self, w: Array, pair: Array) -> Float[Array, ""]:
        z = self.system.preactivation(w, self.slopes, self.lift, pair)
        return self.side.ravel()[pair].astype(w.dtype) * z + self.behind[pair]


class Bracket(NamedTuple):
    """A pair that leaves its side between `low` and `high`, if `found`."""

    found: Bool[Array, ""]
    pair: Int[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    guess: Float[Array, ""]


def watch(
    system: System, slopes: Array, side: Array, slides: Array, largest: Array
) -> Watch:
    lift = LIFT * slides.astype(slopes.dtype)
    level = jnp.zeros(side.size, slopes.dtype)
    return Watch(system, slopes, side, lift, _ROUNDING * largest, level)


#: Full forward passes that `first_bracket` takes.
BRACKET_PASSES = len(_NODES)


def first_bracket(
    watched: Watch, path: Path, end: Float[Array, ""]
) -> tuple[Bracket, Watch]:
    """The first place in (0, end] at which a pair leaves its side; and who is behind.

    A pair is looked at more closely if its interpolant crosses by the end of the first
    eighth of the step with a crossing, or might leave and return before that: a bound
    on the second derivative excludes it for nearly all of them.
    """
    nodes = jnp.asarray(_NODES, end.dtype) * end
    values = jax.vmap(lambda theta: watched.distances(path(theta)))(nodes)
    behind = jnp.maximum(-values[0], 0)
    watched, values = watched._replace(behind=behind), values + behind
    grid = jnp.asarray(_TO_GRID, end.dtype) @ values
    bend = jnp.max(jnp.abs(jnp.asarray(_TO_BEND, end.dtype) @ values), 0)
    left = jnp.concatenate([values[:1], grid[:-1]])
    noise = _NOISE * watched.rounding
    sag = jnp.where(_SAG * bend > noise, _SAG * bend, -noise)
    crossed = jnp.any(grid < -watched.rounding, 1)
    until = jnp.where(jnp.any(crossed), jnp.argmax(crossed), len(_GRID))
    counts = jnp.arange(len(_GRID)) <= until
    suspects = jnp.any((jnp.minimum(left, grid) < sag) & counts[:, None], 0)

    def closer(carry):
        suspects, first = carry
        pair = jnp.argmax(suspects)
        found = _first_in(values[:, pair], _NOISE * watched.rounding)
        place = found._replace(pair=pair)
        earlier = found.found & (~first.found | (found.guess < first.guess))
        first = jax.tree.map(lambda a, b: jnp.where(earlier, a, b), place, first)
        return suspects.at[pair].set(False), first

    none = _first_on_grid(grid, left, crossed)
    _, b = lax.while_loop(lambda c: jnp.any(c[0]), closer, (suspects, none))
    b = b._replace(low=b.low * end, high=b.high * end, guess=b.guess * end)
    return b, watched


def _first_on_grid(grid: Array, left: Array, crossed: Array) -> Bracket:
    """The first cell of the grid at whose end a pair has left its side."""
    cell = jnp.argmax(crossed)
    fall = left[cell] - grid[cell]
    part = jnp.clip(left[cell] / jnp.where(fall > 0, fall, 1), 0, 1)
    pair = jnp.argmin(jnp.where(grid[cell] < 0, part, 2))
    width = _GRID[0]
    low = cell.astype(grid.dtype) * width
    return Bracket(crossed[cell], pair, low, low + width, low + part[pair] * width)


def _first_in(values: Float[Array, " nodes"], rounding: Array) -> Bracket:
    """Where the interpolant of one pair's distances falls below 0, in [0, 1]."""
    fine = jnp.asarray(_TO_FINE, values.dtype) @ values
    left, here = fine[:-1], fine[1:]
    right = jnp.append(fine[2:], fine[-1])
    # The lowest point near a grid point, from the parabola through three of them.
    bend = left - 2 * here + right
    is_lowest = (left > here) & (right > here)
    shift = jnp.where(
        is_lowest, 0.5 * (left - right) / jnp.where(is_lowest, bend, 1), 0
    )
    lowest = here - 0.25 * (left - right) * shift
    negative = lowest < -rounding
    i = jnp.argmax(negative)
    width = _FINE[1]
    low = i.astype(values.dtype) * width
    high = low + (1 + jnp.where(here[i] < -rounding, 0, shift[i])) * width
    fall = left[i] - lowest[i]
    part = jnp.clip(left[i] / jnp.where(fall > 0, fall, 1), 0, 1)
    return Bracket(jnp.any(negative), i, low, high, low + part * (high - low))


def locate(
    watched: Watch, path: Path, bracket: Bracket
) -> tuple[Float[Array, ""], Int[Array, ""], Bool[Array, ""], Int[Array, ""]]:
    """θ at which the first pair leaves its side, which one, whether, full passes taken.

    The bracket's own pair first; then, as long as another pair has left its side by
    that point, that one on what is before it. Without a bracketed pair only the point
    `bracket.high` is checked in this way.
    """

    def one(carry):
        theta, pair, low, high, found, active, passes = carry
        root, crosses = _root(watched, path, pair, low, high, active)
        theta = jnp.where(active, root, theta)
        found = jnp.where(active, crosses, found)
        distances = watched.distances(path(theta))
        distances = distances.at[pair].set(jnp.where(found, 0, distances[pair]))
        worst = jnp.argmin(distances)
        early = distances[worst] < -10 * watched.rounding
        pair = jnp.where(early, worst, pair)
        zero = jnp.zeros_like(theta)
        return theta, pair, zero, theta, found | early, early, passes + 1

    def go_on(carry):
        active, passes = carry[-2:]
        return (passes == 0) | (active & (passes < _RECHECKS))

    b = bracket
    start = (b.high, b.pair, b.low, b.high, b.found, b.found, jnp.asarray(0))
    theta, pair, _, _, found, _, passes = lax.while_loop(go_on, one, start)
    return theta, pair, found, passes


def first_exit(
    excess: Float[Array, "3 slots"],
    at: np.ndarray,
    slack: Float[Array, " slots"],
    watched: Bool[Array, " slots"],
) -> tuple[Float[Array, " slots"], Float[Array, " slots"]]:
    """θ > 0 at which a quadratic through `excess` falls below −slack; its end slope.

    The excess of a slider is the distance of its multiplier from an end of its
    interval, known at the three abscissae `at`. θ is inf where it stays.
    """
    x0, x1, x2 = (float(x) for x in at)
    first = (excess[1] - excess[0]) / (x1 - x0)
    second = ((excess[2] - excess[1]) / (x2 - x1) - first) / (x2 - x0)
    c, b, a = excess[0] + slack, first - second * x1, second
    discriminant = b * b - 4 * a * c
    root = jnp.sqrt(jnp.maximum(discriminant, 0))
    # The form of the two roots that does not cancel.
    half = -0.5 * (b + jnp.where(b >= 0, root, -root))
    one = jnp.where(a != 0, half / jnp.where(a != 0, a, 1), jnp.inf)
    other = jnp.where(half != 0, c / jnp.where(half != 0, half, 1), jnp.inf)

    def positive(theta):
        return jnp.where((discriminant >= 0) & (theta > 0), theta, jnp.inf)

    earliest = jnp.minimum(positive(one), positive(other))
    return jnp.where(watched, earliest, jnp.inf), b + 2 * a


def _root(
    watched: Watch, path: Path, pair: Array, low: Array, high: Array, active: Array
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """θ in [low, high] at which the distance of one pair becomes 0 (Illinois method).

    And whether it does: else the interpolant was wrong, and θ is `high`.
    """
    inner = low + 1e-3 * (high - low)

    def one(c: _Illinois) -> _Illinois:
        # First the ends. A pair that has just left its kink starts at 0: its return is
        # bracketed, not its start.
        secant = c.high - c.at_high * (c.high - c.low) / (c.at_high - c.at_low)
        inside = (secant > c.low) & (secant < c.high)
        secant = jnp.where(inside, secant, 0.5 * (c.low + c.high))
        on_kink = (c.steps == 2) & (c.at_low <= 10 * watched.rounding)
        end = jnp.where(c.steps == 0, high, jnp.where(c.steps == 1, low, inner))
        theta = jnp.where(c.steps < _ENDS, end, secant)
        value = watched.distance(path(theta), pair)
        up = jnp.where(c.steps < _ENDS, (c.steps == 1) | on_kink, value > 0)
        down = jnp.where(c.steps < _ENDS, c.steps == 0, value <= 0)
        # An end that stays twice has its value halved, so that the other one moves.
        kept_low = jnp.where(c.moved == -1, 0.5 * c.at_low, c.at_low)
        kept_high = jnp.where(c.moved == 1, 0.5 * c.at_high, c.at_high)
        moved = jnp.where(up, 1, -1)
        return _Illinois(
            low=jnp.where(up, theta, c.low),
            high=jnp.where(down, theta, c.high),
            at_low=jnp.where(up, value, kept_low),
            at_high=jnp.where(down, value, kept_high),
            moved=jnp.where(c.steps < _ENDS, 0, moved),
            steps=c.steps + 1,
        )

    def go_on(c: _Illinois):
        small = jnp.minimum(jnp.abs(c.at_low), jnp.abs(c.at_high))
        open_ = (small > 0.1 * watched.rounding) & (c.high - c.low > 1e-15 * high)
        open_ = open_ & (c.at_low > 0) & (c.at_high < 0)
        return active & ((c.steps < _ENDS) | ((c.steps < _ENDS + _ROOT_STEPS) & open_))

    zero, none = jnp.zeros_like(low), jnp.asarray(0)
    c = lax.while_loop(go_on, one, _Illinois(low, high, zero, zero, none, none))
    nearer_low = jnp.abs(c.at_low) < jnp.abs(c.at_high)
    bracketed = active & (c.at_low > 0) & (c.at_high <= 0)
    theta = jnp.where(nearer_low, c.low, c.high)
    theta = jnp.where(bracketed, theta, jnp.where(c.at_low <= 0, c.low, high))
    return theta, bracketed | (c.at_low <= 0)


class _Illinois(NamedTuple):
    """A bracket, the values at its ends, and which end moved last (−1 = high)."""

    low: Float[Array, ""]
    high: Float[Array, ""]
    at_low: Float[Array, ""]
    at_high: Float[Array, ""]
    moved: Int[Array, ""]
    steps: Int[Array, ""]
