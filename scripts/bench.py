"""Speed of homoflow, beside other ODE solvers and beside bare loops.

    python scripts/bench.py --out results/bench              # everything: an hour or more
    python scripts/bench.py --only a-1000-100 d --seconds 10
    python scripts/bench.py --only descend ledger flow import
    python scripts/bench.py --only latency
    python scripts/bench.py --quick

Solves smooth gradient flows by `homoflow.flow`, Diffrax, SciPy, CVODE, torchdiffeq,
torchode and gradient descent at a series of tolerances, on one core and with the same
compiled gradient (and Hessian, for implicit methods) but for one thing: methods with a *
are given the faster gradient that homoflow makes of a softplus network. Writes the runs
(`bench.json`, after each of them), work–precision diagrams (`bench.png`) and README's table
(`bench.md`), and prints the CPU time at equal error of the final weights, beside the
project's targets. Absolute tolerances are the relative ones times the root mean square of
the initial weights. Compilation is not counted. A later run adds to what is in `--out`,
and Ctrl-C keeps what there is.

`descend`, `ledger`, `flow`, `exact`, `projection` and `import` are ratios to bare loops, or
to runs without it, `seeds` is 64 in one vmap to one by one, in one and the same run, and
`edge` the central flow to Euler's steps and to its descent
(`ratios.json`). `latency` is the time of first and second calls, each in a process of its
own (`latency.json`, `latency.md`); `--cases` names some of them.

The peers come with `pip install '.[bench]'` (and `pip install torchode`); those that are
missing are left out.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

#: Of `--quick`: the problem's samples and end, and one setting in how many is run.
_QUICK_SAMPLES, _QUICK_T1, _QUICK_EVERY = 100, 5.0, 3


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    problems, ratios = _chosen(args)
    interrupted = False
    try:
        is_all = args.only is None and not (args.quick or args.draw_only)
        if is_all or "latency" in (args.only or ()):
            _run_latency(args)
        _run_ratios(ratios, args)
        if problems and not args.draw_only:
            _run_study(problems, args)
    except KeyboardInterrupt:
        interrupted = True
        print("Interrupted: what follows is what was computed.", flush=True)
    if problems or args.draw_only:
        _show(args.out)
    return 130 if interrupted else 0


def _parser() -> argparse.ArgumentParser:
    from benchmark.latency import cases
    from benchmark.problems import PROBLEMS
    from benchmark.ratios import BENCHES
    from benchmark.study import METHODS

    names = [method.name for method in METHODS]
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def choice(flag: str, of: list[str]) -> None:
        told = f"of {', '.join(of)}"
        p.add_argument(flag, nargs="+", choices=of, metavar="NAME", help=told)

    choice("--only", ["latency", *PROBLEMS, *BENCHES])
    choice("--cases", list(cases()))
    choice("--methods", names)
    p.add_argument("--out", type=Path, default=Path("results/bench"), help="a folder")
    p.add_argument(
        "--seconds",
        type=float,
        default=30.0,
        help="of CPU time, after which a run is given up",
    )
    p.add_argument("--every", type=int, default=1, help="run one setting in so many")
    p.add_argument("--repeats", type=int, default=3, help="of each timed ratio")
    p.add_argument("--quick", action="store_true", help="one problem to an early end")
    p.add_argument("--draw-only", action="store_true", help="what --out has of runs")
    return p


def _chosen(args) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    from benchmark.problems import PROBLEMS, small
    from benchmark.ratios import BENCHES

    if args.quick:
        early = small(_QUICK_SAMPLES, _QUICK_T1)
        return {"quick": lambda: replace(early, is_stiff=False)}, []
    if args.draw_only:
        return {}, []
    only = args.only or [*BENCHES, *PROBLEMS]
    problems = {name: PROBLEMS[name] for name in only if name in PROBLEMS}
    return problems, [name for name in only if name in BENCHES]


def _run_latency(args) -> None:
    from benchmark.latency import cases, markdown, measure_apart
    from workprecision.study import write

    path = args.out / "latency.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in args.cases or cases():
        with tempfile.TemporaryDirectory() as cache:
            first = measure_apart(name, cache)
            again = measure_apart(name, cache)
        rows[name] = {
            **first._asdict(), "tracing": first.tracing, "cached": again.first
        }  # fmt: skip
        print(name, rows[name], flush=True)
        write(rows, path)
    ordered = {name: rows[name] for name in cases() if name in rows}
    table = markdown(ordered)
    print(table)
    (args.out / "latency.md").write_text(table + "\n", encoding="utf-8")


def _run_ratios(names: list[str], args) -> None:
    from benchmark.ratios import BENCHES
    from workprecision.study import write

    path = args.out / "ratios.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in names:
        rows = BENCHES[name](args.repeats)
        print(*rows, sep="\n", flush=True)
        done[name] = {row.label: row.measured for row in rows}
        write(done, path)


def _run_study(problems: dict[str, Callable[[], Any]], args) -> None:
    from benchmark.study import METHODS, missing_packages, run_study

    if missing := missing_packages():
        print(f"Not installed, left out: {', '.join(missing)}.", flush=True)
    run_study(
        problems,
        args.methods or [method.name for method in METHODS],
        args.out / "bench.json",
        seconds=args.seconds,
        every=_QUICK_EVERY if args.quick else args.every,
        say=lambda line: print(line, flush=True),
    )


def _show(folder: Path) -> None:
    from benchmark.picture import draw
    from benchmark.report import markdown, report

    path = folder / "bench.json"
    if not path.exists():
        print(f"There is no {path}.")
        return
    study = json.loads(path.read_text(encoding="utf-8"))
    print(report(study))
    (folder / "bench.md").write_text(markdown(study) + "\n", encoding="utf-8")
    print(f"Picture: {draw(study, folder / 'bench.png')}")


def on_one_core() -> None:
    """Before JAX is imported: one thread, and one core where the system can say so."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = flags
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


if __name__ == "__main__":
    on_one_core()
    import jax

    jax.config.update("jax_enable_x64", True)
    # Gradients that Python waits for come sooner without a second thread.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    sys.exit(main())
