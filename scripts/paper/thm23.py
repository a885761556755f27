"""Theorem 2.3: sharing and dropping weights inside layers keeps their norms in balance."""

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from homoflow import ConvNet, Law, SharedMLP, laws
from homoflow.plot import COLOURS

from ._conservation import (
    Data,
    conservation_claim,
    draw_limit,
    exact_flow_of,
    limit_table,
    random_data,
    relative_change,
    seeds_of,
)
from ._progress import Progress
from ._report import Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONVOLUTION, SHARED, ACROSS = "convolution", "shared and sparse", "shared across layers"
ONE_TO_ONE, ONE_TO_TWO = "‖v_a‖² − ‖v_b‖²", "‖v_a‖² − 2‖v_b‖²"


@dataclasses.dataclass(frozen=True)
class Config:
    """Small ReLU networks; patterns of shared and missing weights are random."""

    networks: tuple[str, ...] = (CONVOLUTION, SHARED, ACROSS)
    in_shape: tuple[int, int] = (1, 6)
    channels: tuple[int, ...] = (2, 3)
    sizes: tuple[int, ...] = (6, 8, 5, 2)
    free_weights: tuple[int, ...] = (10, 9, 6)
    missing: float = 0.3
    width: int = 4
    samples: int = 8
    t1: float = 2.0
    rtol: float = 1e-9
    seeds: int = 10


QUICK = Config(networks=(SHARED, ACROSS), rtol=1e-8, seeds=4)


class SharedAcross(eqx.Module):
    """x ↦ a φ(b φ(a x)): the first and the third layer are the same array.

    Not what Theorem 2.3 is about: its weights are shared inside a layer only.
    """

    a: Float[Array, "n n"]
    b: Float[Array, "n n"]

    def __init__(self, n: int, *, key: Array):
        key_a, key_b = jr.split(key)
        self.a, self.b = ((2 / n) ** 0.5 * jr.normal(k, (n, n)) for k in (key_a, key_b))

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        return self.a @ jax.nn.relu(self.b @ jax.nn.relu(self.a @ x))


def run(config: Config = Config(), *, progress: Progress = False) -> Report:
    """The exact flow of every network from every seed."""
    table = measure(config, progress=progress)

    def claim(network: str, quantity: str, text: str):
        of_runs = table["change"][
            (table["network"] == network) & (table["quantity"] == quantity)
        ]
        return conservation_claim(text, of_runs, config.rtol, seeds=config.seeds)

    layers = [
        claim(name, ONE_TO_ONE, f"{name} layers: ‖v_h‖² − ‖v_{{h+1}}‖² is constant")
        for name in config.networks
        if name != ACROSS
    ]
    found = claim(
        ACROSS,
        ONE_TO_TWO,
        f"the same array in two layers: {ONE_TO_TWO}, the law that `homoflow.laws` finds, "
        "is constant (not in the paper)",
    )
    control = claim(
        ACROSS, ONE_TO_ONE, f"the same array in two layers: {ONE_TO_ONE} is constant"
    )
    return Report(
        "thm23",
        "Theorem 2.3: weights shared inside a layer keep the balance of layers",
        "In layers with any pattern of missing and shared weights, convolutions among "
        "them, ‖v_h‖² − ‖v_{h+1}‖² of the free weights is constant along gradient flow.",
        (*layers, dataclasses.replace(found, printed="—")),
        (control,),
        {"runs": table, "limit": limit_table(config.rtol)},
        _choices(config),
    )


def problem(config: Config, network: str, seed: int) -> tuple[Any, Data]:
    """A network of the kind, and data. Patterns depend on no seed: they are compiled."""
    key_model, key_data = jr.split(jr.key(seed))
    if network == CONVOLUTION:
        model: Any = ConvNet(config.in_shape, config.channels, 2, key=key_model)
        shape, outputs = config.in_shape, 2
    elif network == SHARED:
        model = SharedMLP(patterns(config), key=key_model)
        shape, outputs = (config.sizes[0],), config.sizes[-1]
    else:
        model = SharedAcross(config.width, key=key_model)
        shape, outputs = (config.width,), config.width
    return model, random_data(key_data, config.samples, shape, outputs, "squared")


def patterns(config: Config) -> list[np.ndarray]:
    """For each layer the map g_h of the paper: which free weight, or 0 for none."""
    rng = np.random.default_rng(0)
    maps = []
    for n_in, n_out, free in zip(
        config.sizes[:-1], config.sizes[1:], config.free_weights, strict=True
    ):
        index = rng.integers(1, free + 1, size=n_in * n_out)
        index[rng.random(index.size) < config.missing] = 0
        # Every free weight has to be somewhere.
        index[rng.permutation(index.size)[:free]] = np.arange(1, free + 1)
        maps.append(index.reshape(n_out, n_in))
    return maps


def quantities(model: Any) -> dict[str, list[Law]]:
    """What is recorded: of the layers' norms, or of the two arrays' if there are two."""
    if not isinstance(model, SharedAcross):
        return {ONE_TO_ONE: [law for law in laws(model) if law.contraction == "total"]}
    (found,) = laws(model, model.a[0])
    equal = tuple(
        dataclasses.replace(term, coefficient=term.coefficient // abs(term.coefficient))
        for term in found.quadratic_terms
    )
    wrong = dataclasses.replace(found, name="one to one", quadratic_terms=equal)
    return {ONE_TO_TWO: [found], ONE_TO_ONE: [wrong]}


def measure(config: Config, *, progress: Any = False) -> Table:
    """A row for each run and quantity, with its largest change."""
    rows: list[tuple[str, str, int, float]] = []
    for network in config.networks:
        # The search for laws is the same for every seed.
        recorded = quantities(problem(config, network, 0)[0])
        every = [law for group in recorded.values() for law in group]
        for seed in seeds_of(config.seeds, network, progress=progress):
            model, data = problem(config, network, seed)
            run = exact_flow_of(model, data, config.t1, config.rtol, every, "squared")
            for quantity, group in recorded.items():
                change = max(relative_change(run, law.name).max() for law in group)
                rows.append((network, quantity, seed, float(change)))
    names = ("network", "quantity", "seed", "change")
    columns = zip(names, zip(*rows, strict=True), strict=True)
    return {name: np.array(column) for name, column in columns}


def _choices(config: Config) -> tuple[str, ...]:
    convolution = (
        f"Convolutions: 1-d, inputs {config.in_shape}, channels {config.channels}, "
        "kernels of 3, dense output.",
    )
    return (
        *(convolution if CONVOLUTION in config.networks else ()),
        f"Shared and sparse: sizes {'-'.join(map(str, config.sizes))}, with "
        f"{config.free_weights} free weights in random places, {config.missing:.0%} of "
        "the connections missing.",
        f"Shared across layers: f(x) = a φ(b φ(a x)) with {config.width}×{config.width} "
        "arrays.",
        f"ReLU, {config.samples} random samples, squared loss, Kaiming's start, time "
        f"{config.t1:g}.",
    )


def _typeset(quantity: str) -> str:
    """As matplotlib sets it."""
    return re.sub(r"_(\w|\{.*?\})", r"$_\1$", quantity)


def draw(report: Report) -> "Figure":
    """The largest change in every run, by network and quantity."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    table = report.tables["runs"]
    groups = list(
        dict.fromkeys(
            zip(table["network"].tolist(), table["quantity"].tolist(), strict=True)
        )
    )
    rng = np.random.default_rng(0)
    for place, (network, quantity) in enumerate(groups):
        chosen = (table["network"] == network) & (table["quantity"] == quantity)
        x = place + rng.uniform(-0.2, 0.2, chosen.sum())
        wrong = (network, quantity) == (ACROSS, ONE_TO_ONE)
        marker, colour = ("s", COLOURS[1]) if wrong else ("o", COLOURS[0])
        ax.plot(
            x, table["change"][chosen], marker, ms=7, alpha=0.7, color=colour, mew=0
        )
    draw_limit(ax, report.tables["limit"])
    names = [
        f"{network},\n{_typeset(quantity if network == ACROSS else '‖v_h‖² − ‖v_{h+1}‖²')}"
        for network, quantity in groups
    ]
    ax.set_xticks(range(len(groups)), names)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set(yscale="log", xlabel="where weights are shared, and what is measured")
    ax.set_ylabel("largest change in a run, over ‖w‖²")
    ax.set_title("Sharing inside layers keeps the balance; across layers it changes it")
    return figure
