"""Which tests are slow, from a run: `python scripts/slow_tests.py results.xml`.

Writes `tests/slow_tests.txt`, whose tests `tests/conftest.py` marks `slow`. The run:
`./scripts/test -m "" --junitxml=results.xml`.
"""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests" / "slow_tests.txt"
#: Tests that take longer are slow.
MAX_SECONDS = 3.0


def durations(paths: list[str]) -> dict[str, float]:
    """Seconds by test, as pytest names it; of several runs the last counts."""
    found = {}
    for path in paths:
        for case in ET.parse(path).getroot().iter("testcase"):
            if case.find("skipped") is None:
                file = case.attrib["classname"].replace(".", "/") + ".py"
                found[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
    return found


def main() -> None:
    slow = {k: t for k, t in durations(sys.argv[1:]).items() if t > MAX_SECONDS}
    lines = [f"{seconds:6.1f} {name}" for name, seconds in sorted(slow.items())]
    LIST.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(slow)} slow tests, {sum(slow.values()):.0f} s")


if __name__ == "__main__":
    main()
