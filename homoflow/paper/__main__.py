"""`python -m homoflow.paper`: run the paper's experiments and write what they show."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from . import digits, figure1, figure2
from ._report import Report, as_text, table, write_table


class Experiment(NamedTuple):
    run: Callable[..., Report]
    draw: Callable[[Report], Any]
    full: Any
    quick: Any


EXPERIMENTS = {
    "figure1": Experiment(
        figure1.run, figure1.draw, figure1.Config(), figure1.Config()
    ),
    "digits": Experiment(
        digits.run, digits.draw, digits.Config(), digits.Config(steps=800)
    ),
    "figure2": Experiment(
        figure2.run,
        figure2.draw,
        figure2.Config(),
        figure2.Config(
            sizes=(100, 30, 30, 10), samples=100, steps=4000, flow_steps_per_step=3
        ),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    args = _parsed(arguments)
    # Laws are conserved to 1e-8 and better here: single precision would not show it.
    jax.config.update("jax_enable_x64", True)
    import matplotlib

    matplotlib.use("Agg")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    done: list[Report] = []
    work = threading.Thread(target=_run_all, args=(args, out, done), daemon=True)
    work.start()
    try:
        # Compiled code cannot be interrupted; a main thread that only waits can.
        while work.is_alive():
            work.join(timeout=0.2)
    except KeyboardInterrupt:
        finished = ", ".join(report.name for report in done) or "nothing"
        print(f"\nInterrupted. Finished, and kept in {out}: {finished}.", flush=True)
        os._exit(130)
    if len(done) < len(args.only):
        return 1
    print((out / "summary.md").read_text(encoding="utf-8"))
    print(f"Figures, tables and this summary are in {out}.")
    return 0


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reproduce", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="smaller problems, under a minute"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS)
    )
    parser.add_argument("--out", default="results", help="folder to write to")
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    return parser.parse_args(arguments)


def _run_all(args: argparse.Namespace, out: Path, done: list[Report]) -> None:
    for number, name in enumerate(args.only, 1):
        experiment = EXPERIMENTS[name]
        config = experiment.quick if args.quick else experiment.full
        print(f"[{number}/{len(args.only)}] {name}: {config}", flush=True)
        start = time.perf_counter()
        report = experiment.run(config, progress=not args.no_progress)
        _write(report, experiment.draw(report), out)
        done.append(report)
        _write_summary(done, out, quick=args.quick)
        seconds = time.perf_counter() - start
        print(f"[{number}/{len(args.only)}] {name}: {seconds:.0f} s", flush=True)


def _write(report: Report, figure: Any, out: Path) -> None:
    figure.savefig(out / f"{report.name}.png", dpi=150)
    write_table(table(report), out / f"{report.name}.csv")


def _write_summary(done: list[Report], out: Path, *, quick: bool) -> None:
    kind = "quick run on smaller problems" if quick else "full run"
    header = f"# Du, Hu & Lee (2018), measured by homoflow ({kind})\n"
    text = "\n".join([header, *(as_text(report) for report in done)])
    (out / "summary.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
