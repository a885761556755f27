"""Fills the tables of README and the documentation from `docs/data`.

    python scripts/tables.py            # writes the tables anew
    python scripts/tables.py --check    # fails where one is stale

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`, with one of the
names of `TABLES`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmark.latency import first_calls
from benchmark.report import markdown
from measured import rows, stored
from paper._report import overview_table

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(
    r"<!-- begin: (?P<name>\S+) -->\n(?P<table>.*?)<!-- end: (?P<end>\S+) -->",
    re.DOTALL,
)


def bench() -> str:
    """Seconds of CPU time of homoflow and its rivals at equal errors."""
    return markdown(stored("bench.json"))


def latency() -> str:
    """How long first and second calls take."""
    return first_calls(stored("latency.json"))


def paper() -> str:
    """What the full run of the paper's experiments found, a statement a line."""
    return overview_table(stored("summary.json"))


def measured() -> str:
    """Errors, drifts and costs that are not in the other tables."""
    return table(("what", "measured", "by"), rows())


def provenance() -> str:
    """How, on what and when each file of measurements was made."""
    made = stored("measured.json").items()
    columns = ("command", "machine", "date")
    return table(
        ("file", *columns),
        [(f"`{name}`", *(entry[c] for c in columns)) for name, entry in made],
    )


def edge(file: str = "edge.json") -> str:
    """The drift of laws at the edge of stability: measured, and predicted."""
    head = (
        "network, seed",
        "weights",
        "cycles",
        "overshoot",
        "shift",
        "critical",
        "drift",
        "error",
        "with noise",
        "leading order",
        "weights off",
    )
    runs = stored(file).items()
    known = [(name, run) for name, run in runs if "drift" in run]
    known.sort(key=lambda item: not item[1]["passes"])
    return table(head, [_edge_row(name, run) for name, run in known])


def _edge_row(name: str, run: dict) -> tuple[str, ...]:
    def both(key: str, scale: float = 100) -> str:
        second = run.get(f"{key}, second order")
        values = (run[key], *(() if second is None else (second,)))
        return " / ".join(f"{scale * value:.2g}" for value in values)

    away = "distance central", "distance, second order", "distance flow"
    label = name.replace("tanh-linear ", "").replace("seed ", "")
    return (
        label if run["passes"] else f"*{label}*",
        f"{run['weights']:,}",
        f"{run['cycles']:.0f}",
        f"{run['overshoot']:.2f}",
        f"{100 * run['shift']:.1g} %",
        f"{run['most critical']}",
        f"{run['drift']:.2g}",
        f"{both('error')} %",
        f"{both('error with noise')} %",
        f"{100 * run['leading order']:.2g} %",
        " / ".join(f"{run[key]:.2g}" for key in away if key in run),
    )


def edge_cost() -> str:
    """What the central flow takes, beside Euler's steps and beside the descent."""
    rows = stored("ratios.json")["edge"].items()
    head = ("part of it", "measured")
    return table(head, [(label, f"{value:.3g}") for label, value in rows])


TABLES: Mapping[str, Callable[[], str]] = {
    "bench": bench,
    "edge": edge,
    "edge_held_out": lambda: edge("edge_held_out.json"),
    "edge_cost": edge_cost,
    "latency": latency,
    "paper": paper,
    "measured": measured,
    "provenance": provenance,
}


def table(head: tuple[str, ...], lines: list) -> str:
    """A table in Markdown."""
    rule = "|" + "---|" * len(head)
    return "\n".join([_line(head), rule, *map(_line, lines)])


def _line(cells) -> str:
    # A bar would end the cell.
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def filled(text: str) -> str:
    """`text` with every table as the data have it."""
    marks = re.findall(r"<!-- (?:begin|end): (\S+) -->", text)
    blocks = [name for m in _BLOCK.finditer(text) for name in (m["name"], m["end"])]
    if marks != blocks or marks[::2] != marks[1::2]:
        raise ValueError(f"Markers do not match: {marks}.")

    def fill(match: re.Match) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"No table is called {name!r}; there are {list(TABLES)}.")
        # Blank lines, without which Markdown takes the table for HTML.
        return f"<!-- begin: {name} -->\n\n{TABLES[name]()}\n\n<!-- end: {name} -->"

    return _BLOCK.sub(fill, text)


def stale_pages() -> Iterator[tuple[Path, str]]:
    """Pages whose tables are not what the data say, with what they should be."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if (new := filled(text)) != text:
            yield page, new


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="The tables of the documentation.")
    parser.add_argument("--check", action="store_true", help="write nothing")
    only_check = parser.parse_args(arguments).check
    stale = list(stale_pages())
    for page, text in stale:
        print(f"{'stale' if only_check else 'written'}: {page.relative_to(ROOT)}")
        if not only_check:
            page.write_text(text, encoding="utf-8")
    return int(only_check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
