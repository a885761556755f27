"""The rescaling of units that makes diagonal laws vanish, by Newton's method."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .._laws._law import Law, Path, Term
from ._units import count_units, label_entries

Arrays = dict[Path, np.ndarray]

_MAX_STEPS = 1000
#: How much the logarithm of an entry may change in one step.
_MAX_STEP_LENGTH = 1.0
_MAX_HALVINGS = 4
#: A ridge on the Hessian, whose diagonal is scaled to 1: laws may depend on each other.
_RIDGE = 1e-14
#: The imbalance that rounding explains, in units of rounding of a unit's squares.
_ROUNDING = 4


def balance_scales(laws: Sequence[Law], arrays: Arrays) -> Arrays:
    """The arrays with their units rescaled to the least sum of squares.

    Unit k multiplies the entries that it owns by e^{c_k s_k}, with c_k the coefficient of
    the law's term. The sum of squares ½Σw²e^{2Σcs} is a convex function of s, and its
    gradient are the laws. Where all that a unit owns has coefficients of one sign, the
    infimum has these entries at 0.
    """
    if not laws:
        return arrays
    problem = _Scales(laws, arrays)
    arrays = problem.zero_onesided(arrays)
    squares = problem.squares(arrays)
    return problem.rescale(arrays, problem.minimize(squares))


class _Scales:
    """The sum of squares as a function of the units' log-scales s.

    Entries that the same units own form one group, of which only the sum of squares counts.

    - `groups`: for each array, the group of every entry.
    - `owner`, `power`: for each group, the units that own it, and their coefficients.
    - `size`: how many units there are.
    """

    def __init__(self, laws: Sequence[Law], arrays: Mapping[Path, np.ndarray]):
        shapes = {path: array.shape for path, array in arrays.items()}
        counts = [count_units(law, shapes) for law in laws]
        starts = np.cumsum([0, *counts])
        self.size = int(starts[-1])
        self.groups: dict[Path, np.ndarray] = {}
        owners, powers, first = [], [], 0
        paths = dict.fromkeys(t.path for law in laws for t in law.quadratic_terms)
        width = max(len(_terms_at(laws, path)) for path in paths)
        for path in paths:
            found = _terms_at(laws, path)
            unit = np.stack([label_entries(laws[k], t, shapes[path]) for k, t in found])
            most = tuple(unit.max(1) + 2)
            code = np.ravel_multi_index(tuple(unit + 1), most)
            codes, group = np.unique(code, return_inverse=True)
            unique = np.stack(np.unravel_index(codes, most), 1) - 1
            own = np.zeros((len(unique), width), int)
            power = np.zeros((len(unique), width))
            for slot, (k, term) in enumerate(found):
                has = unique[:, slot] >= 0
                own[has, slot] = unique[has, slot] + starts[k]
                power[has, slot] = term.coefficient
            self.groups[path] = group.reshape(-1) + first
            owners.append(own)
            powers.append(power)
            first += len(unique)
        self.owner, self.power = np.concatenate(owners), np.concatenate(powers)

    def squares(self, arrays: Arrays) -> np.ndarray:
        """Σw² of every group."""
        total = np.zeros(len(self.owner))
        for path, group in self.groups.items():
            total += np.bincount(group, arrays[path].reshape(-1) ** 2, len(total))
        return total

    def rescale(self, arrays: Arrays, s: np.ndarray) -> Arrays:
        """The arrays with each entry multiplied by e^{cs}."""
        factor = np.exp(self.logarithm(s))
        return arrays | {
            path: arrays[path] * factor[group].reshape(arrays[path].shape)
            for path, group in self.groups.items()
        }

    def logarithm(self, s: np.ndarray) -> np.ndarray:
        """Σcs of every group."""
        return (self.power * s[self.owner]).sum(1)

    def sum_by_unit(self, weights: np.ndarray) -> np.ndarray:
        """For each unit, the sum of weights over the groups that it owns."""
        return np.bincount(self.owner.reshape(-1), weights.reshape(-1), self.size)

    def zero_onesided(self, arrays: Arrays) -> Arrays:
        """The arrays with 0 for what units own that have coefficients of one sign only."""
        alive = self.squares(arrays) > 0
        before = alive.sum() + 1
        while alive.sum() < before:
            before = alive.sum()
            here = np.broadcast_to(alive[:, None], self.power.shape)
            low = self.sum_by_unit((here & (self.power < 0)).astype(float)) > 0
            high = self.sum_by_unit((here & (self.power > 0)).astype(float)) > 0
            dead = (low != high)[self.owner] & (self.power != 0)
            alive = alive & ~dead.any(1)
        return arrays | {
            path: np.where(alive[group].reshape(arrays[path].shape), arrays[path], 0.0)
            for path, group in self.groups.items()
        }

    def minimize(self, squares: np.ndarray) -> np.ndarray:
        """The s at which Σw²e^{2cs} is least."""
        s = np.zeros(self.size)
        limit = _ROUNDING * np.finfo(float).eps
        best, stalled = math.inf, 0
        for _ in range(_MAX_STEPS):
            now = squares * np.exp(2 * self.logarithm(s))
            law = self.sum_by_unit(self.power * now[:, None])
            owns = self.sum_by_unit(np.abs(self.power) * now[:, None])
            worst = np.max(np.abs(law) / np.where(owns > 0, owns, 1), initial=0.0)
            stalled = 0 if worst < best / 2 else stalled + 1
            best = min(best, worst)
            # At the level of rounding Newton's steps lead nowhere.
            if worst <= limit or (worst < 1e-13 and stalled > 2):
                return s
            s = self._backtrack(squares, s, self._step(now, law), now.sum())
        raise ValueError(
            "The weights cannot be balanced: no rescaling of the units was found at "
            f"which the laws vanish (the best still violates one by {best:.1g})."
        )

    def _backtrack(
        self, squares, s: np.ndarray, step: np.ndarray, now: float
    ) -> np.ndarray:
        """The step, or a part of it, that does not raise the sum of squares."""
        for _ in range(_MAX_HALVINGS):
            if (squares * np.exp(2 * self.logarithm(s + step))).sum() <= now:
                break
            step = step / 2
        return s + step

    def _step(self, now: np.ndarray, law: np.ndarray) -> np.ndarray:
        hessian = np.zeros((self.size, self.size))
        for a in range(self.power.shape[1]):
            for b in range(self.power.shape[1]):
                share = 2 * self.power[:, a] * self.power[:, b] * now
                np.add.at(hessian, (self.owner[:, a], self.owner[:, b]), share)
        diagonal = hessian.diagonal()
        scale = 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1))
        scaled = scale[:, None] * hessian * scale + _RIDGE * np.eye(self.size)
        step = -scale * np.linalg.solve(scaled, scale * law)
        longest = np.max(np.abs(self.logarithm(step))[now > 0], initial=0.0)
        return step * min(1.0, _MAX_STEP_LENGTH / max(longest, 1e-300))


def _terms_at(laws: Sequence[Law], path: Path) -> list[tuple[int, Term]]:
    return [
        (k, term)
        for k, law in enumerate(laws)
        for term in law.quadratic_terms
        if term.path == path
    ]
