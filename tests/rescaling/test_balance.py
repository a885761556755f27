"""`balance`: least norm, same function. Both are computed here by NumPy alone."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import problems
import pytest
from problems import asserted

import homoflow as hf

#: So many random networks are balanced, so well.
NETWORKS, CLOSE = (asserted("balance")[k] for k in ("networks", "difference"))
ACTIVATIONS = {"relu": lambda z: np.maximum(z, 0), "linear": lambda z: z}


class Given(hf.AbstractInitializer):
    """Weights made elsewhere."""

    weights: list[np.ndarray]

    def __call__(self, key, specs, dtype):
        return [jnp.asarray(w, dtype) for w in self.weights]


def network(weights, activations) -> hf.MLP:
    sizes = [weights[0].shape[1], *(len(w) for w in weights)]
    return hf.MLP(
        sizes, activation=activations, init=Given(weights), key=jr.key(0)
    )  # fmt: skip


def weights_of(model) -> list[np.ndarray]:
    return [np.asarray(layer.weight) for layer in model.layers]


def outputs(weights, activations, x) -> np.ndarray:
    for weight, name in zip(weights, [*activations, "linear"], strict=True):
        x = ACTIVATIONS[name](x @ weight.T)
    return x


def imbalance(weights, activations) -> float:
    """The largest entry of any law, relative to ‖w‖²."""
    worst = 0.0
    for below, above, name in zip(weights[:-1], weights[1:], activations, strict=True):
        gap = below @ below.T - above.T @ above
        worst = max(worst, np.abs(gap if name == "linear" else np.diag(gap)).max())
    size = sum((w**2).sum() for w in weights)
    return worst / size if size else worst


def difference(a, b) -> float:
    return np.abs(a - b).max() / max(np.abs(a).max(), 1e-300)


def drawn(rng: np.random.Generator, seed: int):
    """A deep network: norms from 1e-3 to 1e3, some of low rank, some with a dead side."""
    sizes = rng.integers(1, 13, rng.integers(3, 8))
    kinds = (["relu"], ["linear"], ["relu", "linear"])[seed % 3]
    activations = list(rng.choice(kinds, len(sizes) - 2))
    weights = [
        rng.standard_normal((n, m))
        for m, n in itertools.pairwise(sizes)
    ]  # fmt: skip
    for h, n in enumerate(sizes[1:-1]):
        scale, uneven = 10 ** rng.uniform(-3, 3, n), 10 ** rng.uniform(-1, 1, n)
        weights[h] *= (scale * uneven)[:, None]
        weights[h + 1] /= scale
    if seed % 4 == 1:
        h = rng.integers(len(weights))
        u, s, v = np.linalg.svd(weights[h], full_matrices=False)
        weights[h] = u[:, :1] * s[:1] @ v[:1]
    if seed % 4 == 2:
        h, unit = rng.integers(len(activations)), rng.integers(13)
        if rng.integers(2):
            weights[h][unit % len(weights[h])] = 0
        else:
            weights[h + 1][:, unit % len(weights[h])] = 0
    return weights, activations


def test_random_deep_networks():
    rng = np.random.default_rng(1)
    for seed in range(NETWORKS):
        weights, activations = drawn(rng, seed)
        assert imbalance(weights, activations) > 1e-3
        after = weights_of(hf.balance(network(weights, activations)))
        x = rng.standard_normal((50, weights[0].shape[1]))
        before_x, after_x = (outputs(w, activations, x) for w in (weights, after))
        assert imbalance(after, activations) < CLOSE
        assert difference(before_x, after_x) < CLOSE


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_linear_chain_has_the_least_norm_of_its_product(rank):
    """min Σ‖W_h‖² over all factorizations into N is N Σ σ^{2/N}."""
    rng = np.random.default_rng(rank)
    weights = [rng.standard_normal(s) for s in ((6, 4), (5, 6), (7, 5), (4, 7))]
    u, s, v = np.linalg.svd(weights[1], full_matrices=False)
    weights[1] = (u[:, :rank] * s[:rank]) @ v[:rank]
    sigma = np.linalg.svd(weights[3] @ weights[2] @ weights[1] @ weights[0])[1]
    after = weights_of(hf.balance(network(weights, "linear")))
    least = 4 * (sigma[:rank] ** (2 / 4)).sum()
    np.testing.assert_allclose(sum((w**2).sum() for w in after), least, rtol=1e-12)
    assert all(np.linalg.matrix_rank(w) == rank for w in after)


def test_relu_networks_have_the_least_norm_of_all_rescalings():
    """The sum of squares has a minimum in every rescaling, found by brute force."""
    rng = np.random.default_rng(3)
    weights, activations = (
        [rng.standard_normal((3, 2)), rng.standard_normal((1, 3))],
        ["relu"],
    )
    after = weights_of(hf.balance(network(weights, activations)))
    # One hidden layer: the neurons' least values are 2·‖in‖‖out‖.
    least = 2 * (np.linalg.norm(weights[0], axis=1) * np.abs(weights[1][0])).sum()
    np.testing.assert_allclose(sum((w**2).sum() for w in after), least, rtol=1e-14)


def test_units_with_one_side_zero_go_to_zero_and_take_others_along():
    """Neuron 0 is the only input of neuron 0 above it."""
    first = np.array([[1.0, 2.0], [3.0, 4.0]])
    second = np.array([[5.0, 0.0], [0.0, 6.0]])
    last = np.array([[0.0, 7.0]])
    after = weights_of(hf.balance(network([first, second, last], "relu")))
    assert not after[0][0].any()
    assert not after[1][0].any()
    x = np.random.default_rng(0).standard_normal((20, 2))
    names = ["relu", "relu"]
    before_x = outputs([first, second, last], names, x)
    assert difference(before_x, outputs(after, names, x)) < 1e-14
    assert imbalance(after, names) < 1e-15


def test_what_a_linear_layer_does_not_pass_on_goes_to_zero():
    """A ReLU neuron whose output the layers above cancel among each other."""
    first = np.array([[1.0, 2.0], [3.0, 4.0]])
    mixed = np.array([[1.0, 1.0], [2.0, 1.0]])
    last = np.array([[2.0, -1.0]])  # last @ mixed = (0, 1)
    names = ["relu", "linear"]
    after = weights_of(hf.balance(network([first, mixed, last], names)))
    assert not after[0][0].any()
    x = np.random.default_rng(0).standard_normal((20, 2))
    both = (outputs(w, names, x) for w in ([first, mixed, last], after))
    assert difference(*both) < 1e-14
    assert imbalance(after, names) < 1e-15


def test_balancing_again_changes_nothing():
    rng = np.random.default_rng(0)
    for activations in (["relu"] * 2, ["linear"] * 2, ["relu", "linear"]):
        weights = [rng.standard_normal(s) for s in ((4, 3), (3, 4), (2, 3))]
        once = hf.balance(network(weights, activations))
        again = weights_of(hf.balance(once))
        for a, b in zip(weights_of(once), again, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-13 * np.abs(a).max())


CONV = ["linear", "leaky_relu", "relu"]


def models() -> list[Any]:
    maps = [[[2, 1, 0], [0, 2, 1]], [[1, 2]]]
    key = jr.key(1)
    return [
        hf.MLP((3, 4, 5, 2), activation="linear", use_bias=True, key=key),
        hf.MLP((3, 4, 5, 2), activation=[hf.Power(2), hf.ReLUPower(3)], key=key),
        hf.MLP((3, 4, 5, 2), activation=["abs", jnp.tanh], key=key),
        hf.ConvNet((2, 6), (3, 4), 4, hidden=(5,), activation=CONV, key=key),
        hf.SharedMLP(maps, key=key),
        hf.MatrixFactorization(5, 4, 3, key=key),
        eqx.nn.MLP(3, 2, 5, 2, key=key),
    ]


def uneven(model):
    """Every array and bias drawn anew, of its own size."""
    leaves, structure = jax.tree.flatten(eqx.filter(model, eqx.is_inexact_array))
    rng = np.random.default_rng(0)
    new = [
        jnp.asarray(10.0 ** rng.uniform(-2, 2) * rng.standard_normal(a.shape))
        for a in leaves
    ]
    return eqx.combine(jax.tree.unflatten(structure, new), model)


@pytest.mark.parametrize("model", models(), ids=lambda m: type(m).__name__)
def test_every_kind_of_model(model):
    model = uneven(model)
    shapes = {hf.ConvNet: (2, 6), hf.MatrixFactorization: (4,)}
    x = np.random.default_rng(1).standard_normal((8, *shapes.get(type(model), (3,))))
    is_ours = isinstance(model, hf.MatrixFactorization | hf.AbstractNetwork)
    balanced = hf.balance(model, None if is_ours else x[0])
    of_batch = eqx.filter_jit(eqx.filter_vmap(lambda m, x: m(x), in_axes=(None, 0)))
    assert difference(*(np.asarray(of_batch(m, x)) for m in (model, balanced))) < 1e-12
    arrays = jax.tree.leaves(eqx.filter(balanced, eqx.is_inexact_array))
    size = sum((np.asarray(a) ** 2).sum() for a in arrays)
    found = hf.laws(model, x[0])
    assert len(found)
    for law in found:
        assert np.abs(np.asarray(law.value(balanced))).max() < 1e-13 * size
        assert np.abs(np.asarray(law.value(model))).max() > 1e-3


def test_degrees_have_laws_with_other_coefficients():
    """Units of degree 3: the incoming square is three times the outgoing one."""
    weights = [np.array([[2.0], [0.5]]), np.array([[3.0, 1.0]])]
    model = network(weights, [hf.Power(3)])
    low, up = weights_of(hf.balance(model))
    np.testing.assert_allclose((low**2)[:, 0], 3 * up[0] ** 2, rtol=1e-14)
    np.testing.assert_allclose(up[0] * low[:, 0] ** 3, [24.0, 0.125], rtol=1e-14)


def test_float32_models_are_balanced_in_float64():
    weights, activations = drawn(np.random.default_rng(4), 2)
    model = jax.tree.map(
        lambda a: a.astype(jnp.float32) if eqx.is_array(a) else a,
        network(weights, activations),
    )
    after = weights_of(hf.balance(model))
    assert all(w.dtype == np.float32 for w in after)
    assert imbalance([w.astype(float) for w in after], activations) < 1e-6


class Normalized(eqx.Module):
    """Its weights' size does not matter."""

    w: jax.Array

    def __call__(self, x):
        return self.w @ x / jnp.sqrt(jnp.sum(self.w**2))


def test_what_cannot_be_balanced_is_refused():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="not positively homogeneous"):
        hf.balance(hf.MLP((3, 4, 2), activation=jnp.tanh, key=jr.key(0)))
    with pytest.raises(ValueError, match="single layer"):
        hf.balance(hf.MLP((3, 2), key=jr.key(0)))
    with pytest.raises(ValueError, match="x_example"):
        hf.balance(eqx.nn.MLP(3, 2, 5, 2, key=jr.key(0)))
    with pytest.raises(ValueError, match="arbitrarily small"):
        hf.balance(Normalized(jnp.arange(1.0, 7.0).reshape(2, 3)), x)
    model = hf.MLP((3, 4, 2), key=jr.key(0))
    with pytest.raises(ValueError, match="outside of jit"):
        eqx.filter_jit(hf.balance)(model)
    broken = eqx.tree_at(lambda m: m.layers[0].weight, model, jnp.full((4, 3), jnp.nan))
    with pytest.raises(ValueError, match="NaN"):
        hf.balance(broken)


@pytest.mark.slow
def test_laws_that_only_a_search_finds_are_left_and_named():
    """(u² − v²) has less norm as (√(u² − v²), 0), which is no rescaling of units."""
    made = problems.model(
        lambda p, x: (p["u"] ** 2 - p["v"] ** 2) * (p["V"] @ jax.nn.relu(p["W"] @ x)),
        W=(2, 2), V=(2, 2), u=(2,), v=(2,),
    )  # fmt: skip
    x = jnp.ones(2)
    with pytest.warns(UserWarning, match="entry by entry: they stay as they are"):
        balanced = hf.balance(made, x)
    np.testing.assert_allclose(balanced(x), made(x), rtol=1e-12)
    laws = hf.laws(made, x)
    rows = [law for law in laws if not law.entries]
    others = [law for law in laws if law.entries]
    assert rows
    assert others
    for law in rows:
        assert np.abs(law.value(balanced)).max() < 1e-12
    data = jnp.eye(2), jnp.eye(2)
    run = hf.flow(made, data, 0.1, laws=laws, solver=hf.Averaged(), rtol=1e-3)
    assert f"(not {others[0].name}" in run.stats["projection"]


def test_laws_that_only_a_search_finds_are_nothing_to_balance():
    made = problems.model(
        lambda p, x: (p["u"] ** 2 - p["v"] ** 2) @ x, u=(2, 2), v=(2, 2)
    )
    with pytest.raises(ValueError, match="which units they rescale is not known"):
        hf.balance(made, jnp.ones(2))
