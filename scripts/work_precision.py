"""Work against precision: the exact flow of ReLU networks, and general ODE solvers.

    python scripts/work_precision.py --out results/work_precision --budget 20
    python scripts/work_precision.py --quick
    python scripts/work_precision.py --out results/work_precision --draw-only

Solves gradient flow of three networks with kinks by `homoflow.Filippov`, by Diffrax,
SciPy, torchdiffeq and CVODE at a series of tolerances, and by midpoint with constant
steps, all on one core and with one and the same compiled gradient. Writes the runs
(`work_precision.json`, after each of them) and the picture (`work_precision.png`), and
prints the work at given errors beside the project's targets.

Work is gradients of the whole loss (the exact flow also needs forward passes, told
beside, and gradients at single samples, which count 1/samples each) and time, without
compilation. The error is the relative one of the final weights. Absolute tolerances are
the relative ones times the root mean square of the initial weights.

The peers come with `pip install '.[bench]'`; those that are missing are left out.
Ctrl-C keeps what has been computed, and draws it.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

#: Of `--quick`: CPU seconds and settings of each method; the end of its problem.
QUICK_SECONDS, QUICK_POINTS, QUICK_T1 = 0.5, 3, 5.0


def main(argv: Sequence[str] | None = None) -> int:
    from workprecision.picture import draw
    from workprecision.report import report

    args = parser().parse_args(argv)
    json_path = args.out / "work_precision.json"
    interrupted = False
    if not args.draw_only:
        try:
            run(args, json_path)
        except KeyboardInterrupt:
            interrupted = True
            print("Interrupted: what follows is what was computed.", flush=True)
    if not json_path.exists():
        print(f"There is no {json_path}.")
        return 1
    done = stored(json_path)
    print(report(done))
    print(f"Picture: {draw(done, args.out / 'work_precision.png')}")
    return 130 if interrupted else 0


def parser() -> argparse.ArgumentParser:
    from workprecision import study
    from workprecision.problems import PROBLEMS

    names = [method.name for method in study.METHODS]
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--problems",
        nargs="+",
        choices=list(PROBLEMS),
        metavar="NAME",
        default=list(PROBLEMS),
        help=f"of {', '.join(PROBLEMS)}",
    )
    p.add_argument(
        "--methods",
        nargs="+",
        choices=names,
        metavar="NAME",
        default=names,
        help=f"of {', '.join(names)}",
    )
    p.add_argument("--out", type=Path, default=Path("results"), help="a folder")
    p.add_argument(
        "--budget",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="of CPU time, after which a run is given up",
    )
    p.add_argument(
        "--gradients",
        type=int,
        default=10_000_000,
        metavar="COUNT",
        help="after which a run is given up",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help="one small problem to an early end, few settings",
    )
    p.add_argument(
        "--add",
        action="store_true",
        help="keep the runs in --out of problems and methods not named",
    )
    p.add_argument(
        "--draw-only",
        action="store_true",
        help="only the table and the picture, of runs in --out",
    )
    return p


def run(args: argparse.Namespace, json_path: Path) -> None:
    from workprecision.problems import PROBLEMS
    from workprecision.study import missing_packages, run_study

    if missing := missing_packages():
        print(f"Not installed, left out: {', '.join(missing)}.", flush=True)
    if args.quick:
        problems = {"biased": replace(PROBLEMS["biased"](), t1=QUICK_T1)}
    else:
        problems = {name: PROBLEMS[name]() for name in args.problems}
    earlier = stored(json_path) if args.add and json_path.exists() else None
    run_study(
        problems,
        args.methods,
        json_path,
        seconds=min(args.budget, QUICK_SECONDS) if args.quick else args.budget,
        gradients=args.gradients,
        points=QUICK_POINTS if args.quick else None,
        say=lambda line: print(line, flush=True),
        earlier=earlier,
    )


def stored(json_path: Path) -> dict[str, Any]:
    return json.loads(json_path.read_text(encoding="utf-8"))


def on_one_core() -> None:
    """Before JAX is imported: one thread, and one core where the system can say so."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


if __name__ == "__main__":
    on_one_core()
    import jax

    jax.config.update("jax_enable_x64", True)
    # Gradients that Python waits for come sooner without a second thread.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    sys.exit(main())
