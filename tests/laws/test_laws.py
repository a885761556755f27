"""The conserved quantities: their values, the exact ledger of a step, what has none."""

import dataclasses
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.tree_util import GetAttrKey, SequenceKey
from problems import Blank, redrawn

import homoflow as hf
from homoflow._laws import relative_violation
from homoflow._laws._law import Term
from homoflow._problem._losses import Risk

KEY: dict[str, Any] = {"key": jax.random.key(0), "init": Blank()}
SAMPLES, OUTPUTS = 5, 3


# The paper's formulas in plain numpy -------------------------------------------------


def array(leaf):
    return np.asarray(leaf, np.float64)


def outgoing(layer, units):
    """One row for each unit: the weights (and bias) that lead into it."""
    if isinstance(layer, hf.SharedLinear):
        rows = array(layer.v)[None]
    else:
        rows = array(layer.weight).reshape(units, -1)
    if layer.bias is None:
        return rows
    return np.concatenate([rows, array(layer.bias).reshape(len(rows), -1)], axis=1)


def incoming(layer, units):
    """One row for each unit below: the weights that lead out of it."""
    if isinstance(layer, hf.SharedLinear):
        return array(layer.v)[None]
    weight = array(layer.weight)
    return np.stack([block.ravel() for block in np.split(weight, units, axis=1)])


def layer_laws(model, h, kind, *, degree=1, is_identity=False):
    """Theorems 2.1–2.3 between layers h and h + 1, counted from 1."""
    lower, upper = model.layers[h - 1 : h + 1]
    units = None if kind is None else len(lower.weight)
    low, up = outgoing(lower, units), incoming(upper, units)
    by_unit = (low**2).sum(axis=1) - degree * (up**2).sum(axis=1)
    values = {f"layers[{h}]": by_unit.sum()}
    if kind is not None:
        values[f"{kind}[{h}]"] = by_unit
    if is_identity:
        values[f"matrix[{h}]"] = low @ low.T - up @ up.T
    return values


def factorization_laws(model):
    u, v = array(model.U), array(model.V)
    matrix = u.T @ u - v.T @ v
    return {
        "neurons[1]": np.diag(matrix),
        "layers[1]": np.trace(matrix),
        "matrix[1]": matrix,
    }


class Family:
    """A model, and the numpy formulas of all its laws."""

    def __init__(self, model, *interfaces, x_shape=(4,)):
        self.model = redrawn(model, std=0.6)
        self.interfaces = interfaces
        self.x_shape = x_shape

    def laws(self, model):
        values = {}
        for h, how in enumerate(self.interfaces, 1):
            values |= layer_laws(model, h, **how)
        return values


class FactorizationFamily(Family):
    def laws(self, model):
        return factorization_laws(model)


def mlp(activation, **keywords):
    return hf.MLP((4, 5, 6, OUTPUTS), activation=activation, **keywords, **KEY)


def conv(in_shape, channels=(2, 3), **keywords):
    return hf.ConvNet(in_shape, channels, OUTPUTS, **keywords, **KEY)


NEURONS = {"kind": "neurons"}
CHANNELS = {"kind": "channels"}
SHARED = {"kind": None}
LINEAR = {"is_identity": True}
MAPS = [
    [[1, 2, 0, 3], [0, 1, 2, 4], [4, 0, 1, 2]],
    [[1, 1, 2], [0, 3, 1]],
    [[1, 2], [2, 3], [3, 1]],
]

FAMILIES = {
    "relu": lambda: Family(mlp("relu"), NEURONS, NEURONS),
    "relu, bias": lambda: Family(mlp("relu", use_bias=True), NEURONS, NEURONS),
    "leaky": lambda: Family(mlp(hf.LeakyReLU(0.2)), NEURONS, NEURONS),
    "abs": lambda: Family(mlp("abs"), NEURONS, NEURONS),
    "linear": lambda: Family(mlp("linear"), NEURONS | LINEAR, NEURONS | LINEAR),
    "linear, bias": lambda: Family(
        mlp("linear", use_bias=True), NEURONS | LINEAR, NEURONS | LINEAR
    ),
    "square": lambda: Family(
        mlp(hf.Power(2)), NEURONS | {"degree": 2}, NEURONS | {"degree": 2}
    ),
    "mixed, bias": lambda: Family(
        mlp([hf.ReLUPower(3), "linear"], use_bias=True),
        NEURONS | {"degree": 3},
        NEURONS | LINEAR,
    ),
    "one hidden layer": lambda: Family(
        hf.MLP((4, 5, OUTPUTS), activation="leaky_relu", **KEY), NEURONS
    ),
    "conv 1-d": lambda: Family(
        conv((1, 7), stride=2, padding=1), CHANNELS, CHANNELS, x_shape=(1, 7)
    ),
    "conv 2-d, bias, dense": lambda: Family(
        conv((2, 5, 4), kernel_size=(3, 2), padding=(1, 0), hidden=(4,), use_bias=True),
        CHANNELS,
        CHANNELS,
        NEURONS,
        x_shape=(2, 5, 4),
    ),
    "conv linear, square": lambda: Family(
        conv((2, 6), kernel_size=2, activation=["linear", hf.Power(2)]),
        CHANNELS | LINEAR,
        CHANNELS | {"degree": 2},
        x_shape=(2, 6),
    ),
    "conv linear into dense": lambda: Family(
        conv((2, 6), (3,), activation="linear", use_bias=True),
        CHANNELS | LINEAR,
        x_shape=(2, 6),
    ),
    "shared": lambda: Family(hf.SharedMLP(MAPS, **KEY), SHARED, SHARED),
    "shared, bias, square": lambda: Family(
        hf.SharedMLP(MAPS, use_bias=True, activation=["linear", hf.Power(2)], **KEY),
        SHARED,
        SHARED | {"degree": 2},
    ),
    "factorization": lambda: FactorizationFamily(
        hf.MatrixFactorization(OUTPUTS, 4, 2, key=KEY["key"])
    ),
}
LOSSES = {
    "squared": (hf.SquaredLoss(), lambda z: z),
    "logistic": (hf.LogisticLoss(), np.sign),
    "cross-entropy": (hf.SoftmaxCrossEntropy(), lambda z: z.argmax(axis=1)),
}


@functools.cache
def family_of(name):
    return FAMILIES[name]()


def draws(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@functools.cache
def gradients_of(name):
    """The gradient of each loss's risk, by JAX, in one compilation."""
    family = family_of(name)
    x = jnp.asarray(draws((SAMPLES, *family.x_shape)))
    targets = draws((SAMPLES, OUTPUTS), seed=1)

    @eqx.filter_jit
    def gradients(model):
        return {
            name: eqx.filter_grad(Risk(loss))(model, (x, jnp.asarray(of(targets))))
            for name, (loss, of) in LOSSES.items()
        }

    return gradients(family.model)


def gradient_of(objective, model, data):
    return eqx.filter_jit(eqx.filter_grad(objective))(model, data)


def stepped(model, update, size=1.0):
    return eqx.apply_updates(model, jax.tree.map(lambda u: size * u, update))


def norm_squared(tree):
    return sum(
        (array(a) ** 2).sum() for a in jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    )


every_family = pytest.mark.parametrize("name", FAMILIES)
every_loss = pytest.mark.parametrize("loss", LOSSES)


@every_family
def test_values_are_the_papers_formulas(name):
    family = family_of(name)
    laws = hf.laws(family.model)
    expected = family.laws(family.model)
    assert {law.name for law in laws} == set(expected)
    assert laws.note == ""
    for law in laws:
        value = law.value(family.model)
        assert value.dtype == jnp.float64
        assert value.shape == expected[law.name].shape
        np.testing.assert_allclose(value, expected[law.name], rtol=0, atol=1e-13)


@every_family
@every_loss
def test_a_gradient_step_adds_exactly_eta_squared_q(name, loss):
    """D⁺ = D + η²q(g), with D and q in numpy, for a step as long as the weights."""
    family, gradient = family_of(name), gradients_of(name)[loss]
    size = norm_squared(family.model)
    eta = np.sqrt(size / norm_squared(gradient))
    before, added = family.laws(family.model), family.laws(gradient)
    after = family.laws(stepped(family.model, gradient, -eta))
    laws = hf.laws(family.model)
    for law_name, value in after.items():
        change = eta**2 * added[law_name]
        assert np.abs(change).max() > 1e6 * 1e-12 * size
        identity = before[law_name] + change
        np.testing.assert_allclose(value, identity, rtol=0, atol=1e-12 * size)
        ours = eta**2 * np.asarray(laws[law_name].quadratic(gradient))
        np.testing.assert_allclose(ours, change, rtol=0, atol=1e-12 * size)


@every_family
@every_loss
def test_laws_are_orthogonal_to_every_gradient(name, loss):
    family, gradient = family_of(name), gradients_of(name)[loss]
    laws = hf.laws(family.model, loss=LOSSES[loss][0])
    assert float(relative_violation(laws.items, family.model, gradient).max()) < 1e-14


@every_family
def test_any_update_has_an_exact_account(name):
    model = family_of(name).model
    update = redrawn(model, seed=5)
    for law in hf.laws(model, loss=hf.SoftmaxCrossEntropy()):
        account = (
            law.value(model)
            + 2 * law.bilinear(model, update)
            + law.linear(update)
            + law.quadratic(update)
        )
        after = law.value(stepped(model, update))
        np.testing.assert_allclose(after, account, rtol=0, atol=1e-12)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    layers=st.lists(
        st.tuples(
            st.integers(1, 4),
            st.sampled_from(["relu", "linear", "abs", "leaky_relu", hf.ReLUPower(2)]),
        ),
        min_size=1,
        max_size=4,
    ),
    use_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_identity_holds_for_any_architecture(layers, use_bias, seed):
    widths, activations = zip(*layers, strict=True)
    degrees = [2 if isinstance(a, hf.ReLUPower) else 1 for a in activations]
    model = redrawn(
        hf.MLP((3, *widths, 2), activation=activations, use_bias=use_bias, **KEY), seed
    )
    data = (jnp.asarray(draws((4, 3), seed)), jnp.asarray(draws((4, 2), seed + 1)))
    gradient = gradient_of(Risk(hf.SquaredLoss()), model, data)
    laws, stepped_model = hf.laws(model), stepped(model, gradient, -0.1)
    scale = norm_squared(model) + 0.01 * norm_squared(gradient)
    for h, degree in enumerate(degrees, 1):
        before, after, added = (
            layer_laws(m, h, "neurons", degree=degree)
            for m in (model, stepped_model, gradient)
        )
        for name in before:
            identity = before[name] + 0.01 * added[name]
            np.testing.assert_allclose(after[name], identity, atol=1e-12 * scale)
            value = laws[name].value(stepped_model)
            np.testing.assert_allclose(value, identity, atol=1e-12 * scale)


# What is not a law ------------------------------------------------------------------


def weight(h):
    return (GetAttrKey("layers"), SequenceKey(h - 1), GetAttrKey("weight"))


def neuron_law(lower, upper, coefficient=-1):
    """‖W_lower[i,:]‖² + coefficient·‖W_upper[:,i]‖², whether it is a law or not."""
    terms = (Term(weight(lower), 1), Term(weight(upper), coefficient, axis=1))
    return hf.Law("by hand", "", "units", terms)


def violation(law, model, objective=None, data=None):
    """Relative to ‖w‖‖g‖, at most 1: rounding for a law, of order 1 for anything else."""
    if objective is None:
        x = jnp.asarray(draws((SAMPLES, 4)))
        objective, data = Risk(hf.SquaredLoss()), (x, x[:, :3])
    gradient = gradient_of(objective, model, data)
    return float(relative_violation((law,), model, gradient)[0])


def square_mlp(activation="relu"):
    return redrawn(hf.MLP((4, 4, 4, 3), activation=activation, **KEY))


def test_a_law_made_by_hand_is_that_of_the_library():
    model = square_mlp()
    value = hf.laws(model)["neurons[2]"].value(model)
    np.testing.assert_array_equal(neuron_law(2, 3).value(model), value)
    assert violation(neuron_law(2, 3), model) < 1e-15


@pytest.mark.parametrize("size", [1e-250, 1e-160, 1e200])
def test_a_false_law_is_seen_in_gradients_of_any_size(size):
    """The violation is relative to the gradient: it does not depend on its length."""
    model, law = square_mlp(jnp.tanh), neuron_law(1, 2)
    x = jnp.asarray(draws((SAMPLES, 4)))
    gradient = gradient_of(Risk(hf.SquaredLoss()), model, (x, x[:, :3]))
    scaled = jax.tree.map(lambda g: size * g, gradient)
    usual, found = (
        float(relative_violation((law,), model, g)[0]) for g in (gradient, scaled)
    )
    assert usual > 1e-3
    np.testing.assert_allclose(found, usual, rtol=1e-12)


@pytest.mark.parametrize(
    ("law", "activation"),
    [
        (neuron_law(1, 2), jnp.tanh),
        (neuron_law(1, 2), jax.nn.gelu),
        (neuron_law(1, 2), hf.Power(2)),
        (neuron_law(1, 2, coefficient=-2), "relu"),
        (neuron_law(1, 2, coefficient=1), "relu"),
        (neuron_law(1, 3), "relu"),
        (neuron_law(2, 1), "relu"),
    ],
    ids=["tanh", "gelu", "degree", "coefficient", "sign", "skipped layer", "reversed"],
)
def test_what_is_no_law_is_clearly_not_conserved(law, activation):
    assert violation(law, square_mlp(activation)) > 1e-3


def test_the_matrix_law_needs_a_linear_activation():
    law = hf.laws(square_mlp("linear"))["matrix[1]"]
    assert violation(law, square_mlp("linear")) < 1e-15
    assert violation(law, square_mlp("relu")) > 1e-3


class Recurrent(eqx.Module):
    """W relu(W x): one weight in two layers, which Theorem 2.3 does not allow."""

    w: jax.Array

    def __call__(self, x):
        return self.w @ jax.nn.relu(self.w @ x)


def test_sharing_across_layers_breaks_the_law_that_separate_layers_have():
    w = jnp.asarray(draws((4, 4)))
    path = (GetAttrKey("w"),)
    law = hf.Law("tied", "", "units", (Term(path, 1), Term(path, -1, axis=1)))
    x = jnp.asarray(draws((SAMPLES, 4), seed=2))
    risk, data = Risk(hf.SquaredLoss()), (x, x[::-1])
    assert violation(law, Recurrent(w), risk, data) > 1e-3
    untied = eqx.tree_at(
        lambda m: [layer.weight for layer in m.layers],
        hf.MLP((4, 4, 4), **KEY),
        [w, w],
    )
    assert violation(neuron_law(1, 2), untied, risk, data) < 1e-15


def test_regularized_factorization_conserves_nothing():
    model = redrawn(hf.MatrixFactorization(4, 3, 2, key=KEY["key"]))
    target = jnp.asarray(draws((4, 3)))
    for law in hf.laws(model):
        plain = violation(law, model, hf.factorization_objective, target)
        both = violation(law, model, hf.regularized_factorization_objective, target)
        assert plain < 1e-15
        assert both > 1e-3


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.gelu, jax.nn.sigmoid])
def test_activations_that_are_not_homogeneous_have_no_law_and_a_reason(activation):
    laws = hf.laws(hf.MLP((3, 4, 2), activation=activation, **KEY))
    assert len(laws) == 0
    assert "not positively homogeneous" in laws.note


def test_a_layer_without_a_law_leaves_those_of_the_others():
    model = hf.MLP((3, 4, 4, 4, 2), activation=["relu", jnp.tanh, "abs"], **KEY)
    laws = hf.laws(model)
    names = {law.name for law in laws}
    assert names == {"neurons[1]", "layers[1]", "neurons[3]", "layers[3]"}
    assert "hidden layer 2" in laws.note


def test_a_single_layer_and_a_foreign_model_have_no_law_and_a_reason():
    for model, reason in (
        (hf.MLP((3, 2), **KEY), "single layer"),
        (Recurrent(jnp.ones((2, 2))), "Recurrent are not known"),
    ):
        laws = hf.laws(model)
        assert len(laws) == 0
        assert reason in laws.note


# The loss, frozen arrays, other objectives -------------------------------------------


@pytest.mark.parametrize("use_bias", [False, True])
def test_softmax_conserves_the_sums_over_outputs(use_bias):
    model = redrawn(hf.MLP((4, 5, 3), use_bias=use_bias, **KEY))
    linear = [
        law
        for law in hf.laws(model, loss=hf.SoftmaxCrossEntropy())
        if not law.quadratic_terms
    ]
    last = model.layers[-1]
    expected = {"output_sums[2]": array(last.weight).sum(axis=0)}
    if use_bias:
        expected["output_bias_sum[2]"] = array(last.bias).sum()
    assert {law.name for law in linear} == set(expected)
    x = jnp.asarray(draws((SAMPLES, 4)))
    targets = {
        "softmax": (hf.SoftmaxCrossEntropy(), jnp.array([0, 2, 1, 2, 2])),
        "squared": (hf.SquaredLoss(), x[:, :3]),
    }
    for law in linear:
        np.testing.assert_allclose(law.value(model), expected[law.name], atol=1e-15)
        off = {
            name: violation(law, model, Risk(loss), (x, y))
            for name, (loss, y) in targets.items()
        }
        assert off["softmax"] < 1e-15
        assert off["squared"] > 1e-3


@pytest.mark.parametrize("loss", [hf.SquaredLoss(), hf.LogisticLoss(), jnp.subtract])
def test_other_losses_have_no_output_sums(loss):
    laws = hf.laws(hf.MLP((4, 5, 3), **KEY), loss=loss)
    assert {law.name for law in laws} == {"neurons[1]", "layers[1]"}


def test_output_sums_of_a_convolutional_network_are_those_of_its_dense_layer():
    model = redrawn(hf.ConvNet((1, 5), (2,), 3, **KEY))
    law = hf.laws(model, loss=hf.SoftmaxCrossEntropy())["output_sums[2]"]
    expected = array(model.layers[-1].weight).sum(axis=0)
    np.testing.assert_allclose(law.value(model), expected, atol=1e-15)


@pytest.mark.parametrize(
    ("frozen", "left"),
    [
        (lambda m: m.layers[0].weight, {"neurons[2]", "layers[2]", "output"}),
        (lambda m: m.layers[0].bias, {"neurons[2]", "layers[2]", "output"}),
        (lambda m: m.layers[1].weight, {"output"}),
        (lambda m: m.layers[1].bias, {"neurons[1]", "layers[1]", "output"}),
        (lambda m: m.layers[2].weight, {"neurons[1]", "layers[1]"}),
        (lambda m: m.layers[2].bias, {"neurons[1]", "layers[1]", "neurons[2]",
                                      "layers[2]", "output"}),
    ],
)  # fmt: skip
def test_freezing_an_array_removes_exactly_its_laws(frozen, left):
    model = hf.MLP((4, 5, 5, 3), use_bias=True, **KEY)
    mask = jax.tree.map(eqx.is_inexact_array, model)
    mask = eqx.tree_at(frozen, mask, replace=False)
    laws = hf.laws(model, loss=hf.SoftmaxCrossEntropy(), trainable=mask)
    names = {law.name for law in laws if not law.name.startswith("output")}
    assert names == left - {"output"}
    assert any(law.name == "output_sums[3]" for law in laws) == ("output" in left)
    assert "frozen array" in laws.note


def test_stop_gradient_on_a_weight_breaks_its_law():
    """Why a frozen array's law has to go: it is not conserved."""
    model = square_mlp()

    def objective(model, data):
        frozen = jax.lax.stop_gradient(model.layers[0])
        model = eqx.tree_at(lambda m: m.layers[0], model, frozen)
        return Risk(hf.SquaredLoss())(model, data)

    x = jnp.asarray(draws((SAMPLES, 4)))
    data = (x, x[:, :3])
    laws = hf.laws(model, data, objective=objective)
    assert {law.name for law in laws} == {"neurons[2]", "layers[2]"}
    assert violation(neuron_law(1, 2), model, objective, data) > 1e-3


def sum_of_squares(*layers):
    """The squared risk plus weight decay on some layers, as an objective."""

    def objective(model, data):
        decay = [jnp.sum(model.layers[h].weight ** 2) for h in layers]
        return Risk(hf.SquaredLoss())(model, data) + 0.3 * sum(decay, jnp.zeros(()))

    return objective


@pytest.mark.parametrize(
    ("decayed", "left"),
    [
        ((), {"neurons[1]", "layers[1]", "neurons[2]", "layers[2]"}),
        ((2,), {"neurons[1]", "layers[1]"}),
        ((0, 1, 2), set()),
    ],
)
def test_objectives_keep_the_laws_that_they_conserve(decayed, left):
    model, x = square_mlp(), jnp.asarray(draws((SAMPLES, 4)))
    laws = hf.laws(model, (x, x[:, :3]), objective=sum_of_squares(*decayed))
    assert {law.name for law in laws} == left
    assert (laws.note == "") == (not decayed)


def test_both_objectives_of_matrix_factorization():
    model, target = hf.MatrixFactorization(4, 3, 2, key=KEY["key"]), jnp.ones((4, 3))
    plain = hf.laws(model, target, objective=hf.factorization_objective)
    both = hf.laws(model, target, objective=hf.regularized_factorization_objective)
    assert [law.name for law in plain] == ["neurons[1]", "layers[1]", "matrix[1]"]
    assert len(both) == 0
    assert "breaks" in both.note


def test_an_objective_is_certified_inside_a_trace():
    names = []

    @jax.jit
    def traced(x):
        laws = hf.laws(square_mlp(), (x, x[:, :3]), objective=sum_of_squares(2))
        names.append({law.name for law in laws})
        return x

    traced(jnp.asarray(draws((SAMPLES, 4))))
    assert names == [{"neurons[1]", "layers[1]"}]


def test_an_objective_without_data_cannot_be_certified():
    with pytest.raises(ValueError, match="pass an example of its data"):
        hf.laws(square_mlp(), objective=sum_of_squares(2))


# Laws as objects ---------------------------------------------------------------------


def mixed_law():
    """wᵀAw + bᵀw with both parts: ‖W₁[i,:]‖² + 3 Σ_j W₂[j,i]."""
    quadratic, linear = Term(weight(1), 1), Term(weight(2), 3, axis=1)
    return hf.Law("mixed", "", "units", (quadratic,), (linear,))


def test_a_law_may_have_a_quadratic_and_a_linear_part():
    model, update = square_mlp(), redrawn(square_mlp(), seed=3)
    first, second = (array(layer.weight) for layer in model.layers[:2])
    law = mixed_law()
    expected = (first**2).sum(axis=1) + 3 * second.sum(axis=0)
    np.testing.assert_allclose(law.value(model), expected, rtol=1e-14)
    account = (
        law.value(model)
        + 2 * law.bilinear(model, update)
        + law.linear(update)
        + law.quadratic(update)
    )
    np.testing.assert_allclose(law.value(stepped(model, update)), account, rtol=1e-13)


def test_a_matrix_law_is_symmetric_and_has_no_linear_part():
    model = square_mlp("linear")
    law = hf.laws(model)["matrix[1]"]
    cross = law.bilinear(model, redrawn(model, seed=4))
    np.testing.assert_array_equal(cross, cross.T)
    with_linear = dataclasses.replace(law, linear_terms=(Term(weight(1), 1),))
    with pytest.raises(ValueError, match="no linear part"):
        with_linear.value(model)


def test_values_under_jit_and_vmap():
    models = [redrawn(mlp("linear", use_bias=True), seed) for seed in range(3)]
    laws = hf.laws(models[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    values = eqx.filter_jit(eqx.filter_vmap(laws.values))(stacked)
    assert set(values) == {law.name for law in laws}
    for i, model in enumerate(models):
        for name, value in laws.values(model).items():
            np.testing.assert_allclose(values[name][i], value, rtol=0, atol=1e-14)


def test_values_and_the_identity_in_float32():
    model = redrawn(hf.MLP((4, 5, 3), use_bias=True, dtype=jnp.float32, **KEY))
    x = jnp.asarray(draws((SAMPLES, 4)), jnp.float32)
    gradient = gradient_of(Risk(hf.SquaredLoss()), model, (x, x[:, :3]))
    law = hf.laws(model)["neurons[1]"]
    assert law.value(model).dtype == jnp.float32
    identity = layer_laws(model, 1, "neurons")["neurons[1]"]
    identity = identity + 0.25 * layer_laws(gradient, 1, "neurons")["neurons[1]"]
    after = law.value(stepped(model, gradient, jnp.float32(-0.5)))
    size = norm_squared(model)
    np.testing.assert_allclose(after, identity, rtol=0, atol=1e-6 * size)


def test_laws_are_an_iterable_with_names_and_a_length():
    laws = hf.laws(mlp("linear"))
    names = ["neurons[1]", "layers[1]", "matrix[1]", "neurons[2]", "layers[2]",
             "matrix[2]"]  # fmt: skip
    assert [law.name for law in laws] == names
    assert len(laws) == 6
    assert laws[2] is laws["matrix[1]"]
    assert list(laws.values(mlp("linear"))) == names
    with pytest.raises(KeyError, match=r"no law 'neurons\[3\]'.*'matrix\[2\]'"):
        laws["neurons[3]"]


def test_printed_laws_read_as_in_the_paper():
    laws = hf.laws(mlp(["linear", hf.Power(2)], use_bias=True))
    text = repr(laws)
    assert "neurons[1]: ‖W1[i,:]‖² + b1[i]² − ‖W2[:,i]‖²" in text
    assert "neurons[2]: ‖W2[i,:]‖² + b2[i]² − 2‖W3[:,i]‖²" in text
    assert "matrix[1]: W1 W1ᵀ + b1 b1ᵀ − W2ᵀ W2" in text
    assert repr(laws["layers[1]"]) == "<layers[1]: ‖W1‖² + ‖b1‖² − ‖W2‖²>"
