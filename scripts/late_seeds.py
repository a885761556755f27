"""To the end of training without end, from many starts, checked by other means.

    python scripts/late_seeds.py                       # all rows
    python scripts/late_seeds.py --only relu_xor --first 0 --seeds 25
    python scripts/late_seeds.py --out docs/data/late_seeds.json

Every run is `homoflow.flow` with `t1=inf` on data that a network of its kind can separate,
from another start on other data (the rows `…_xor`: the same four points). Of a limit of
directions it is asked

- of linear networks: how far the product of their layers is from the direction of the hard
  margin [SciPy's SLSQP];
- of diagonal networks of degree 2: how far it is from the least weights in the ℓ₁ norm with
  margins of 1 [SciPy's HiGHS];
- of all others: the residual of the Karush–Kuhn–Tucker conditions in the largest norm, by a
  linear program over the multipliers, with gradients written out in NumPy. On a kink of a
  ReLU they may be anything in between [HiGHS; homoflow has non-negative least squares].

With `--out` what was made before stays, but for the same seeds, so that it can be made in
pieces. Prints one line for each row, and every seed that came to no limit.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

jax.config.update("jax_enable_x64", True)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import numpy as np  # noqa: E402
import scipy.optimize  # noqa: E402

import homoflow as hf  # noqa: E402

#: Margins above this are not those of the support; z below this is on its kink.
SUPPORT, ON_KINK = 1 + 1e-7, 1e-9


class Row(NamedTuple):
    """A kind of network: a model and data from a key, and how a limit is judged."""

    make: Callable[[jax.Array], tuple[Any, tuple[jax.Array, jax.Array]]]
    error: Callable[[Any, Any, Any], float]
    seeds: int


class DiagonalNet(eqx.Module):
    u: jax.Array
    v: jax.Array
    power: int = eqx.field(static=True)

    def __call__(self, x):
        return jnp.sum((self.u**self.power - self.v**self.power) * x, keepdims=True)


def separable(key, samples=12, features=3):
    """Points of two classes, at least 0.3 apart from a plane through the origin."""
    k1, k2 = jr.split(key)
    normal = jr.normal(k1, (features,))
    normal /= jnp.linalg.norm(normal)
    x = jr.normal(k2, (samples, features))
    y = jnp.sign(x @ normal)
    return x + 0.3 * y[:, None] * normal, y[:, None]


def taught(key, samples=12, features=4):
    """Points that a ReLU network of four units tells apart, and not by little."""
    k1, k2 = jr.split(key)
    teacher = hf.MLP((features, 4, 1), key=k1)
    x = jr.normal(k2, (400, features))
    f = jax.vmap(teacher)(x)[:, 0]
    far = np.flatnonzero(np.abs(f) > np.median(np.abs(f)))[:samples]
    return x[far], jnp.sign(f[far])[:, None]


def four_points():
    """The corners of a square, slightly askew; opposite ones are of one class."""
    corners = jnp.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]])
    askew = 0.1 * jr.normal(jr.key(3), (4, 2))
    return corners + askew, jnp.array([[1.0], [1.0], [-1.0], [-1.0]])


def linear(depth):
    def make(key):
        k1, k2 = jr.split(key)
        sizes = (3, *[3] * (depth - 1), 1)
        return hf.MLP(sizes, activation="linear", key=k1), separable(k2)

    return make


def diagonal(power):
    def make(key):
        k1, k2, k3 = jr.split(key, 3)
        u, v = 0.5 * jr.normal(k1, (3,)), 0.5 * jr.normal(k2, (3,))
        if power % 2:
            u, v = jnp.abs(u), jnp.abs(v)
        return DiagonalNet(u, v, power), separable(k3)

    return make


def square(key):
    return hf.MLP((2, 4, 1), activation=jnp.square, key=key), four_points()


def relu(sizes, data):
    def make(key):
        k1, k2 = jr.split(key)
        return hf.MLP(sizes, key=k1), data(k2)

    return make


def from_hard_margin(model, x, y) -> float:
    w = np.eye(x.shape[1])
    for layer in model.layers:
        w = np.asarray(layer.weight) @ w
    rows = y * x
    best = scipy.optimize.minimize(
        lambda v: 0.5 * v @ v,
        np.ones(x.shape[1]),
        jac=lambda v: v,
        constraints={
            "type": "ineq",
            "fun": lambda v: rows @ v - 1,
            "jac": lambda v: rows,
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return float(np.linalg.norm(unit(w.ravel()) - unit(best.x)))


def from_basis_pursuit(model, x, y) -> float:
    rows, size = y * x, 2 * x.shape[1]
    best = scipy.optimize.linprog(
        np.ones(size), A_ub=-np.hstack([rows, -rows]), b_ub=-np.ones(len(rows))
    ).x
    beta = np.asarray(model.u) ** 2 - np.asarray(model.v) ** 2
    return float(
        np.linalg.norm(unit(beta) - unit(best[: size // 2] - best[size // 2 :]))
    )


def unit(v):
    return v / np.linalg.norm(v)


def kkt_of_diagonal(model, x, y) -> float:
    p, u, v = model.power, np.asarray(model.u), np.asarray(model.v)
    rows = y * x
    slopes = np.hstack([p * u ** (p - 1) * rows, -p * v ** (p - 1) * rows])
    return residual(np.concatenate([u, v]), rows @ (u**p - v**p), slopes, p)


def kkt_of_squares(model, x, y) -> float:
    w, a = (np.asarray(layer.weight) for layer in model.layers)
    z = x @ w.T
    by_w = y[:, :, None] * (2 * z * a)[:, :, None] * x[:, None, :]
    slopes = np.hstack([by_w.reshape(len(x), -1), y * z**2])
    flat = np.concatenate([w.ravel(), a.ravel()])
    return residual(flat, (y * (z**2 @ a.T)).ravel(), slopes, 3)


def kkt_of_relu(model, x, y) -> float:
    w, a = (np.asarray(layer.weight) for layer in model.layers)
    z = x @ w.T
    size = np.sqrt(np.sum(w**2) + np.sum(a**2))
    held = np.abs(z) <= ON_KINK * size * np.linalg.norm(x, axis=1)[:, None]
    on = np.where(held, 0, z > 0)
    by_w = y[:, :, None] * (on * a)[:, :, None] * x[:, None, :]
    slopes = np.hstack([by_w.reshape(len(x), -1), y * (on * z)])
    flat = np.concatenate([w.ravel(), a.ravel()])
    samples, units = np.nonzero(held)
    jumps = np.zeros((len(samples), flat.size))
    for row, i, k in zip(jumps, samples, units, strict=True):
        row[: w.size].reshape(w.shape)[k] = y[i, 0] * a[0, k] * x[i]
    margins = (y * ((on * z) @ a.T)).ravel()
    return residual(flat, margins, slopes, 2, jumps, samples)


def residual(w, margins, slopes, degree, jumps=None, owners=None) -> float:
    """max |w − Σ λ_i g_i| / ‖w‖ at a smallest margin of 1, the least that a λ ≥ 0 gives.

    `jumps`: what may be added, 0 to λ of the owner times each.
    """
    scale = margins.min() ** (-1 / degree)
    w, slopes = scale * w, scale ** (degree - 1) * slopes
    if jumps is None or owners is None:
        jumps, owners = np.zeros((0, w.size)), np.zeros(0, int)
    jumps = scale ** (degree - 1) * jumps
    support = margins / margins.min() <= SUPPORT
    columns = np.hstack([slopes.T, jumps.T])
    shares = np.zeros((len(owners), columns.shape[1] + 1))
    shares[np.arange(len(owners)), len(slopes) + np.arange(len(owners))] = 1
    shares[np.arange(len(owners)), owners] = -1
    one = np.ones((w.size, 1))
    found = scipy.optimize.linprog(
        np.append(np.zeros(columns.shape[1]), 1),
        A_ub=np.vstack(
            [np.hstack([columns, -one]), np.hstack([-columns, -one]), shares]
        ),
        b_ub=np.concatenate([w, -w, np.zeros(len(owners))]),
        bounds=[(0, None if s else 0) for s in support]
        + [(0, None)] * len(owners)
        + [(0, None)],
    )
    # HiGHS has tolerances of 1e-7: what its multipliers give says more.
    lack = w - columns @ found.x[:-1]
    return float(np.max(np.abs(lack))) / float(np.linalg.norm(w))


ROWS = {
    "logistic regression": Row(linear(1), from_hard_margin, 64),
    "linear, 2 layers": Row(linear(2), from_hard_margin, 64),
    "linear, 3 layers": Row(linear(3), from_hard_margin, 64),
    "diagonal, degree 2": Row(diagonal(2), from_basis_pursuit, 64),
    "diagonal, degree 3": Row(diagonal(3), kkt_of_diagonal, 64),
    "squares, xor": Row(square, kkt_of_squares, 64),
    "relu, xor": Row(relu((2, 8, 1), lambda key: four_points()), kkt_of_relu, 100),
    "relu, random": Row(relu((4, 8, 1), taught), kkt_of_relu, 100),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, help="as many as the row has, if left out")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    stored: dict[str, dict[str, Any]] = {}
    if args.out is not None and args.out.exists():
        stored = json.loads(args.out.read_text(encoding="utf-8"))
    for name in args.only:
        last = ROWS[name].seeds if args.seeds is None else args.first + args.seeds
        runs = stored.setdefault(name, {})
        for seed in range(args.first, last):
            runs[str(seed)] = run_of(ROWS[name], seed)
            if args.out is not None:
                text = json.dumps(stored, indent=1, ensure_ascii=False)
                args.out.write_text(text + "\n", encoding="utf-8")
        print(summary(name, list(runs.values())), flush=True)
    return 0


def run_of(row: Row, seed: int) -> dict[str, Any]:
    """What became of one seed, in a few numbers."""
    model, data = row.make(jr.key(seed))
    start = time.process_time()
    run = hf.flow(model, data, jnp.inf, loss=hf.LogisticLoss(), throw=False)
    found: dict[str, Any] = {
        "gradients": float(run.stats["gradient_evaluations"]),
        "seconds": round(time.process_time() - start, 2),
    }
    if run.limit is None:
        kinds = (
            "no_stationary_point",
            "end_not_reached",
            "nonfinite",
            "stuck_on_kinks",
        )
        names = [k for k in kinds if run.result == getattr(hf.RESULTS, k)]
        return {**found, "ended": names[0] if names else str(hf.RESULTS[run.result])}
    x, y = map(np.asarray, data)
    return {
        **found,
        "ended": "limit",
        "log_time": float(run.stats["log_time_reached"]),
        "distance": run.limit.moved,
        "residual": run.limit.residual,
        "curvature": run.limit.curvature,
        "on_kinks": int(np.sum(run.limit.on_kinks))
        if run.limit.on_kinks is not None
        else 0,
        "error": row.error(run.limit.model, x, y),
    }


def summary(name: str, runs: list[dict[str, Any]]) -> str:
    limits = [run for run in runs if run["ended"] == "limit"]
    others = {
        str(i): run["ended"] for i, run in enumerate(runs) if run["ended"] != "limit"
    }
    if not limits:
        return f"{name}: no limit of {len(runs)}: {others}"
    gradients = [run["gradients"] for run in limits]
    return (
        f"{name}: {len(limits)} of {len(runs)} to a limit, by other means off by at most "
        f"{max(run['error'] for run in limits):.1e}, residual at most "
        f"{max(run['residual'] for run in limits):.1e}, gradients "
        f"{np.median(gradients):,.0f} (median) to {max(gradients):,.0f}; none from {others}"
    )


if __name__ == "__main__":
    sys.exit(main())
