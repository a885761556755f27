"""The flow of a network with the size of the paper's, at finer and finer tolerances.

    python scripts/large_network.py --out docs/data/large_network.json
    python scripts/large_network.py --rtols 1e-5 1e-6 --t1 10
    python scripts/large_network.py --rtols 1e-6 --midpoint 4e-3 2e-3 --t1 35
    python scripts/large_network.py --rtols 1e-6 --midpoint 2.5e-4 --pieces 35 50 60

1000-100-100-10 with ReLU, balanced start, 1,000 points, x and labels from N(0, I): by what
`flow` takes for so many pairs of a sample and a kink, to t = 100. Tells how far each run
is from the next finer one (relative, all weights) at `TIMES`, and what a gradient costs
(in CPU time without a GPU); compilation and the coarser solves of an error estimate are
not counted. Four minutes on an H200; on a core 1e-5 alone takes nine. `--midpoint`
integrates by the explicit midpoint rule with these constant steps too, on JAX's own
gradient and nothing of homoflow's, and tells how far each is from the finest flow; with
`--pieces` from the flow's own weights at each of these times to the next. README says what
`--out` has; a later run adds to it, under the name of its device.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from benchmark.problems import flat  # noqa: E402
from benchmark.ratios import bare_loss, figure2_problem  # noqa: E402
from jax.flatten_util import ravel_pytree  # noqa: E402
from reference.midpoint import by_midpoint  # noqa: E402

import homoflow as hf  # noqa: E402

RTOLS = (1e-5, 1e-6, 2.5e-7, 6e-8)
T1, TIMES = 100.0, (10.0, 35.0, 60.0, 100.0)
#: More than the finest run takes.
MOST_STEPS = 400_000


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rtols", nargs="+", type=float, default=RTOLS)
    parser.add_argument("--midpoint", nargs="+", type=float, default=())
    parser.add_argument("--pieces", nargs="+", type=float, default=())
    parser.add_argument("--t1", type=float, default=T1)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    times = sorted({t for t in (*TIMES, *args.pieces) if t < args.t1} | {args.t1})
    model, _ = figure2_problem(jnp.float64)
    rows, before = [], None
    for rtol in sorted(args.rtols, reverse=True):
        row, weights = _run(rtol, times)
        if before is not None:
            rows[-1]["to_next"] = _distances(before, weights, times)
            print(f"  from there to {rtol:g}: {rows[-1]['to_next']}", flush=True)
        rows.append(row)
        before = weights
    assert before is not None
    known = dict(zip([0.0, *times], [flat(model)[0], *before], strict=True))
    steps = []
    for step in args.midpoint:
        for row in _midpoint(step, known, args.pieces):
            steps.append(row | {"rtol": min(args.rtols)})
            print(steps[-1], flush=True)
    if args.out is not None:
        _write(args.out, rows, steps)
    return 0


def _run(rtol: float, times: list[float]) -> tuple[dict[str, Any], np.ndarray]:
    """What the run took, and the weights at each of the times."""
    model, data = figure2_problem(jnp.float64)

    def run(t1):
        flow = hf.flow(
            model, data, t1, ts=t1 * np.array(times) / times[-1], rtol=rtol, laws=(),
            save_models=True, estimate_error=False, max_steps=MOST_STEPS,
        )  # fmt: skip
        return jax.block_until_ready(flow)

    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    run(1e-3)
    start = clock()
    flow = run(times[-1])
    row = {
        "rtol": rtol,
        "t1": times[-1],
        "solver": flow.stats["solver"],
        "gradients": int(flow.stats["gradient_evaluations"]),
        "seconds": clock() - start,
        "losses": np.asarray(flow.losses).tolist(),
    }
    print(row, flush=True)
    return row, flat(flow.models, len(times))


def _midpoint(
    step: float, flow: dict[float, np.ndarray], pieces: list[float]
) -> Iterator[dict[str, Any]]:
    """With steps of about h = `step` from the start, or from the flow's own weights.

    `flow` has those at all of the times.
    """
    model, (x, y) = figure2_problem(jnp.float64)
    _, unravel = ravel_pytree([layer.weight for layer in model.layers])
    gradient = jax.grad(lambda w: bare_loss(unravel(w), x, y))
    go_on = jax.jit(lambda w, h, number: by_midpoint(gradient, w, h, number))
    starts = sorted(pieces)[:-1] if pieces else [0.0]
    for start, end in zip(starts, [*starts[1:], max(pieces or flow)], strict=True):
        w, taken, away = jnp.asarray(flow[start]), 0, {}
        times = sorted(t for t in flow if start <= t <= end)
        for before, t in itertools.pairwise(times):
            number = round((t - before) / step)
            w = go_on(w, (t - before) / number, number)
            taken += number
            away[f"{t:g}"] = _distance(np.asarray(w), flow[t])
        yield {"step": step, "from": start, "gradients": 2 * taken, "to_flow": away}


def _distance(weights: np.ndarray, finer: np.ndarray) -> float:
    return float(np.linalg.norm(weights - finer) / np.linalg.norm(finer))


def _distances(weights, finer, times: list[float]) -> dict[str, float]:
    return {
        f"{t:g}": _distance(*at) for t, *at in zip(times, weights, finer, strict=True)
    }


def _write(path: Path, rows: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    device = jax.devices()[0].device_kind
    done[device] = rows
    if steps:
        ways = "midpoint in pieces" if steps[0]["from"] else "midpoint"
        done[f"{ways}, {device}"] = steps
    path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
