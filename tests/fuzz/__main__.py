"""Thousands of calls, judged: `python tests/fuzz --cases 10000 --first 0`.

Every finding is printed with the code that makes the call again.
"""

import argparse
import collections
import time

import jax

jax.config.update("jax_enable_x64", True)

from cases import draw_case  # noqa: E402
from judge import judge  # noqa: E402

FINDINGS = ("SILENTLY WRONG", "CRASHED", "false alarm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1, help="take every n-th case")
    arguments = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    began = time.time()
    try:
        for i in range(arguments.cases):
            case = draw_case(arguments.first + i * arguments.stride)
            found = judge(case)
            counts[found.outcome] += 1
            if found.outcome in FINDINGS:
                print(
                    f"{found.outcome}: {case.snippet()}: error {found.error:.1e}, promised "
                    f"{found.promised:.1e} {found.detail[:300]}",
                    flush=True,
                )
            if (i + 1) % 500 == 0:
                print(
                    f"{i + 1} in {time.time() - began:.0f} s: {dict(counts)}",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("interrupted")
    print(dict(counts))


if __name__ == "__main__":
    main()
