"""`python -m paper`: run the paper's statements and write what they show."""

import argparse
import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import matplotlib

from . import (
    cor21,
    digits,
    figure1,
    figure2,
    footnote8,
    footnote11,
    lemma31,
    lemma32,
    thm21,
    thm22,
    thm23,
    thm31,
    thm32,
)
from ._page import RESOLUTION, write_page
from ._report import Report, as_text, load, overview, overview_table, save

#: In the paper's order. Each module has `Config`, `QUICK`, `run` and `draw`.
EXPERIMENTS: dict[str, ModuleType] = {
    "figure1": figure1,
    "thm21": thm21,
    "footnote8": footnote8,
    "cor21": cor21,
    "thm22": thm22,
    "thm23": thm23,
    "lemma31": lemma31,
    "lemma32": lemma32,
    "thm31": thm31,
    "footnote11": footnote11,
    "thm32": thm32,
    "figure2": figure2,
    "digits": digits,
}


#: Points, readable at arm's length.
FONT_SIZE = 12


def main(arguments: list[str] | None = None) -> int:
    args = _parsed(arguments)
    # Laws are conserved to 1e-8 and better here: single precision would not show it.
    jax.config.update("jax_enable_x64", True)
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
        print(
            f"\nInterrupted. Finished, and kept in {out}: {finished}. The same command "
            "goes on from there.",
            flush=True,
        )
        os._exit(130)
    if len(done) < len(args.only):
        return 1
    for report in done:
        print(f"{report.name:12}{report.seconds:6.0f} s  {report.verdict}")
    print(f"{'together':12}{sum(report.seconds for report in done):6.0f} s")
    print(f"The report is {out / 'report.html'}; its numbers are beside it.")
    return 0 if all(report.holds for report in done) else 2


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="reproduce", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller problems")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(EXPERIMENTS),
        default=list(EXPERIMENTS),
        metavar="NAME",
        help=f"some of {', '.join(EXPERIMENTS)}",
    )
    parser.add_argument(
        "--seeds", type=int, help="random starts, where a statement is about many"
    )
    parser.add_argument("--out", default="results", help="folder to write to")
    parser.add_argument(
        "--fresh", action="store_true", help="run again what is there already"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bars")
    args = parser.parse_args(arguments)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {args.seeds}.")
    return args


def _run_all(args: argparse.Namespace, out: Path, done: list[Report]) -> None:
    for number, name in enumerate(args.only, 1):
        module, config = EXPERIMENTS[name], _config(args, EXPERIMENTS[name])
        place = f"[{number}/{len(args.only)}] {name}"
        path = out / f"{name}.json"
        report = None if args.fresh else load(path, config)
        if report is not None:
            print(f"{place}: kept from an earlier run", flush=True)
        else:
            print(f"{place}: {config}", flush=True)
            start = time.perf_counter()
            report = module.run(config, progress=not args.no_progress)
            with matplotlib.rc_context({"font.size": FONT_SIZE}):
                module.draw(report).savefig(out / f"{name}.png", dpi=RESOLUTION)
            seconds = time.perf_counter() - start
            report = dataclasses.replace(report, seconds=seconds)
            # Last, so that a report which is there has its picture.
            save(report, config, path)
            print(f"{place}: {report.verdict} ({seconds:.0f} s)", flush=True)
        done.append(report)
        _write_summary(done, out, quick=args.quick)


def _config(args: argparse.Namespace, module: ModuleType) -> Any:
    config = module.QUICK if args.quick else module.Config()
    if args.seeds is not None and hasattr(config, "seeds"):
        config = dataclasses.replace(config, seeds=args.seeds)
    return config


def _write_summary(done: list[Report], out: Path, *, quick: bool) -> None:
    kind = "quick run on smaller problems" if quick else "full run"
    header = f"# Du, Hu & Lee (2018), measured by homoflow ({kind})\n"
    lines = [overview(report) for report in done]
    table = overview_table(lines) + "\n"
    text = "\n".join([header, table, *(as_text(report) for report in done)])
    (out / "summary.md").write_text(text, encoding="utf-8")
    content = json.dumps(lines, indent=1, ensure_ascii=False)
    (out / "summary.json").write_text(content + "\n", encoding="utf-8")
    write_page(done, out, kind)


if __name__ == "__main__":
    sys.exit(main())
