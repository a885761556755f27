"""Every number in README's prose comes from somewhere, or fails here.

Sentences with measured numbers are filled from `tests/data`, whose `measured.json` says
how, on what and when each file was made, or from what other tests assert; those with
defaults and limits from the code. Both must be in README, and no other number but those
of `NAMES`. Docstrings are held to the code too. The statements' table is tested in
`test_paper`.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import stationary
import test_balance
import test_filippov
import test_filippov_inclusion
import test_projection
from benchmark import ratios
from benchmark.report import ERRORS, markdown
from paper._report import overview_table

import homoflow as hf
from homoflow._kinks.filippov import _sliding_field as _field, _step
from homoflow._laws import _completeness as _certificate
from homoflow._methods import (
    _choose_exact as _solver_choice,
    _diffrax_options as _method,
    _exact as _exact_flow,
    _steady_state as _endless_flow,
)
from homoflow._methods.stationary import _dense_hessian as _dense
from homoflow._observe import _sharpness
from homoflow._solvers import _gauss_legendre, _rodas5p as _rosenbrock
from homoflow._solvers.exponential_adams import (
    _jacobian_update as _lessons,
    _solver as _adams,
)

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests/data"

#: Formulas, names, sizes and examples, and one piece of advice: an error estimate "above
#: about 0.1" says that the weights have not converged.
NAMES = (
    "Du, Hu & Lee 2018",
    "NeurIPS 2018",
    "Figure 2",
    "Python 3.11",
    "Apache 2.0",
    "`(101, 30)`",
    "(1-d, 2-d)",
    "a Rosenbrock method of order 5",
    "N(0, I)",
    "n + k + 1",
    "⟨2Aw + b, u⟩",
    "Σ η/(1−μ)",
    "(η/2)∇²L∇L",
    "e^{−2λt}",
    "2m·q(ẇ)",
    "law is 0",
    "Above about 0.1",
    "`OPENBLAS_NUM_THREADS=1`",
)


def stored(name: str) -> Any:
    return json.loads((DATA / name).read_text(encoding="utf-8"))


# How numbers are printed.


def short(x: float, digits: int = 1) -> str:
    """1.52e-4 as 1.5e-4 with two digits, 2e-4 with one."""
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def at_most(x: float) -> str:
    """A bound of one digit."""
    exponent = math.floor(math.log10(x))
    return short(math.ceil(x / 10.0**exponent) * 10.0**exponent)


def rounded(x: float, digits: int = 3) -> str:
    return f"{round(x, digits - 1 - math.floor(math.log10(x))):,.0f}"


def spread(values, text) -> str:
    """From the least to the largest, or what both are."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


# Sentences.


def ledger() -> str:
    costs = {k: 100 * (v - 1) for k, v in stored("ratios.json")["ledger"].items()}
    small = {k: v for k, v in costs.items() if "batches of 100" in k}
    neurons, matrices = (
        max(v for k, v in costs.items() if kind in k and k not in small)
        for kind in ("neuron", "matrix")
    )
    sizes, samples = "-".join(map(str, ratios.SIZES)), f"{ratios.SAMPLES:,}"
    return (
        f"Measured on a {sizes} network, it costs up to {neurons:.0f} % of a run's CPU "
        f"time for laws of neurons with batches of {samples}, {max(small.values()):.0f} % "
        "with batches of 100; laws that are matrices cost matrix products, up to "
        f"{matrices:.0f} % with batches of {samples} and more"
    )


def commands() -> list[str]:
    figures = stored("measured.json")["reproduce"]["figures"]
    seconds = sum(int(line["time"].split()[0]) for line in stored("summary.json"))
    return [
        f"`./scripts/reproduce --quick` takes about {figures['quick_minutes']} minutes",
        f"The times are of one run on two CPU cores, {seconds / 60:.0f} minutes in all; on "
        f"an H200 Figure 2 takes {figures['figure2_seconds_on_h200']} s",
    ]


def exponential_adams() -> str:
    parts = []
    longer = stored("bench.json")["problems"]["a-1000-1000"]
    shorter = stored("bench.json")["problems"]["a-1000-100"]
    for problem in (shorter, longer):
        ours, theirs = (
            [
                run
                for run in problem["runs"]
                if run["method"] == name and run["setting"] in (1e-5, 1e-7, 1e-9)
            ]
            for name in ("homoflow", "Diffrax Tsit5")
        )
        assert all("ExponentialAdams" in run["facts"] for run in ours)
        errors, gradients = (
            listed([text(run[what]) for run in ours])
            for what, text in (("error", short), ("gradients", "{:.0f}".format))
        )
        few = spread([run["gradients"] for run in theirs], lambda n: rounded(n, 2))
        parts.append(
            (f"to t = {problem['t1']:,.0f}, errors of {errors}", gradients, few)
        )
    (first, ours, theirs), (second, more, many) = parts
    return (
        f"On a small network ({shorter['title']}; {shorter['weights']} weights), "
        f"{first} take {ours} gradients (Tsit5: {theirs}); {second} take {more} ({many})."
    )


def times() -> str:
    errors = " / ".join(map(short, ERRORS))
    return f"on one core, at relative errors of the final weights of {errors} ("


def listed(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def to_rest() -> str:
    rows = stored("stationary.json")
    assert {row["network"] for row in rows} == set(stationary.NETWORKS)
    runs, good = (sum(row[what] for row in rows) for what in ("seeds", "good"))
    sizes = [[int(n) for n in name.split("-")] for name in stationary.NETWORKS]
    layers, units = {len(s) - 1 for s in sizes}, {n for s in sizes for n in s}
    return (
        f"From weights of {short(stationary.STD)} "
        f"{'all' if good == runs else good} of {runs} linear networks "
        f"({min(layers)} or {max(layers)} layers of {min(units)} to {max(units)} units; "
        "`python scripts/stationary.py`) end at the global minimum, with ‖∇L‖ ≤ "
        f"{at_most(max(row['largest_gradient'] for row in rows))} and a loss within "
        f"{at_most(max(row['largest_excess'] for row in rows))} of that of"
    )


def large_network() -> list[str]:
    by_device = stored("large_network.json")
    flows = {run["rtol"]: run for run in by_device["NVIDIA H200"]}
    coarse, usual, fine, finest = (flows[r] for r in sorted(flows, reverse=True))
    assert {run["t1"] for run in flows.values()} == {100}
    pairs = ratios.SAMPLES * sum(ratios.SIZES[1:-1])
    gpu, core = (
        sum(run["seconds"] for run in runs) / sum(run["gradients"] for run in runs)
        for runs in (by_device["NVIDIA H200"], by_device["cpu"])
    )

    def end(run):
        return run["to_next"]["100"]

    return [
        f"({pairs:,} pairs, thousands sliding; x and labels from N(0, I); "
        f"`python scripts/large_network.py`) `rtol` {short(usual['rtol'])} takes "
        f"{rounded(usual['gradients'])} gradients to t = 100 and ends "
        f"{short(end(usual), 2)} from {short(fine['rtol'], 2)}, which ends "
        f"{short(end(fine))} from {short(finest['rtol'])} "
        f"({rounded(fine['gradients'])} and {rounded(finest['gradients'])} gradients); "
        f"each takes {1e3 * gpu:.2f} ms on an H200 and {1e3 * core:.0f} ms on a CPU's "
        "core.",
        f"`rtol` {short(coarse['rtol'])} ({rounded(coarse['gradients'], 2)}) is "
        f"{short(coarse['to_next']['35'])} from {short(usual['rtol'])} at t = 35, but "
        f"{short(end(coarse), 2)} at t = 100",
        *midpoint(by_device["midpoint, cpu"]),
        *in_pieces(by_device["midpoint in pieces, cpu"]),
    ]


def midpoint(runs: list[dict]) -> list[str]:
    steps = listed([short(run["step"]) for run in runs])
    at_10, at_35 = (
        listed([short(run["to_flow"][t], 2) for run in runs]) for t in ("10", "35")
    )
    assert {run["rtol"] for run in runs} == {1e-6}
    return [
        f"Midpoint with constant steps of {steps}, which shares no code with it, is "
        f"{at_10} from `rtol` 1e-6 at t = 10, and {at_35} at t = 35",
    ]


def in_pieces(rows: list[dict]) -> list[str]:
    """One piece after the other; those with shorter steps too that part with the first."""
    assert {row["rtol"] for row in rows} == {1e-6}
    pieces, again = {}, {}
    for row in sorted(rows, key=lambda row: (row["from"], -row["step"])):
        (end, far), start = *row["to_flow"].items(), row["from"]
        if start in pieces:
            again.setdefault(start, []).append((row["step"], far))
        else:
            pieces[start] = row["step"], far, float(end)
    steps, away, ends = zip(*pieces.values(), strict=True)
    assert list(pieces) == [35, *ends[:-1]]
    early, late = sorted(set(steps))
    later = min(start for start, (step, *_) in pieces.items() if step == late)
    assert list(steps) == sorted(steps)
    rest = [far for start, (_, far, _) in pieces.items() if start not in again]
    # The longest of the shorter steps with which it goes the flow's way.
    held = [next(at for at in shorter if at[1] < 1e-5) for shorter in again.values()]
    return [
        "From t = 35 on single neurons that wake late",
        f"with steps of {short(early)}, from t = {later:.0f} on {short(late)}, it ends "
        f"within {at_most(max(rest))} of the flow in {len(rest)} of {len(away)} pieces to "
        f"t = {ends[-1]:.0f}.",
        f"In those from {listed([f't = {start:.0f}' for start in again])}, where it is "
        f"{listed([short(pieces[start][1], 2) for start in again])} away, one neuron goes "
        f"another way until steps are {listed([short(step, 2) for step, _ in held])}: then "
        f"{listed([short(far, 2) for _, far in held])}.",
    ]


def asserted() -> list[str]:
    """What tests of the suite compute, and hold to the very same numbers."""
    exact, networks = test_filippov, test_balance
    close = short(networks.CLOSE)
    return [
        "On a 20-30-30-3 ReLU network with 100 points, to t = 60, the final weights differ "
        f"by less than {short(exact.ERROR)} (relative) from an independent integration, "
        f"after fewer than {exact.GRADIENTS:,} gradient evaluations; no law drifts by more "
        f"than {short(exact.DRIFT)}.",
        "‖dw/dt‖ is the distance from 0 to the convex hull of the gradients around w, to "
        f"{short(test_filippov_inclusion.CLOSE)}",
        f"has its laws to {short(test_projection.DRIFT)}·‖w‖² at every tolerance",
        f"On {networks.NETWORKS} random networks",
        f"laws come out below {close}·‖w‖² and outputs agree to {close}.",
    ]


def constants() -> list[str]:
    pairs = f"{_method.MANY_PAIRS:,}"
    assert _solver_choice.MOST_PAIRS == _method.MANY_PAIRS
    smooth, adams = (
        {dtype: short(rtol) for dtype, rtol in rtols.items()}
        for rtols in (_method.SMOOTH_RTOL, _adams.DEFAULT_RTOL)
    )
    products, kinked = f"{_method.MANY_PRODUCTS:,}", short(_method.KINKED_RTOL)
    return [
        f"`rtol` ≤ {short(_solver_choice.LOOSEST_RTOL)}, ≤ {pairs} (sample, kink) pairs",
        f"Beyond {pairs} (sample, kink) pairs",
        f"is a multistep method, of order 1 to {_adams.HIGHEST_ORDER},",
        f"an explicit solver has taken {_method.MOST_EXPLICIT_STEPS:,} steps and is not",
        f"is passed by a straight step of {short(_step.FORCED_STEP)}·‖w‖",
        f"Where more than {_field.MAX_ON_ONE_THREAD} pairs are at their kinks",
        f"up to {_dense.MOST_WEIGHTS:,} weights the whole spectrum is computed",
        f"`hf.flow(model, data, t1, rtol={short(_exact_flow.EXACT_RTOL)})`",
        f"| smooth | `rtol={smooth['float64']}`, `diffrax.Dopri8` "
        f"| `rtol={smooth['float32']}`, `diffrax.Tsit5` |",
        f"| smooth, samples × weights ≥ {products} "
        f"| `rtol={adams['float64']}`, `ExponentialAdams` "
        f"| `rtol={adams['float32']}`, `ExponentialAdams` |",
        f"| with kinks | `rtol={kinked}`, `diffrax.Heun` "
        f"| `rtol={kinked}`, `diffrax.Heun` |",
        f"| beyond {pairs} (sample, kink) pairs | `rtol={kinked}`, shares of a step "
        f"| `rtol={kinked}`, shares of a step |",
    ]


def sentences() -> list[str]:
    return [
        ledger(), *commands(), exponential_adams(), times(), to_rest(), *large_network(),
        *asserted(), *constants(),
    ]  # fmt: skip


# README.


@pytest.fixture(scope="module")
def prose() -> str:
    """Without blocks of code, tables of measurements, and where links lead."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", " ", text, flags=re.DOTALL | re.MULTILINE)
    for table in (
        overview_table(stored("summary.json")),
        markdown(stored("bench.json")),
    ):
        assert table in text
        text = text.replace(table, " ")
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())


def left_over(text: str) -> list[str]:
    """Numbers that nothing accounts for, with what is around them."""
    for known in (*sentences(), *NAMES):
        text = re.sub(rf"(?<!\w){re.escape(known)}(?!\w)", "…", text)
    return re.findall(r".{0,30}(?<![\w\[])\d.{0,30}", text)


def test_readme_says_what_was_measured_and_what_the_code_has(prose):
    missing = [known for known in (*sentences(), *NAMES) if known not in prose]
    assert not missing, "README should say:\n" + "\n".join(missing)


def test_no_other_number_is_in_readme(prose):
    assert left_over(prose) == []


def test_a_number_from_nowhere_is_found(prose):
    assert len(left_over(f"{prose} It takes 7 s.")) == 1
    another = prose.replace(f"Beyond {_method.MANY_PAIRS:,} (", "Beyond 7 (")
    assert len(left_over(another)) == 1


# Docstrings.

SMOOTH, ADAMS = _method.SMOOTH_RTOL, _adams.DEFAULT_RTOL
LIMITS = {
    "flow": (
        f"An `rtol` of {short(_solver_choice.LOOSEST_RTOL)} or less gets",
        f"at most {_solver_choice.MOST_PAIRS:,} pairs of a sample and a kink",
        f"Default `rtol`: {short(SMOOTH['float64'])} for smooth models in float64",
        f"{short(SMOOTH['float32'])} in float32",
        f"({short(ADAMS['float64'])} and {short(ADAMS['float32'])} with",
        f"{short(_method.KINKED_RTOL)} for models with kinks",
        f"times weights are {_method.MANY_PRODUCTS:,} or more",
        f"at an `rtol` of {short(_method.LOOSE_RTOL)} and more) or `Dopri8`",
        f"Where that has taken {_method.MOST_EXPLICIT_STEPS:,} steps",
        f"beyond {_method.MANY_PAIRS:,} pairs of a sample and a kink",
        f"at an `rtol` of {short(_exact_flow.EXACT_RTOL)} if none is given",
        f"initial values to {short(test_projection.DRIFT)}·‖w‖² (float64)",
        f"solve again at {_method.COARSER_RTOL:g} times the tolerance",
        f"at {_method.COARSER_RTOL**2:g} times the tolerance, and counts",
        f"Up to {_endless_flow._DENSE_WEIGHTS} weights the default solver is",
        f"`Rodas5P` at an `rtol` of {short(_endless_flow._DENSE_RTOL)}",
        f"beyond {_dense.MOST_WEIGHTS:,}, extreme eigenvalues",
        f"{short(_dense._ROUNDING)} of the largest",
        f"passed by a straight step of {short(_step.FORCED_STEP)}·‖w‖",
    ),
    "Filippov": (
        f"By default {_exact_flow.FIRST_SLOTS},",
        f"up to {_exact_flow.MOST_SLOTS}.",
        f"Where more than {_field.MAX_ON_ONE_THREAD} pairs are at their kinks",
    ),
    "ExponentialAdams": (
        f"order (1 to {_adams.HIGHEST_ORDER})",
        f"Default: {_lessons.MOST_DIRECTIONS}, less",
    ),
    "Rodas5P": (f"more than {_rosenbrock.MOST_WEIGHTS:,} numbers",),
    "GaussLegendre": (f"more than {_gauss_legendre.MOST_UNKNOWNS:,} unknowns",),
    "sharpness": (f"until ‖Hv − λv‖ ≤ {short(_sharpness.RESIDUAL)}·‖H‖",),
    "certify": (f"more than {_certificate._MOST_PARAMETERS} parameters",),
}


@pytest.mark.parametrize("name", LIMITS)
def test_docstrings_say_what_the_code_has(name):
    text = " ".join(getattr(hf, name).__doc__.split())
    for said in LIMITS[name]:
        assert said in text
