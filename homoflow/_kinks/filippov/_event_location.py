"""Where along a step the mode ends: a pair leaves its side, a multiplier its interval."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._system import System
from ._active_set import LIFT

#: z is interpolated from its values at these Chebyshev points of a step …
_NODES = (1 - np.cos(np.arange(5) * np.pi / 4)) / 2
_POWERS_OF_NODES = np.vander(_NODES, increasing=True)
#: … to a coarse grid and, for the few pairs that may leave their side, to a fine one.
_GRID = (np.arange(8) + 1) / 8
_FINE = np.arange(129) / 128


def _from_nodes(rows: np.ndarray) -> np.ndarray:
    """The matrix from values at the nodes to `rows` @ coefficients of the interpolant."""
    return np.linalg.solve(_POWERS_OF_NODES.T, rows.T).T


_TO_GRID, _TO_FINE = (
    _from_nodes(np.vander(at, 5, increasing=True)) for at in (_GRID, _FINE)
)
#: To Bernstein coefficients of the second derivative, which bound it.
_TO_BEND = _from_nodes(np.array([[0, 0, 2, 0, 0], [0, 0, 2, 3, 0], [0, 0, 2, 6, 12]]))
_TO_GRID_AND_BEND = np.concatenate([_TO_GRID, _TO_BEND])
#: Between grid points z is lower than at both by no more than this times the largest
#: second derivative.
_MAX_DIP = _GRID[0] ** 2 / 8
#: z below this times the largest |z| is rounding.
_ROUNDING = 1e-14
#: Between grid points a pair must leave its side by this many times the rounding. Else a
#: pair whose z stays near 0 for long would seem to leave and return without end.
_NOISE_FACTOR = 100.0
#: The root search first evaluates both ends of its bracket and a point near the lower end,
#: and then takes so many steps at most.
_NUM_END_STEPS, _MAX_ROOT_STEPS = 3, 40
#: How often another pair may turn out to have left its side before the one found.
_MAX_CHECKS = 20


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


class SideMonitor(NamedTuple):
    """Event functions: how far each pair is on its side, at fixed slopes.

    Pairs of side 0 are not monitored. Sliding units are raised by tiny `offsets`: a
    unit above them, whose z is 0 while they slide, then shows the side to which it is
    about to go.

    A pair that has just been given a side may still be on the other one, by an amount
    that counts as 0, its `slack`. It leaves its side only if it falls back further.
    """

    system: System
    slopes: Float[Array, "samples kinks"]
    side: Int[Array, "samples kinks"]
    offsets: Float[Array, "samples kinks"]
    rounding: Float[Array, ""]
    slack: Float[Array, " pairs"]

    @staticmethod
    def create(
        system: System,
        slopes: Float[Array, "samples kinks"],
        side: Int[Array, "samples kinks"],
        slides: Bool[Array, "samples kinks"],
        max_abs_z: Float[Array, ""],
    ) -> "SideMonitor":
        offsets = LIFT * slides.astype(slopes.dtype)
        slack = jnp.zeros(side.size, slopes.dtype)
        return SideMonitor(system, slopes, side, offsets, _ROUNDING * max_abs_z, slack)

    @property
    def noise(self) -> Float[Array, ""]:
        """By how much a pair must leave its side to be known to have left it."""
        return _NOISE_FACTOR * self.rounding

    def distances(self, w: Array) -> Float[Array, " pairs"]:
        """How far each pair is on its side; 0 for those without one."""
        z = self.system.preactivations(w, self.slopes, self.offsets)
        return (self.side.astype(w.dtype) * z).ravel() + self.slack

    def distance(self, w: Array, pair: Array) -> Float[Array, ""]:
        z = self.system.preactivation(w, self.slopes, self.offsets, pair)
        return self.side.ravel()[pair].astype(w.dtype) * z + self.slack[pair]


class Bracket(NamedTuple):
    """A pair that leaves its side between `low` and `high`, near `guess`, if any does."""

    is_found: Bool[Array, ""]
    pair: Int[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    guess: Float[Array, ""]


class Crossing(NamedTuple):
    """θ at which a pair leaves its side, if it is found; and the full passes it took."""

    theta: Float[Array, ""]
    pair: Int[Array, ""]
    is_found: Bool[Array, ""]
    passes: Int[Array, ""]


#: Full forward passes that `bracket_first_crossing` takes.
BRACKET_PASSES = len(_NODES)


def bracket_first_crossing(
    monitor: SideMonitor, path: Path, end: Float[Array, ""]
) -> tuple[Bracket, SideMonitor]:
    """The first place in (0, end] at which a pair leaves its side.

    Searched is the interpolant of each pair's distance: on a coarse grid for all pairs,
    and on a fine one for suspects. Those are the pairs that may have left their side up
    to the first cell of the coarse grid at whose end some pair has. A bound on the second
    derivative excludes nearly all others.

    Returned is also the monitor with the slack of pairs that are not yet on their side.
    """
    nodes = jnp.asarray(_NODES, end.dtype) * end
    values = jax.vmap(lambda theta: monitor.distances(path(theta)))(nodes)
    slack = jnp.maximum(-values[0], 0)
    monitor, values = monitor._replace(slack=slack), values + slack
    # In one product, and without a reduction: both take longer than they look.
    both = jnp.asarray(_TO_GRID_AND_BEND, end.dtype) @ values
    grid, bends = both[: len(_GRID)], jnp.abs(both[len(_GRID) :])
    bend = functools.reduce(jnp.maximum, list(bends))
    left = jnp.concatenate([values[:1], grid[:-1]])
    noise = monitor.noise
    dip = jnp.where(_MAX_DIP * bend > noise, _MAX_DIP * bend, -noise)
    has_crossed = jnp.any(grid < -monitor.rounding, 1)
    until = jnp.where(jnp.any(has_crossed), jnp.argmax(has_crossed), len(_GRID))
    is_searched = jnp.arange(len(_GRID)) <= until
    suspects = jnp.any((jnp.minimum(left, grid) < dip) & is_searched[:, None], 0)

    def search_suspect(carry):
        suspects, first = carry
        pair = jnp.argmax(suspects)
        found = _bracket_on_fine_grid(values[:, pair], noise)
        found = found._replace(pair=pair)
        is_earlier = found.is_found & (~first.is_found | (found.guess < first.guess))
        first = jax.tree.map(lambda a, b: jnp.where(is_earlier, a, b), found, first)
        return suspects.at[pair].set(False), first

    on_grid = _bracket_on_grid(grid, left, has_crossed)
    _, b = lax.while_loop(lambda c: jnp.any(c[0]), search_suspect, (suspects, on_grid))
    b = b._replace(low=b.low * end, high=b.high * end, guess=b.guess * end)
    return b, monitor


def _bracket_on_grid(grid: Array, left: Array, crossed: Array) -> Bracket:
    """The first cell of the grid at whose end a pair has left its side."""
    cell = jnp.argmax(crossed)
    fall = left[cell] - grid[cell]
    part = jnp.clip(left[cell] / jnp.where(fall > 0, fall, 1), 0, 1)
    pair = jnp.argmin(jnp.where(grid[cell] < 0, part, 2))
    width = _GRID[0]
    low = cell.astype(grid.dtype) * width
    return Bracket(crossed[cell], pair, low, low + width, low + part[pair] * width)


def _bracket_on_fine_grid(
    values: Float[Array, " nodes"], noise: Float[Array, ""]
) -> Bracket:
    """Where in [0, 1] the interpolant of one pair's distance falls below 0."""
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
    negative = lowest < -noise
    i = jnp.argmax(negative)
    width = _FINE[1]
    low = i.astype(values.dtype) * width
    high = low + (1 + jnp.where(here[i] < -noise, 0, shift[i])) * width
    fall = left[i] - lowest[i]
    part = jnp.clip(left[i] / jnp.where(fall > 0, fall, 1), 0, 1)
    return Bracket(jnp.any(negative), i, low, high, low + part * (high - low))


def locate_crossing(monitor: SideMonitor, path: Path, bracket: Bracket) -> Crossing:
    """The first place at which a pair leaves its side.

    First that of the bracket's pair. As long as another pair has left its side by then,
    the place of that one is searched on the part of the path before. If no pair is
    bracketed, only the point `bracket.high` is checked in this way.
    """

    def search_earlier(c: _Candidate) -> _Candidate:
        root, crosses = _find_root(monitor, path, c)
        theta = jnp.where(c.is_active, root, c.theta)
        is_found = jnp.where(c.is_active, crosses, c.is_found)
        distances = monitor.distances(path(theta))
        distances = distances.at[c.pair].set(jnp.where(is_found, 0, distances[c.pair]))
        worst = jnp.argmin(distances)
        is_earlier = distances[worst] < -10 * monitor.rounding
        return _Candidate(
            theta=theta,
            pair=jnp.where(is_earlier, worst, c.pair),
            low=jnp.zeros_like(theta),
            high=theta,
            is_found=is_found | is_earlier,
            is_active=is_earlier,
            passes=c.passes + 1,
        )

    def goes_on(c: _Candidate) -> Bool[Array, ""]:
        return (c.passes == 0) | (c.is_active & (c.passes < _MAX_CHECKS))

    b = bracket
    start = _Candidate(
        b.high, b.pair, b.low, b.high, b.is_found, b.is_found, jnp.asarray(0)
    )
    c = lax.while_loop(goes_on, search_earlier, start)
    return Crossing(c.theta, c.pair, c.is_found, c.passes)


class _Candidate(NamedTuple):
    """The crossing found so far, and the bracket in which to search for `pair`'s next."""

    theta: Float[Array, ""]
    pair: Int[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    is_found: Bool[Array, ""]
    is_active: Bool[Array, ""]
    passes: Int[Array, ""]


def find_first_exit(
    excess: Float[Array, "3 slots"],
    at: np.ndarray,
    slack: Float[Array, " slots"],
    leads: Bool[Array, " slots"],
) -> tuple[Float[Array, " slots"], Float[Array, " slots"]]:
    """θ > 0 at which each multiplier leaves its interval, and its rate at θ = 1.

    The excess, a multiplier's distance from an end of its interval, is known at the three
    abscissae `at`. It leaves where the quadratic through these falls below −slack; θ is
    inf where that does not happen.
    """
    x0, x1, x2 = (float(x) for x in at)
    first = (excess[1] - excess[0]) / (x1 - x0)
    second = ((excess[2] - excess[1]) / (x2 - x1) - first) / (x2 - x0)
    c, b, a = excess[0] + slack, first - second * x1, second
    discriminant = b * b - 4 * a * c
    root = jnp.sqrt(jnp.maximum(discriminant, 0))
    # The form of the two roots without cancellation.
    half = -0.5 * (b + jnp.where(b >= 0, root, -root))
    larger = jnp.where(a != 0, half / jnp.where(a != 0, a, 1), jnp.inf)
    smaller = jnp.where(half != 0, c / jnp.where(half != 0, half, 1), jnp.inf)

    def inf_unless_positive(theta):
        return jnp.where((discriminant >= 0) & (theta > 0), theta, jnp.inf)

    earliest = jnp.minimum(inf_unless_positive(larger), inf_unless_positive(smaller))
    return jnp.where(leads, earliest, jnp.inf), b + 2 * a


def _find_root(
    monitor: SideMonitor, path: Path, c: _Candidate
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """θ in [low, high] at which the distance of one pair becomes 0 (Illinois method).

    And whether it does: if the interpolant was wrong, θ is `high`.
    """
    inner = c.low + 1e-3 * (c.high - c.low)

    def shrink(b: _Illinois) -> _Illinois:
        # First the ends. A pair that has just left its kink starts at 0: then its return
        # is bracketed, not its start.
        is_end_step = b.steps < _NUM_END_STEPS
        secant = b.high - b.at_high * (b.high - b.low) / (b.at_high - b.at_low)
        is_inside = (secant > b.low) & (secant < b.high)
        secant = jnp.where(is_inside, secant, 0.5 * (b.low + b.high))
        starts_on_kink = (b.steps == 2) & (b.at_low <= 10 * monitor.rounding)
        end = jnp.where(b.steps == 0, c.high, jnp.where(b.steps == 1, c.low, inner))
        theta = jnp.where(is_end_step, end, secant)
        value = monitor.distance(path(theta), c.pair)
        moves_low = jnp.where(is_end_step, (b.steps == 1) | starts_on_kink, value > 0)
        moves_high = jnp.where(is_end_step, b.steps == 0, value <= 0)
        # An end that stays twice has its value halved, so that the other one moves.
        old_at_low = jnp.where(b.last_moved == -1, 0.5 * b.at_low, b.at_low)
        old_at_high = jnp.where(b.last_moved == 1, 0.5 * b.at_high, b.at_high)
        last_moved = jnp.where(moves_low, 1, -1)
        return _Illinois(
            low=jnp.where(moves_low, theta, b.low),
            high=jnp.where(moves_high, theta, b.high),
            at_low=jnp.where(moves_low, value, old_at_low),
            at_high=jnp.where(moves_high, value, old_at_high),
            last_moved=jnp.where(is_end_step, 0, last_moved),
            steps=b.steps + 1,
        )

    def goes_on(b: _Illinois) -> Bool[Array, ""]:
        small = jnp.minimum(jnp.abs(b.at_low), jnp.abs(b.at_high))
        is_wide = (small > 0.1 * monitor.rounding) & (b.high - b.low > 1e-15 * c.high)
        is_open = is_wide & (b.at_low > 0) & (b.at_high < 0)
        may_step = b.steps < _NUM_END_STEPS + _MAX_ROOT_STEPS
        return c.is_active & ((b.steps < _NUM_END_STEPS) | (may_step & is_open))

    zero, none = jnp.zeros_like(c.low), jnp.asarray(0)
    start = _Illinois(c.low, c.high, zero, zero, none, none)
    b = lax.while_loop(goes_on, shrink, start)
    is_nearer_low = jnp.abs(b.at_low) < jnp.abs(b.at_high)
    is_bracketed = c.is_active & (b.at_low > 0) & (b.at_high <= 0)
    theta = jnp.where(is_nearer_low, b.low, b.high)
    theta = jnp.where(is_bracketed, theta, jnp.where(b.at_low <= 0, b.low, c.high))
    return theta, is_bracketed | (b.at_low <= 0)


class _Illinois(NamedTuple):
    """A bracket, the values at its ends, and which end moved last (1 = low, −1 = high)."""

    low: Float[Array, ""]
    high: Float[Array, ""]
    at_low: Float[Array, ""]
    at_high: Float[Array, ""]
    last_moved: Int[Array, ""]
    steps: Int[Array, ""]
