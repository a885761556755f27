"""The exact flow where kinks coincide, against midpoint with ever more steps.

Repeated, collinear and antipodal inputs, few points on a line: many pairs reach their
kinks together there, and slopes are tied. Two-dimensional inputs throughout, so that
few networks are compiled; a constant third input is a bias.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from oracles import midpoint
from problems import flat

import homoflow as hf

T1 = 20.0
STEPS = 2_000 * 2 ** np.arange(6)
_RNG = np.random.default_rng(0)
_POINTS, _LABELS = _RNG.standard_normal((4, 2)), _RNG.standard_normal((8, 1))
_CORNERS = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
_MULTIPLES = np.array([[2.5], [2.5], [-0.7], [-0.7]])
_LINE = np.linspace(-1.7, 2, 8)[:, None]
DATA = {
    "xor": (np.tile(_CORNERS, (2, 1)), np.tile([[1.0], [-1], [-1], [1]], (2, 1))),
    "repeated": (np.concatenate([_POINTS, _POINTS]), _LABELS),
    "collinear": (np.concatenate([_POINTS, _MULTIPLES * _POINTS]), _LABELS),
    "antipodal": (np.concatenate([_POINTS, -_POINTS]), _LABELS),
    "line": (np.concatenate([_LINE, 0 * _LINE], 1), np.sin(3 * _LINE) + _LABELS),
}  # fmt: skip


class Case(NamedTuple):
    model: Any
    data: tuple[Any, Any]


def shallow(name: str, seed: int, *, bias: bool) -> Case:
    x, y = DATA[name]
    constant = np.full((len(x), 1), float(bias))
    model = hf.MLP((3, 5, 1), key=jr.key(seed))
    return Case(model, (jnp.asarray(np.concatenate([x, constant], 1)), jnp.asarray(y)))


def deep(name: str, seed: int, *, bias: bool) -> Case:
    """Two hidden layers of width 3: samples lose a whole layer."""
    model = hf.MLP((2, 3, 3, 1), use_bias=bias, key=jr.key(seed))
    if bias:
        where = lambda m: [layer.bias for layer in m.layers]  # noqa: E731
        drawn = [
            0.3 * jr.normal(jr.key(seed + i), b.shape)
            for i, b in enumerate(where(model))
        ]
        model = eqx.tree_at(where, model, drawn)
    x, y = DATA[name]
    return Case(model, (jnp.asarray(x), jnp.asarray(y)))


def exactly(case: Case, **options):
    options = {"ts": np.linspace(0, T1, 5), "laws": (), **options}
    return hf.flow(*case, T1, solver=hf.Filippov(max_active=40), **options)


@eqx.filter_jit
def _midpoints(models, data, steps):
    return eqx.filter_vmap(lambda m, d: midpoint(m, d, T1, steps))(models, data)


def midpoints(cases: list[Case]) -> np.ndarray:
    """Final weights, of shape (steps, cases, weights)."""
    stack = lambda *a: jnp.stack(a) if eqx.is_array(a[0]) else a[0]  # noqa: E731
    models, data = (jax.tree.map(stack, *side) for side in zip(*cases, strict=True))
    return np.stack([_midpoints(models, data, jnp.asarray(n)) for n in STEPS])


def distances(flow, fixed: np.ndarray) -> np.ndarray:
    """Relative distance of each row of `fixed` to the flow's final weights."""
    difference = np.linalg.norm(fixed - flat(flow.model), axis=-1)
    return difference / np.linalg.norm(fixed[-1])


def order(errors: np.ndarray) -> float:
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


FAMILIES = {
    "shallow": [shallow(n, 1, bias=b) for n in DATA for b in (False, True)],
    "deep": [
        deep(n, s, bias=False) for n, s in zip(DATA, (1, 1, 2, 1, 5), strict=True)
    ],
    "deep with biases": [deep(n, 1, bias=True) for n in DATA],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_steps_converge_to_the_exact_flow(family):
    cases = FAMILIES[family]
    fixed = midpoints(cases)
    entries = 0
    for i, case in enumerate(cases):
        flow = exactly(case)
        errors = distances(flow, fixed[:, i])
        assert order(errors) > 0.7
        assert errors[-1] < 4e-5
        entries += int(flow.stats["entries"])
    assert entries > 10


def test_midpoint_tells_slightly_different_labels_apart():
    """The negative control: the distance to another problem's flow does not fall."""
    case = shallow("antipodal", 1, bias=True)
    x, y = case.data
    fixed = midpoints([Case(case.model, (x, y + 1e-3))])[:, 0]
    errors = distances(exactly(case), fixed)
    assert order(errors) < 0.1
    assert errors[-1] > 1e-4


def with_neuron(case: Case, incoming, outgoing: float) -> Case:
    """`case` with the weights of its first neuron replaced."""
    where = lambda m: [layer.weight for layer in m.layers]  # noqa: E731
    first, second = where(case.model)
    weights = [first.at[0].set(jnp.asarray(incoming)), second.at[0, 0].set(outgoing)]
    return Case(eqx.tree_at(where, case.model, weights), case.data)


@pytest.mark.parametrize(
    "incoming", [[0.1, 0.2, -9.0], [0.0, 0.0, 0.0]], ids=["off everywhere", "zero"]
)
def test_a_dead_neuron_stays_as_it_is(incoming):
    """Negative on all samples; or zero, with no weight on its output either."""
    outgoing = 0.7 if any(incoming) else 0.0
    case = with_neuron(shallow("xor", 1, bias=True), incoming, outgoing)
    flow = exactly(case)
    first, second = (np.asarray(layer.weight) for layer in flow.model.layers)
    assert np.all(first[0] == incoming)
    assert second[0, 0] == outgoing
    assert order(distances(flow, midpoints([case])[:, 0])) > 0.7


def test_zero_weights_stay_zero():
    for case in (shallow("xor", 1, bias=True), deep("xor", 1, bias=False)):
        zero = jax.tree.map(lambda a: 0 * a if eqx.is_array(a) else a, case.model)
        flow = exactly(Case(zero, case.data))
        assert np.all(flat(flow.model) == 0)
        assert flow.result == hf.RESULTS.successful


def test_zero_incoming_weights():
    """A neuron may leave 0 in several directions: one of them is taken, and it is told."""
    case = with_neuron(shallow("antipodal", 1, bias=True), [0.0, 0.0, 0.0], 0.7)
    beside = 1e-9 * np.random.default_rng(0).standard_normal((6, 3))
    fixed = midpoints([with_neuron(case, incoming, 0.7) for incoming in beside])
    flow = exactly(case)
    ends = distances(flow, fixed[-1])
    assert np.min(ends) < 4e-5
    assert np.max(ends) > 1e-2
    assert flow.stats["num_nonunique_pairs"] > 0


def random_net(sizes, seed, samples, key) -> Case:
    """Inputs and labels from the normal distribution, no biases."""
    x = jr.normal(jr.key(6), (samples, sizes[0]))
    return Case(
        hf.MLP(sizes, key=jr.key(seed)),
        (x, jr.normal(jr.key(key), (samples, sizes[-1]))),
    )


CORNERS = {
    "zero weights": shallow("line", 2, bias=True),
    "nested": deep("xor", 5, bias=True),
    "below tied sliders": deep("antipodal", 4, bias=True),
    "a layer closes above a slider": random_net((4, 5, 5, 2), 0, 14, 70),
}


@pytest.mark.parametrize("name", CORNERS)
def test_where_the_flow_may_go_several_ways_it_is_told(name):
    """Dependent kinks meet, and midpoint goes elsewhere at some numbers of steps."""
    case = CORNERS[name]
    flow = exactly(case)
    assert np.max(distances(flow, midpoints([case])[:, 0])) > 5e-3
    assert flow.stats["num_nonunique_pairs"] > 0
    assert flow.stats["first_nonunique_time"] < T1


def test_a_sample_that_loses_a_layer_does_not_chatter():
    """Two sliders below a unit that would open for one and close for the other."""
    case = random_net((3, 3, 3, 1), 0, 12, 70)
    flow = exactly(case)
    assert flow.stats["entries"] < 50
    errors = distances(flow, midpoints([case])[:, 0])
    assert order(errors) > 0.7
    assert errors[-1] < errors[0] / 50
