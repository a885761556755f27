"""Thousands of calls, judged: `python tests/fuzz --kind flow --cases 10000 --first 0`.

Every finding is printed with the case that makes the call again, and with a smaller one
that has the same verdict. `--again "Case(…)"` judges one case.
"""

import argparse
import collections
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

jax.config.update("jax_enable_x64", True)
# Most of the time is compilation.
jax.config.update("jax_disable_most_optimizations", True)
# Whose sentence an error is, is seen by where it was raised.
jax.config.update("jax_traceback_filtering", "off")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import derivatives  # noqa: E402
import descent_cases  # noqa: E402
import descent_judge  # noqa: E402
import flow_cases  # noqa: E402
import flow_judge  # noqa: E402
import law_judge  # noqa: E402
from judgement import FINDINGS  # noqa: E402
from shrink import shrink  # noqa: E402


class Kind(NamedTuple):
    """How calls of a kind are drawn and judged."""

    draw: Callable[[int], Any]
    judge: Callable[[Any], Any]
    case: type


KINDS = {
    "flow": Kind(flow_cases.draw_case, flow_judge.judge, flow_cases.Case),
    "averaged": Kind(flow_cases.draw_averaged, flow_judge.judge, flow_cases.Case),
    "derivative": Kind(derivatives.draw_case, derivatives.judge, derivatives.Case),
    "descend": Kind(
        descent_cases.draw_case, descent_judge.judge, descent_cases.Case
    ),
    "laws": Kind(law_judge.draw_case, law_judge.judge, law_judge.Case),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=list(KINDS), default="flow")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1, help="take every n-th case")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument(
        "--log", type=Path, help="append one line of JSON for each case"
    )
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--again", help="a case as it is printed")
    arguments = parser.parse_args()
    kind = KINDS[arguments.kind]
    if arguments.again:
        case = eval(arguments.again, {"Case": kind.case})
        print(kind.judge(case))
        return
    counts: collections.Counter[str] = collections.Counter()
    began = time.time()
    for i in range(arguments.cases):
        if arguments.seconds and time.time() - began > arguments.seconds:
            break
        number = arguments.first + i * arguments.stride
        case, started = kind.draw(number), time.time()
        found = kind.judge(case)
        counts[found.outcome] += 1
        if arguments.log:
            seconds = time.time() - started
            _log(arguments.log, arguments.kind, number, case, found, seconds)
        if found.outcome in FINDINGS:
            _report(case, found)
            if not arguments.no_shrink:
                print("  smaller: ", end="")
                _report(*shrink(case, kind.judge))
        if (i + 1) % 500 == 0:
            print(f"{i + 1} in {time.time() - began:.0f} s: {dict(counts)}", flush=True)
    print(dict(counts))


def _report(case: Any, found: Any) -> None:
    print(
        f"{found.outcome}: {case}: error {found.error:.1e}, promised "
        f"{found.promised:.1e} {found.detail[:400]}",
        flush=True,
    )


def _log(
    path: Path, kind: str, number: int, case: Any, found: Any, seconds: float
) -> None:
    line = {
        "kind": kind, "number": number, "outcome": found.outcome, "error": found.error,
        "promised": found.promised, "detail": found.detail[:200], "case": repr(case),
        "seconds": round(seconds, 2),
    }  # fmt: skip
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
