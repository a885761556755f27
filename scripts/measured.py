"""What was measured besides speed, as the rows of a table in the documentation.

Every number comes from a file in `docs/data`. `measured.json` there says how, on what and
when the others were made; `asserted.json` has bounds that tests hold the code to.
"""

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).resolve().parent.parent / "docs" / "data"
#: Midpoint goes the flow's way where it ends this close.
SAME_WAY = 1e-5


class Row(NamedTuple):
    what: str
    measured: str
    made_by: str


def stored(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def rows() -> list[Row]:
    return [
        *exact_flow(),
        *large_network(),
        *midpoint(),
        *stiff_flows(),
        *stationary_points(),
        *rescalings(),
        *ledger(),
        *costs(),
        *sweeps(),
        *scaling(),
        *commands(),
    ]


def exact_flow() -> Iterable[Row]:
    bounds, inclusion = (
        stored("asserted.json")[k] for k in ("exact flow", "inclusion")
    )
    what = "exact flow of a 20-30-30-3 ReLU network, 100 points, to t = 60"
    by = "`tests/kinks/test_filippov.py`"
    error, drift = scientific(bounds["error"]), scientific(bounds["drift"])
    yield Row(
        f"{what}: final weights, against an independent integration",
        f"differ by less than {error} (relative), after fewer than "
        f"{bounds['gradients']:,} gradients",
        by,
    )
    yield Row(f"{what}: drift of its laws", f"at most {drift}", by)
    yield Row(
        "exact flow: ‖dw/dt‖ against the distance from 0 to the convex hull of the "
        "gradients around w",
        f"the same to {scientific(inclusion['distance'])}",
        "`tests/kinks/test_filippov_inclusion.py`",
    )


def large_network() -> Iterable[Row]:
    by_device = stored("large_network.json")
    runs = by_device["NVIDIA H200"]
    for run, finer in zip(runs, [*runs[1:], None], strict=True):
        gradients = f"{significant(run['gradients'])} gradients"
        if finer is not None:
            ends = ", ".join(
                f"{scientific(distance, 2)} at t = {t}"
                for t, distance in run["to_next"].items()
            )
            gradients += (
                f"; from `rtol` {scientific(finer['rtol'], 2)}: {ends} (relative)"
            )
        yield Row(
            f"the paper's network (200,000 pairs of a sample and a kink), averaged, to "
            f"t = {run['t1']:g}: `rtol` {scientific(run['rtol'], 2)}",
            gradients,
            source("large_network.json"),
        )
    gpu, core = (
        1e3
        * sum(run["seconds"] for run in runs)
        / sum(run["gradients"] for run in runs)
        for runs in (by_device["NVIDIA H200"], by_device["cpu"])
    )
    yield Row(
        "the paper's network: time of a gradient",
        f"{gpu:.2f} ms on an H200, {core:.0f} ms on a CPU's core",
        source("large_network.json"),
    )


def midpoint() -> Iterable[Row]:
    by_device = stored("large_network.json")
    for run in by_device["midpoint, cpu"]:
        far = ", ".join(
            f"{scientific(distance, 2)} at t = {t}"
            for t, distance in run["to_flow"].items()
        )
        yield Row(
            f"the paper's network: midpoint with steps of {scientific(run['step'])}, from "
            f"the flow at `rtol` {scientific(run['rtol'])}",
            f"{far} (relative)",
            source("large_network.json"),
        )
    yield Row(
        "the paper's network: midpoint in pieces that begin on the flow",
        pieces(by_device["midpoint in pieces, cpu"]),
        source("large_network.json"),
    )


def pieces(runs: list[dict]) -> str:
    """How near midpoint ends; where it parts, with which shorter step it does not."""
    first, shorter = {}, {}
    for run in sorted(runs, key=lambda run: (run["from"], -run["step"])):
        ((end, distance),) = run["to_flow"].items()
        if run["from"] in first:
            shorter.setdefault(run["from"], []).append((run["step"], distance))
        else:
            first[run["from"]] = distance, float(end)
    near = [distance for start, (distance, _) in first.items() if start not in shorter]
    ends = [end for _, end in first.values()]
    text = [
        f"{len(near)} of {len(first)} pieces from t = {min(first):g} to {max(ends):g} end "
        f"within {upper_bound(max(near))} of the flow"
    ]
    for start, repeats in shorter.items():
        step, distance = next(pair for pair in repeats if pair[1] < SAME_WAY)
        text.append(
            f"from t = {start:g} it is {scientific(first[start][0], 2)} away, with steps "
            f"of {scientific(step, 2)} {scientific(distance, 2)}"
        )
    return "; ".join(text)


def stiff_flows() -> Iterable[Row]:
    for name in ("a-1000-100", "a-1000-1000"):
        problem = stored("bench.json")["problems"][name]
        ours, theirs = (
            [
                run
                for run in problem["runs"]
                if run["method"] == method and run["finished"]
            ]
            for method in ("homoflow ExponentialAdams", "Diffrax Tsit5")
        )
        gradients = " / ".join(f"{run['gradients']:.0f}" for run in ours)
        errors = " / ".join(scientific(run["error"]) for run in ours)
        yield Row(
            f"stiff flow ({problem['title']}; {problem['weights']} weights), to "
            f"t = {problem['t1']:,.0f}, by `ExponentialAdams`",
            f"{gradients} gradients for errors of {errors} (Tsit5: "
            f"{interval([run['gradients'] for run in theirs])})",
            source("bench.json"),
        )


def stationary_points() -> Iterable[Row]:
    networks = stored("stationary.json")
    runs, good = (sum(row[key] for row in networks) for key in ("seeds", "good"))
    gradient, excess = (
        upper_bound(max(row[f"largest_{key}"] for row in networks))
        for key in ("gradient", "excess")
    )
    names = ", ".join(row["network"] for row in networks)
    yield Row(
        f"flows of linear networks ({names}) from small weights to a stationary point",
        f"{good} of {runs} end at the global minimum, with ‖∇L‖ ≤ {gradient} and a loss "
        f"within {excess} of that of (reduced-rank) regression",
        source("stationary.json"),
    )


def rescalings() -> Iterable[Row]:
    projection, balance = (
        stored("asserted.json")[k] for k in ("projection", "balance")
    )
    yield Row(
        "projected flow, float64: recorded laws, at every tolerance",
        f"constant to {scientific(projection['drift'])}·‖w‖²",
        "`tests/rescaling/test_projection.py`",
    )
    close = scientific(balance["difference"])
    yield Row(
        f"`balance` of {balance['networks']} random networks, their norms spread over six "
        "orders of magnitude, some of low rank or with dead units",
        f"laws below {close}·‖w‖², outputs agree to {close}",
        "`tests/rescaling/test_balance.py`",
    )


def ledger() -> Iterable[Row]:
    for label, ratio in stored("ratios.json")["ledger"].items():
        laws, optimizer = label.removeprefix("ledger of ").split(" / none, ", 1)
        yield Row(
            f"`descend(ledger=True)` on a 1000-100-100-10 network: {laws}, {optimizer}",
            f"{100 * (ratio - 1):.0f} % more CPU time",
            source("ratios.json"),
        )


def costs() -> Iterable[Row]:
    """Of batches of seeds, and of the exact flow beside its gradients."""
    for label, ratio in stored("costs.json")["seeds"].items():
        method = label.rpartition(", ")[2]
        yield Row(
            f"64 small networks in one `jax.jit(jax.vmap(…))`, {method}: CPU time, beside "
            "one after the other",
            f"{ratio:.2f}",
            source("costs.json"),
        )
    for label, ratio in stored("costs.json")["exact"].items():
        net = label.rpartition(", ")[2]
        yield Row(
            f"exact flow of {net}: CPU time, beside that of its gradients alone",
            f"{ratio:.1f}",
            source("costs.json"),
        )


def sweeps() -> Iterable[Row]:
    found = stored("sweeps.json")
    runs = {"descend": "descents of 500 steps", "flow": "flows of small networks"}
    for name, text in runs.items():
        later, first = (
            found[name][call]["with a store"] for call in ("later", "first")
        )
        yield Row(
            f"`hf.sweep` of 1,024 {text} in chunks of 256, with a store, beside "
            "`jax.jit(jax.vmap(run))`: CPU time",
            f"{later:+.1%}; of the first calls {first:+.1%}",
            source("sweeps.json"),
        )
    few, many = found["megabytes"].values()
    yield Row(
        "the first of these, memory of the whole process at most",
        f"{few} MB for 256 seeds, {many} MB for 4,096",
        source("sweeps.json"),
    )
    kills = found["kills"]
    yield Row(
        f"{kills['kills']} times `kill -9` at a random moment of a sweep: stores in the "
        f"end, and what the kills left",
        f"all the same to the byte; {kills['chunks without a mark']} times a chunk "
        f"without its mark, {kills['half files']} times half a file",
        "`scripts/kill_sweeps.py`",
    )


def scaling() -> Iterable[Row]:
    found = stored("scaling.json")
    by, rows = source("scaling.json"), found["devices"]
    counts = ", ".join(str(row["devices"]) for row in rows)
    least = min(row["efficiency"] for row in rows)
    collectives = sum(row["collectives"] for row in rows)
    yield Row(
        f"`hf.sweep` of 64 flows on {counts} simulated devices: work of one device over "
        "the number of devices, as a part of the work of the busiest",
        f"at least {least:.0%}; {collectives} collective operations in their programs",
        by,
    )
    yield Row(
        "`hf.sweep` of 2,048 descents by two processes on two cores: times faster than by "
        "one, wall clock",
        f"{found['speedup']:.2f}",
        by,
    )


def commands() -> Iterable[Row]:
    figures = stored("measured.json")["reproduce"]["figures"]
    seconds = sum(int(line["time"].split()[0]) for line in stored("summary.json"))
    yield Row(
        "`./scripts/reproduce`, all of it",
        f"{seconds / 60:.0f} minutes",
        source("summary.json"),
    )
    yield Row(
        "`./scripts/reproduce --quick`",
        f"about {figures['quick_minutes']} minutes",
        source("reproduce"),
    )
    yield Row(
        "`./scripts/reproduce --only figure2` on an H200",
        f"{figures['figure2_seconds_on_h200']} s",
        source("reproduce"),
    )


def source(name: str) -> str:
    """How and when a file of measurements was made."""
    made = stored("measured.json")[name]
    command, date = re.split(" --|;", made["command"])[0], made["date"].split(";")[0]
    return f"`{command}`, {date}"


# How numbers are printed.


def scientific(x: float, digits: int = 1) -> str:
    """1.52e-4 as 1.5e-4 with two digits, 2e-4 with one."""
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def upper_bound(x: float) -> str:
    """The next number of one digit."""
    exponent = math.floor(math.log10(x))
    return scientific(math.ceil(x / 10.0**exponent) * 10.0**exponent)


def significant(x: float, digits: int = 3) -> str:
    return f"{round(x, digits - 1 - math.floor(math.log10(x))):,.0f}"


def interval(values: list[float], text: Callable = lambda x: significant(x, 2)) -> str:
    """From the least to the largest, or what both are."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"
