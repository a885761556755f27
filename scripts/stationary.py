"""Where flows of deep linear networks end, by `t1=inf`, checked by other means.

    python scripts/stationary.py                      # 50 seeds of each network
    python scripts/stationary.py --only 5-5-5-5 --seeds 10
    python scripts/stationary.py --out docs/data/stationary.json

From weights of 1e-3 the flow passes the saddle at the origin and one plateau for each
singular value that it learns. What `homoflow` says of the end is compared with the dense
Hessian's eigenvalues and with the least loss that the network can have: that of least
squares or, where a layer is narrower, of reduced-rank regression. Prints one line for
each network, and every seed that fails. README says what `--out` wrote.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import numpy as np  # noqa: E402
from jax.flatten_util import ravel_pytree  # noqa: E402

import homoflow as hf  # noqa: E402

NETWORKS = ("5-5-5-5", "5-5-5-5-5", "5-8-8-5", "5-2-5-5", "5-3-2-5")
SAMPLES, STD = 20, 1e-3
#: Limits of ‖∇L‖, and relative ones of the loss and of what counts as no eigenvalue.
GRADIENT, LOSS, ZERO = 1e-12, 1e-12, 1e-12


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    rows = [_campaign(name, args.seeds) for name in args.only]
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return int(any(row["good"] < row["seeds"] for row in rows))


def _campaign(name: str, seeds: int) -> dict[str, Any]:
    sizes = tuple(map(int, name.split("-")))
    start, good, gradients, losses, steps = time.process_time(), 0, [], [], []
    for seed in range(seeds):
        model, data = problem(sizes, seed)
        flow = hf.flow(model, data, jnp.inf, throw=False)
        gradient, loss, faults = faults_of(flow, sizes, data)
        gradients.append(gradient)
        losses.append(loss)
        steps.append(int(flow.stats["steps"]))
        good += not faults
        if faults:
            print(f"{name}, seed {seed}: {'; '.join(faults)}", flush=True)
    row = {
        "network": name,
        "seeds": seeds,
        "good": good,
        "largest_gradient": max(gradients),
        "largest_excess": max(losses),
        "median_steps": float(np.median(steps)),
        "cpu_seconds": (time.process_time() - start) / seeds,
    }
    print(
        "{network}: {good} of {seeds} good; ‖∇L‖ ≤ {largest_gradient:.1e}, loss off the "
        "least by ≤ {largest_excess:.1e} (relative), {median_steps:.0f} steps (median), "
        "{cpu_seconds:.1f} CPU s each".format(**row),
        flush=True,
    )
    return row


def problem(sizes: tuple[int, ...], seed: int):
    """A linear network of small weights, white inputs, and targets that are noise."""
    k1, k2, k3 = jr.split(jr.key(seed), 3)
    x, y = jr.normal(k1, (SAMPLES, sizes[0])), jr.normal(k2, (SAMPLES, sizes[-1]))
    init = hf.Gaussian(variance=STD**2)
    return hf.MLP(sizes, activation="linear", init=init, key=k3), (x, y)


def faults_of(flow: hf.Trajectory, sizes, data) -> tuple[float, float, list[str]]:
    """‖∇L‖, the relative excess of the loss over its minimum, and what is wrong."""
    loss, gradient, hessian = map(np.asarray, derivatives(flow.model, data))
    gradient = float(np.linalg.norm(gradient))
    values = np.linalg.eigvalsh(hessian)
    x, y = map(np.asarray, data)
    excess = float(loss) / least_loss(x, y, min(sizes)) - 1
    faults = []
    if flow.result != hf.RESULTS.successful:
        faults.append(str(hf.RESULTS[flow.result]))
    elif flow.stats["stationary_kind"] != hf.StationaryKind.minimum:
        faults.append(str(hf.StationaryKind[flow.stats["stationary_kind"]]))
    if gradient > GRADIENT:
        faults.append(f"‖∇L‖ = {gradient:.1e}")
    if values[0] < -ZERO * values[-1]:
        faults.append(f"eigenvalue {values[0]:.1e} of {values[-1]:.1e}")
    if abs(excess) > LOSS:
        faults.append(f"the loss is above the least by {excess:.1e}")
    return gradient, abs(excess), faults


@eqx.filter_jit
def derivatives(model, data):
    """The squared loss, its gradient and its dense Hessian."""
    weights, rest = eqx.partition(model, eqx.is_inexact_array)
    flat, unravel = ravel_pytree(weights)
    x, y = data

    def loss(w):
        predictions = jax.vmap(eqx.combine(unravel(w), rest))(x)
        return 0.5 * jnp.mean(jnp.sum((predictions - y) ** 2, axis=1))

    return loss(flat), jax.grad(loss)(flat), jax.hessian(loss)(flat)


def least_loss(x: np.ndarray, y: np.ndarray, rank: int) -> float:
    """Of y ≈ xM with M of at most that rank: the part of y in the range of x, cut off."""
    basis = np.linalg.qr(x)[0]
    fitted = basis @ (basis.T @ y)
    left_out = np.linalg.svd(fitted, compute_uv=False)[rank:]
    residual = np.sum((y - fitted) ** 2) + np.sum(left_out**2)
    return 0.5 * residual / len(x)


if __name__ == "__main__":
    sys.exit(main())
