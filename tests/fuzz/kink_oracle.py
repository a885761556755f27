"""The exact flow of b·f(a·x) with a kink of f at 0, piece by piece, in NumPy and SciPy.

Between kinks the activity of all pairs of a sample and a unit is what it was: a smooth
equation, which DOP853 integrates until the first pre-activation changes sign. Where the
flow does not simply go through, the oracle gives up.
"""

import numpy as np
from judgement import GaveUp
from scipy.integrate import solve_ivp
from scipy.special import expit, softmax

#: Slopes below and above the kink.
SLOPES = {
    "relu": (0.0, 1.0),
    "ReLU MLP": (0.0, 1.0),
    "product with mask": (0.0, 1.0),
    "leaky relu": (0.01, 1.0),
    "absolute value": (-1.0, 1.0),
    "where": (0.1, 1.0),
}
MAX_EVENTS, MAX_EVALUATIONS = 200, 30_000
#: In parts of ‖x‖‖w‖: how far behind its kink a pre-activation is stopped, and how near
#: others are that are taken to be there too.
BEHIND, AT_KINK = 1e-12, 1e-11
#: No more than this part of the time in a step: it might go through a kink and back.
LONGEST_STEP = 0.01


class Piecewise:
    """The flow of a case with few pairs; `slopes` has one row for each sample."""

    def __init__(self, model: str, loss: str, x, y, hidden: int, decay: float):
        self.low, self.high = SLOPES[model]
        self.loss, self.decay, self.hidden = loss, decay, hidden
        self.x, self.y = np.asarray(x), np.asarray(y)
        self.evaluations = 0

    def solve(self, start: np.ndarray, ts: np.ndarray, rtol: float) -> np.ndarray:
        """The weights at `ts`, one row each."""
        w, t, rows = start, 0.0, []
        above = self._before(w) > 0
        if np.any(self._is_at_kink(w)):
            raise GaveUp
        for _ in range(MAX_EVENTS):
            ahead = ts[len(rows) :]
            piece = self._piece(w, t, ahead, above, rtol)
            reached = piece.y.T if len(piece.t) else []
            if any(np.any(self._sizes_beyond(row, above) < -BEHIND) for row in reached):
                raise GaveUp
            rows += [*reached]
            if piece.status == 0:
                return np.array(rows)
            w, t = piece.y_events[0][0], piece.t_events[0][0]
            above = self._beyond(w, above)
        raise GaveUp

    def _piece(self, w, t, ahead, above, rtol):
        def first_crossing(t, w):
            return np.min(self._sizes_beyond(w, above)) + BEHIND

        # Attributes are how SciPy is told to stop, and where.
        first_crossing.__dict__.update(terminal=True, direction=-1)
        piece = solve_ivp(
            lambda t, w: self._velocity(w, above),
            (t, max(ahead[-1], t)), w, "DOP853", t_eval=ahead, rtol=rtol,
            atol=rtol * max(float(np.sqrt(np.mean(w**2))), 1e-300), events=first_crossing,
            max_step=LONGEST_STEP * ahead[-1],
        )  # fmt: skip
        if piece.status < 0:
            raise GaveUp
        return piece

    def _sizes_beyond(self, w, above) -> np.ndarray:
        """How far pre-activations are on the side where they are thought to be."""
        lengths = np.linalg.norm(self.x, axis=1) * np.linalg.norm(w)
        is_alive = lengths > 0
        beyond = np.where(above, 1.0, -1.0) * self._before(w)
        return beyond[is_alive] / lengths[is_alive, None]

    def _beyond(self, w, above) -> np.ndarray:
        """The activity behind a kink that all pairs at it go through."""
        crossed = self._is_at_kink(w)
        after = above ^ crossed
        wanted = np.where(after, 1.0, -1.0)[crossed]
        for side in (above, after):
            a, _ = self._split(self._velocity(w, side))
            rates = (self.x @ a.T)[crossed]
            if not np.all(wanted * rates > 1e-6 * np.max(np.abs(rates), initial=0)):
                raise GaveUp
        if not crossed.any():
            raise GaveUp
        return after

    def _is_at_kink(self, w) -> np.ndarray:
        lengths = np.linalg.norm(self.x, axis=1)[:, None] * np.linalg.norm(w)
        return (np.abs(self._before(w)) <= AT_KINK * lengths) & (lengths > 0)

    def _split(self, w) -> tuple[np.ndarray, np.ndarray]:
        cut = self.hidden * self.x.shape[1]
        return w[:cut].reshape(self.hidden, -1), w[cut:].reshape(-1, self.hidden)

    def _before(self, w) -> np.ndarray:
        return self.x @ self._split(w)[0].T

    def _velocity(self, w, above) -> np.ndarray:
        self.evaluations += 1
        if self.evaluations > MAX_EVALUATIONS:
            raise GaveUp
        a, b = self._split(w)
        slopes = np.where(above, self.high, self.low)
        hidden = slopes * (self.x @ a.T)
        error = self._slope(hidden @ b.T) / len(self.x)
        to_a = ((error @ b) * slopes).T @ self.x
        return -np.concatenate([to_a.ravel(), (error.T @ hidden).ravel()]) - (
            self.decay * w
        )

    def _slope(self, f) -> np.ndarray:
        """The loss's derivative by the prediction."""
        match self.loss:
            case "squared" | "own":
                return f - self.y
            case "logistic":
                return -self.y * expit(-self.y * f)
            case "cross-entropy":
                return softmax(f, axis=1) - np.eye(f.shape[1])[self.y]
            case "Huber":
                return np.clip(f - self.y, -0.5, 0.5)
        raise ValueError(self.loss)
