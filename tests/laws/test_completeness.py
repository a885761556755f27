"""Certificates of completeness, against known counts."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import homoflow as hf

KEY = jax.random.key(1)


def certify(sizes, loss=None, **keywords):
    model = hf.MLP(sizes, key=KEY, **keywords)
    loss = hf.SquaredLoss() if loss is None else loss
    return hf.certify(model, jnp.ones(sizes[0]), loss)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (2, 3, 1), (3, 2, 2), (1, 4, 2), (1, 3, 1), (2, 5, 2)]
)
def test_two_linear_layers_have_the_count_of_the_literature(sizes):
    """k(2r + 1 − k)/2 with k = min(r, n + m) [Marcotte, Gribonval & Peyré 2023]."""
    n, r, m = sizes
    k = min(r, n + m)
    certificate = certify(sizes, activation="linear")
    assert certificate.bound == certificate.rank == k * (2 * r + 1 - k) // 2
    assert certificate.is_complete
    assert certificate.verdict.startswith("complete")


@pytest.mark.parametrize(
    ("sizes", "options", "count"),
    [
        ((2, 4, 1), {"activation": "relu"}, 4),
        ((2, 3, 2, 1), {"activation": "relu", "use_bias": True}, 5),
        ((2, 3, 2), {"activation": "leaky_relu", "use_bias": True}, 3),
        ((2, 3, 1), {"activation": "abs"}, 3),
        ((2, 3, 1), {"activation": hf.ReLUPower(2)}, 3),
        ((2, 2, 2, 2), {"activation": ["linear", "relu"]}, 3 + 2),
        ((2, 2, 2, 2), {"activation": "linear"}, 3 + 3),
        ((2, 3, 1), {"activation": jnp.tanh}, 0),
        ((2, 2, 1), {"activation": jax.nn.relu6, "use_bias": True}, 0),
    ],
)
def test_counts_of_small_networks(sizes, options, count):
    certificate = certify(sizes, **options)
    assert (certificate.rank, certificate.bound) == (count, count)


def test_scalar_chains_have_laws_that_are_not_quadratic():
    """From one input to one output only the product of all layers moves: D − 1 laws."""
    certificate = certify((1, 2, 2, 1), activation="linear")
    assert certificate.bound == 8 - 1
    assert (certificate.rank, certificate.missing) == (6, 1)
    assert certificate.is_closed
    assert not certificate.is_complete
    assert "1 of 7 laws are missing" in repr(certificate)


def test_softmax_sees_less_than_other_losses():
    sizes, options = (2, 3, 3), {"use_bias": True}
    squared = certify(sizes, **options)
    softmax = certify(sizes, hf.SoftmaxCrossEntropy(), **options)
    assert (squared.rank, squared.bound) == (3, 3)
    # The sums over outputs of three columns and of the bias.
    assert (softmax.rank, softmax.bound) == (3 + 4, 3 + 4)


def test_attention():
    """Per head 2 × 2: QQᵀ − KKᵀ and VVᵀ − OᵀO, symmetric, so 3 numbers each."""

    class SelfAttention(eqx.Module):
        attention: eqx.nn.MultiheadAttention

        def __call__(self, x):
            return self.attention(x, x, x)

    model = SelfAttention(eqx.nn.MultiheadAttention(2, 4, key=KEY))
    certificate = hf.certify(model, jnp.ones((3, 4)))
    assert (certificate.rank, certificate.bound) == (12, 12)


@pytest.mark.parametrize("eps", [0.0, 1e-2])
def test_normalization(eps):
    """ε = 0: the norm of what comes before, and the gains; ε > 0: the gains only."""

    class Normalized(eqx.Module):
        a: eqx.nn.Linear
        norm: eqx.nn.RMSNorm

        def __call__(self, x):
            return self.norm(self.a(x))

    model = Normalized(
        eqx.nn.Linear(2, 3, key=KEY), eqx.nn.RMSNorm(3, eps=eps, use_bias=False)
    )
    certificate = hf.certify(model, jnp.ones(2))
    assert certificate.bound == certificate.rank == (1 if eps == 0 else 0)


def test_one_sample_moves_along_one_direction():
    """With a single sample there is one field, and every function constant along it."""
    model = hf.MLP((2, 2, 1), key=KEY)
    data = jnp.array([[0.4, 1.2]]), jnp.array([[0.7]])
    one = hf.certify(model, data=data)
    assert one.bound == 6 - 1
    assert one.scope == "this data set only"
    assert one.bound >= hf.certify(model, jnp.ones(2)).bound


def test_laws_that_are_left_out_are_missed():
    model = hf.MLP((2, 3, 1), key=KEY)
    known = hf.laws(model)
    for items, rank in ((known.items, 3), (known.items[1:], 1), ((), 0)):
        certificate = hf.certify(model, jnp.ones(2), laws=hf.Laws(items))
        assert (certificate.rank, certificate.bound) == (rank, 3)
        assert certificate.missing == 3 - rank


def test_too_many_laws_contradict_the_bound():
    """A false law is found out: more laws than there can be."""
    model = hf.MLP((1, 1, 1), activation=jnp.tanh, key=KEY)
    false = hf.laws(hf.MLP((1, 1, 1), key=KEY))
    certificate = hf.certify(model, jnp.ones(1), laws=false)
    assert certificate.missing < 0
    assert "contradictory" in certificate.verdict


def test_the_search_finds_what_the_layers_do_not_show():
    """Two equal linear branches: W_2 W_1 + V_2 V_1 mixes the units of both."""

    class Branches(eqx.Module):
        a: hf.MLP
        b: hf.MLP

        def __call__(self, x):
            return self.a(x) + self.b(x)

    parts = [
        hf.MLP((2, n, 2), activation="linear", key=jax.random.key(n)) for n in (2, 1)
    ]
    certificate = hf.certify(Branches(*parts), jnp.ones(2))
    r, k = 3, 3
    assert certificate.bound == k * (2 * r + 1 - k) // 2
    assert certificate.is_complete
    names = {law.name for law in certificate.laws}
    assert {name for name in names if name.startswith("quadratic")}
    values = [np.ravel(law.value(Branches(*parts))) for law in certificate.laws]
    assert sum(len({round(float(v), 9) for v in value}) for value in values) == 6


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="220 trained parameters"):
        hf.certify(hf.MLP((10, 20, 1), key=KEY), jnp.ones(10))
    with pytest.raises(ValueError, match="Pass `x_example`"):
        hf.certify(hf.MLP((2, 2, 1), key=KEY))
    with pytest.raises(ValueError, match=r"of data `\(x, y\)` pass `x\[0\]`"):
        hf.certify(hf.MLP((2, 2, 1), key=KEY), (jnp.ones((5, 2)), jnp.ones((5, 1))))


@pytest.mark.parametrize(
    "sizes", [(2, 3, 3, 2), (3, 3, 3, 3, 1), (2, 3, 2, 3, 2), (3, 4, 4, 4, 2)]
)
def test_deep_networks_have_one_law_for_each_hidden_unit(sizes):
    """Most weights leave units inactive: many are tried before a law is missed."""
    certificate = certify(sizes)
    hidden = sum(sizes[1:-1])
    assert (certificate.rank, certificate.bound) == (hidden, hidden)
    assert certificate.is_complete


@pytest.mark.parametrize("units", [1, 2, 3])
def test_units_of_the_fourth_power(units):
    """V(Wx + b)⁴ + c: one law for each unit, though monomials are of all sizes."""

    class Quartic(eqx.Module):
        V: jax.Array
        W: jax.Array
        b: jax.Array
        c: jax.Array

        def __call__(self, x):
            return self.V @ (self.W @ x + self.b) ** 4 + self.c

    arrays = [
        jax.random.normal(jax.random.key(k), shape)
        for k, shape in enumerate([(1, units), (units, 2), (units,), (1,)])
    ]
    certificate = hf.certify(Quartic(*arrays), jnp.ones(2))
    assert certificate.rank == units
    assert certificate.verdict.startswith(("complete", "undecided"))
    assert certificate.bound >= units


def test_kinks_leave_a_certificate_undecided():
    """One number in, one out: within each region of activity only products move."""
    certificate = certify((1, 2, 2, 1), activation="leaky_relu")
    assert certificate.rank == 4
    assert certificate.bound >= 4
    assert certificate.verdict.startswith(("undecided", "complete"))


def test_known_laws_that_were_left_out_are_proof_enough():
    model = hf.MLP((2, 3, 1), key=KEY)
    certificate = hf.certify(model, jnp.ones(2), laws=hf.Laws(()))
    assert certificate.existing == 3
    assert certificate.verdict.startswith("incomplete: ")


def test_without_a_gradient_nothing_is_certified():
    model = hf.MLP((2, 3, 1), key=KEY)

    def constant(m, data):
        return jnp.sum(jax.lax.stop_gradient(m(data)))

    certificate = hf.certify(model, jnp.ones(2), objective=constant)
    assert not certificate.is_complete
    assert "no random weights and data does a gradient flow" in certificate.verdict
