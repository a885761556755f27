"""The experiments of section 2: their problems, their measurement, and that it can fail."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from paper import cor21, footnote8, thm21, thm22, thm23
from paper._conservation import (
    Setting,
    candidates,
    conservation_claim,
    relative_change,
)

import homoflow as hf

matplotlib.use("Agg")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def matrices():
    return thm22.run(dataclasses.replace(thm22.QUICK, seeds=2))


@pytest.fixture(scope="module")
def shared():
    return thm23.run(dataclasses.replace(thm23.QUICK, seeds=2))


@pytest.mark.parametrize("report", ["matrices", "shared"])
def test_claims_hold_and_controls_fail(report, request):
    found = request.getfixturevalue(report)
    assert [claim.text for claim in found.claims if not claim.holds] == []
    assert [claim.text for claim in found.controls if claim.holds] == []
    assert found.controls


@pytest.mark.parametrize(("report", "module"), [("matrices", thm22), ("shared", thm23)])
def test_figures_have_labelled_axes(report, module, request):
    figure = module.draw(request.getfixturevalue(report))
    assert all(ax.get_ylabel() for ax in figure.axes)
    assert figure.axes[0].get_xlabel()
    plt.close(figure)


def test_a_linear_layers_matrix_is_held_to_numpy():
    # Gradient descent moves W₁W₁ᵀ − W₂ᵀW₂ by η²(G₁G₁ᵀ − G₂ᵀG₂): the experiment's
    # recorded quantity against a step by hand.
    model, (x, y) = Setting((4, 6, 5, 2), ("relu", "linear"), 12).draw(0)
    gd = hf.descend(model, (x, y), 1, learning_rate=0.1, laws=candidates(model))
    w1, w2, w3 = (np.asarray(layer.weight) for layer in model.layers)
    hidden = np.maximum(np.asarray(x) @ w1.T, 0)
    residual = (hidden @ w2.T @ w3.T - np.asarray(y)) / len(x)
    g3 = residual.T @ (hidden @ w2.T)
    g2 = (residual @ w3).T @ hidden
    change = gd.laws["matrix[2]"][1] - gd.laws["matrix[2]"][0]
    np.testing.assert_allclose(change, 0.01 * (g2 @ g2.T - g3.T @ g3), atol=1e-13)


def test_relative_change_is_the_largest_over_components_and_of_all_weights():
    model, data = Setting((3, 4, 2), ("tanh",), 6).draw(1)
    gd = hf.descend(
        model, data, 20, learning_rate=0.1, laws=candidates(model), save_models=True
    )
    w1, w2 = (np.asarray(layer.weight) for layer in gd.models.layers)
    values = (w1**2).sum(2) - (w2**2).sum(1)
    size = ((w1**2).sum((1, 2)) + (w2**2).sum((1, 2))).max()
    expected = np.abs(values - values[0]).max(axis=1) / size
    found = relative_change(gd, "neurons[1]")
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-16)


def test_a_run_that_did_not_finish_supports_no_claim():
    claim = conservation_claim("", np.array([1e-12, np.nan]), 1e-8, seeds=2)
    assert not claim.holds
    assert "1 of 2 runs did not finish" in claim.measured
    assert conservation_claim("", np.array([1e-12, 1e-13]), 1e-8, seeds=2).holds


def test_doubling_is_told_from_divergence():
    descents = {
        "learning rate": np.array([0.4, 0.4, 0.2, 0.2, 0.1, 0.1]),
        "seed": np.array([0, 1, 0, 1, 0, 1]),
        "change": np.array([np.nan, 9.0, 0.2, 2.0, 0.1, 1.0]),
    }
    assert thm21._doubling_claim(descents, 0.1).holds
    assert not thm21._doubling_claim(descents, 0.2).holds


def test_random_patterns_are_maps_of_the_stated_sizes():
    config = thm23.Config()
    maps = thm23.patterns(config)
    for index, n_out, n_in, free in zip(
        maps, config.sizes[1:], config.sizes[:-1], config.free_weights, strict=True
    ):
        assert index.shape == (n_out, n_in)
        assert set(index.ravel()) == set(range(free + 1))
        # Shared: fewer free weights than connections.
        assert free < np.count_nonzero(index)


def test_sharing_across_layers_obeys_eulers_identity():
    # f is of degree 2 in a and 1 in b: ⟨a, ∂L/∂a⟩ = 2⟨b, ∂L/∂b⟩.
    model, (x, y) = thm23.problem(thm23.Config(), thm23.ACROSS, 0)
    gradient = eqx.filter_grad(lambda m: jnp.mean((jax.vmap(m)(x) - y) ** 2))(model)
    of_a, of_b = jnp.sum(model.a * gradient.a), jnp.sum(model.b * gradient.b)
    assert float(of_a) == pytest.approx(2 * float(of_b), rel=1e-12)
    found = thm23.quantities(model)
    terms = {k: [t.coefficient for t in v[0].quadratic_terms] for k, v in found.items()}
    assert sorted(terms[thm23.ONE_TO_TWO]) == [-2, 1]
    assert sorted(terms[thm23.ONE_TO_ONE]) == [-1, 1]


def test_biases_are_drawn_and_only_one_version_of_the_law_has_them():
    config = footnote8.QUICK
    model, _ = footnote8.problem(config, 3)
    right, *_, wrong = footnote8.both_versions(config, model)
    w1, b1, w2 = model.layers[0].weight, model.layers[0].bias, model.layers[1].weight
    assert np.abs(b1).min() > 0
    expected = (w1**2).sum(1) + b1**2 - (w2**2).sum(0)
    np.testing.assert_allclose(right.value(model), expected, rtol=1e-12)
    w3 = model.layers[2].weight
    np.testing.assert_allclose(
        wrong.value(model), (w2**2).sum(1) - (w3**2).sum(0), rtol=1e-12
    )


def test_starts_of_the_corollary_have_the_stated_spread():
    config = dataclasses.replace(cor21.Config(), sizes=(200, 100, 50, 2))
    model, _ = cor21.problem(config, config.activations, 0.3, 0)
    for layer in model.layers[:2]:
        assert float(jnp.std(layer.weight)) == pytest.approx(0.3, rel=0.05)
