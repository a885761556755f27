"""What probes prove, and what they do not: targets, regions, saturation, dead weights."""

# pyright: reportCallIssue=false
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from problems import model

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(3)
relu = jax.nn.relu


def classifier() -> eqx.nn.MLP:
    return eqx.nn.MLP(2, 3, 4, 1, key=KEY)


def slopes(values: Callable, w) -> np.ndarray:
    """The gradients of some functions of a vector of weights, one in each row."""
    return np.asarray(jax.jacfwd(lambda v: jnp.ravel(values(v)))(w))


def span_of(made, laws, w) -> np.ndarray:
    _, unravel = ravel_pytree(made)

    def values(v):
        found = [jnp.ravel(law.value(unravel(v))) for law in laws]
        return jnp.concatenate([jnp.zeros(0), *found])

    return slopes(values, w)


def rank(rows) -> int:
    return int(np.linalg.matrix_rank(rows, tol=1e-8)) if rows.size else 0


# Targets -------------------------------------------------------------------------------


def log_probabilities(prediction):
    return jax.nn.log_softmax(prediction)


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: -jnp.sum(jax.nn.one_hot(y, 3) * log_probabilities(f)),
        lambda f, y: -jnp.sum(jnp.where(jnp.arange(3) == y, log_probabilities(f), 0)),
        lambda f, y: (
            -log_probabilities(f) @ jnp.equal(jnp.arange(3), y).astype(f.dtype)
        ),
        lambda f, y: -jnp.eye(3)[y] @ log_probabilities(f),
    ],
    ids=["one-hot", "where", "equal", "row of the identity"],
)
def test_losses_of_classes_are_probed_with_classes(loss):
    """Of real targets they make a loss without gradient, which would conserve anything."""
    made = classifier()
    laws = hf.laws(made, jnp.ones(2), loss)
    assert [law.name for law in laws] == [
        "rows[layers[0].weight]",
        "sums[layers[1].weight]",
        "sums[layers[1].bias]",
    ]
    flat, unravel = ravel_pytree(eqx.filter(made, eqx.is_array))
    static = eqx.filter(made, eqx.is_array, inverse=True)
    x = jnp.array([0.3, -1.2])

    def objective(v):
        return loss(eqx.combine(unravel(v), static)(x), 2)

    gradient = jax.grad(objective)(flat)
    assert jnp.linalg.norm(gradient) > 1e-2
    rows = slopes(
        lambda v: jnp.concatenate([jnp.ravel(h.value(unravel(v))) for h in laws]), flat
    )
    assert np.abs(rows @ gradient).max() < 1e-14


def test_a_loss_without_gradient_is_refused():
    with pytest.raises(ValueError, match="No target was found"):
        hf.laws(
            classifier(), jnp.ones(2), lambda f, y: jnp.sum(jax.lax.stop_gradient(f))
        )


@pytest.mark.parametrize(
    ("loss", "sums"),
    [
        (lambda f, y: (jnp.sum(f) - y) ** 2, 2 * (4 + 1)),
        (lambda f, y: jnp.sum((f - y) ** 2), 0),
    ],
    ids=["one number", "of the prediction's shape"],
)
def test_targets_of_the_shape_that_a_loss_takes(loss, sums):
    """Where only Σf counts, differences of all rows of the last layer are constant."""
    made = classifier()
    laws = hf.laws(made, jnp.ones(2), loss)
    flat, _ = ravel_pytree(eqx.filter(made, eqx.is_array))
    linear = [law for law in laws if law.name.startswith("quadratic")]
    assert len(linear) == sums
    assert flat.size == 27


def tokens(prediction, targets):
    taken = jnp.take_along_axis(log_probabilities(prediction), targets[:, None], 1)
    return -jnp.mean(taken)


def test_predictions_of_other_kinds():
    """A sequence of logits, several outputs, and random numbers in the model."""
    made = model(lambda p, x: jnp.tanh(x @ p["W"]) @ p["V"], W=(2, 3), V=(3, 4))
    (law,) = hf.laws(made, jnp.ones((5, 2)), tokens)
    np.testing.assert_allclose(law.value(made), made.p["V"].sum(1))

    def heads(p, x):
        h = relu(p["W"] @ x)
        return {"a": p["A"] @ h, "b": (p["B"] @ h)[0]}

    def loss(f, y):
        return jnp.sum((f["a"] - y["a"]) ** 2) + (f["b"] - y["b"]) ** 2

    made = model(heads, W=(3, 2), A=(2, 3), B=(1, 3))
    (law,) = hf.laws(made, jnp.ones(2), loss)
    p = made.p
    expected = (p["A"] ** 2).sum(0) + (p["B"] ** 2).sum(0) - (p["W"] ** 2).sum(1)
    np.testing.assert_allclose(law.value(made), expected)
    with pytest.raises(ValueError, match="returns several"):
        hf.laws(made, jnp.ones(2))


def test_random_keys_among_the_data():
    def dropped(p, data):
        x, key = data
        return p["V"] @ (
            relu(p["W"] @ x) * jax.random.bernoulli(key, 0.7, (3,)).astype(x.dtype)
        )

    made = model(dropped, W=(3, 2), V=(2, 3))
    for key in (jax.random.key(1), jax.random.PRNGKey(1)):
        (law,) = hf.laws(made, (jnp.ones(2), key))
        expected = (made.p["V"] ** 2).sum(0) - (made.p["W"] ** 2).sum(1)
        np.testing.assert_allclose(law.value(made), expected)


# Regions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bound",
    [
        lambda w: jnp.clip(w, -10, 10),
        lambda w: w / jnp.maximum(1, jnp.linalg.norm(w) / 50),
        lambda w: jnp.where(jnp.abs(w) < 100, w, jnp.tanh(w)),
        lambda w: w - relu(jnp.max(jnp.abs(w)) - 500),
    ],
    ids=["clip", "max-norm", "switch", "penalty"],
)
@pytest.mark.parametrize("units", [3, 8])
def test_what_holds_only_near_usual_weights_is_no_law(bound, units):
    """Near usual weights these are ReLU networks; far from them they are not."""
    made = model(
        lambda p, x: bound(p["V"]) @ relu(bound(p["W"]) @ x), W=(units, 4), V=(2, units)
    )
    assert len(hf.laws(made, jnp.ones(4))) == 0


def test_a_penalty_far_away_breaks_the_laws_of_layers():
    made = hf.MLP((2, 3, 1), key=KEY)
    data = jnp.ones((4, 2)), jnp.ones((4, 1))

    def penalized(m, data, start):
        size = sum(jnp.sum(layer.weight**2) for layer in m.layers[:1])
        x, y = data
        return jnp.mean((jax.vmap(m)(x) - y) ** 2) + relu(size - start) ** 2

    for start, count in ((1e3, 0), (1e300, 2)):
        found = hf.laws(
            made, data, objective=lambda m, d, start=start: penalized(m, d, start)
        )
        assert len(found) == count


def test_weights_that_no_gradient_reaches_are_not_called_constant():
    table = model(lambda p, i: p["V"] @ jnp.tanh(p["E"][i]), E=(6, 2), V=(2, 2))
    laws = hf.laws(table, jnp.array(2))  # Tokens 3, 4 and 5 are never drawn.
    assert len(laws) == 0
    assert "To some weights no gradient came" in laws.note
    switched = model(
        lambda p, x: jnp.where(x[0] > 1e6, p["a"], p["b"]) * jnp.tanh(x), a=(2,), b=(2,)
    )
    laws = hf.laws(switched, jnp.ones(2))
    assert len(laws) == 0
    assert "To some weights no gradient came" in laws.note
    frozen = model(
        lambda p, x: jax.jit(jax.lax.stop_gradient)(p["a"]) * jnp.tanh(p["b"] * x),
        a=(2,),
        b=(2,),
    )
    laws = hf.laws(frozen, jnp.ones(2))
    assert [law.name for law in laws] == ["entries[p['a']]"]
    assert laws.note == ""


# Saturation ----------------------------------------------------------------------------


@pytest.mark.parametrize("act", [relu, jnp.tanh], ids=["relu", "tanh"])
@pytest.mark.parametrize("experts", [2, 3, 5])
def test_sums_of_a_softmax_gate_are_found_though_it_saturates(act, experts):
    """Σ_e G[e, :]: softmax sees only differences."""

    def mixture(p, x):
        gate = jax.nn.softmax(p["G"] @ x)
        return jnp.einsum("e,eoi,ei->o", gate, p["V"], act(p["W"] @ x))

    made = model(mixture, G=(experts, 4), V=(experts, 2, 3), W=(experts, 3, 4))
    found = hf.laws(made, jnp.ones(4))
    law = found["sums[p['G']]"]
    np.testing.assert_allclose(law.value(made), made.p["G"].sum(0), atol=1e-14)


# More than forty weights ---------------------------------------------------------------


def gram(a, axis=0):
    a = jnp.moveaxis(a, axis, 0).reshape(a.shape[axis], -1)
    return a @ a.T


def upper(a):
    return a[np.triu_indices(len(a))]


def grouped(p, x):
    h = (p["W"] @ x).reshape(3, 3)
    h = (h - h.mean(1, keepdims=True)) / jnp.sqrt(h.var(1, keepdims=True) + 1e-5)
    return p["V"] @ jnp.tanh(h.ravel())


SENDERS, RECEIVERS = np.array([0, 1, 2, 2]), np.array([1, 2, 0, 1])


def messages(p, x):
    h = jax.ops.segment_sum((x @ p["W"].T)[SENDERS], RECEIVERS, 3)
    return jnp.sum(relu(h), 0) @ p["V"].T


def best_expert(p, x):
    k = jnp.argmax(p["G"] @ x)
    return jax.nn.softmax(p["G"] @ x)[k] * (p["V"][k] @ relu(p["W"][k] @ x))


HIDDEN_LAWS = {
    "squares subtracted": (
        lambda p, x: (p["u"] ** 2 - p["v"] ** 2) @ x,
        {"u": (21,), "v": (21,)},
        (21,),
        lambda p: p["u"] * p["v"],
    ),
    "linear residual layers": (
        lambda p, x: (x + p["A"] @ x) + p["B"] @ (x + p["A"] @ x),
        {"A": (5, 5), "B": (5, 5)},
        (5,),
        lambda p: upper(
            gram(p["A"]) + p["A"] + p["A"].T - gram(p["B"], 1) - p["B"] - p["B"].T
        ),
    ),
    "ring of tensors": (
        lambda p, x: jnp.einsum("aib,bjc,cka,ijk->", p["A"], p["B"], p["C"], x),
        {"A": (2, 4, 2), "B": (2, 3, 2), "C": (2, 4, 2)},
        (4, 3, 4),
        lambda p: jnp.concatenate(
            [
                upper(gram(p[k], 2) - gram(p[n], 0))
                for k, n in (("A", "B"), ("B", "C"), ("C", "A"))
            ]
        ),
    ),
    "complex weights as pairs": (
        lambda p, x: jnp.real(
            lax.complex(p["a"], p["b"])
            @ (lax.complex(p["c"], p["d"]) @ lax.complex(x[0], x[1]))
        ),
        {"a": (3, 3), "b": (3, 3), "c": (3, 5), "d": (3, 5)},
        (2, 5),
        lambda p: jnp.concatenate(
            [
                upper(gram(p["c"]) + gram(p["d"]) - gram(p["a"], 1) - gram(p["b"], 1)),
                (p["d"] @ p["c"].T - p["c"] @ p["d"].T)[np.triu_indices(3, 1)]
                - (p["a"].T @ p["b"] - p["b"].T @ p["a"])[np.triu_indices(3, 1)],
            ]
        ),
    ),
    "normalized groups": (
        grouped,
        {"W": (9, 3), "V": (2, 9)},
        (3,),
        lambda p: p["W"].reshape(3, 3, 3).sum(1).ravel(),
    ),
    "messages on a graph": (
        messages,
        {"W": (6, 5), "V": (3, 6)},
        (3, 5),
        lambda p: jnp.diag(gram(p["W"]) - gram(p["V"], 1)),
    ),
    "best expert": (
        best_expert,
        {"G": (3, 3), "V": (3, 2, 3), "W": (3, 3, 3)},
        (3,),
        lambda p: jnp.concatenate(
            [
                ((p["W"] ** 2).sum(2) - (p["V"] ** 2).sum(1)).ravel(),
                p["G"].sum(0),
            ]
        ),
    ),
    "powers of its own for each unit": (
        lambda p, x: p["V"] @ jnp.abs(p["W"] @ x) ** jnp.array([1.0, 2, 3, 1, 2, 3, 1]),
        {"W": (7, 4), "V": (2, 7)},
        (4,),
        lambda p: (
            jnp.array([1.0, 2, 3, 1, 2, 3, 1]) * (p["V"] ** 2).sum(0)
            - (p["W"] ** 2).sum(1)
        ),
    ),
}


@pytest.mark.parametrize("name", HIDDEN_LAWS)
def test_laws_that_rescalings_do_not_show_are_found_in_larger_models(name):
    """The same span of gradients as that of laws in closed form, at generic weights."""
    fn, shapes, sample, closed_form = HIDDEN_LAWS[name]
    made = model(fn, **shapes)
    laws = hf.laws(made, jnp.ones(sample))
    flat, unravel = ravel_pytree(made)
    assert flat.size > 40
    w = np.random.default_rng(5).standard_normal(flat.size)
    found = span_of(made, laws, w)
    expected = slopes(lambda v: closed_form(unravel(v).p), w)
    assert rank(expected) == rank(found) == rank(np.concatenate([expected, found]))


def test_a_note_says_what_was_not_looked_for():
    small = hf.laws(eqx.nn.MLP(2, 1, 4, 1, key=KEY), jnp.ones(2))
    assert small.note == ""
    middle = hf.laws(eqx.nn.MLP(3, 1, 10, 1, key=KEY), jnp.ones(3))
    assert middle.note.startswith("More may exist")
    assert "joined along an axis" in middle.note
    large = hf.laws(eqx.nn.MLP(30, 1, 40, 1, jnp.tanh, key=KEY), jnp.ones(30))
    assert len(large) == 0
    assert "More may exist: of 1281 weights" in large.note
    assert "joined" not in large.note


def test_only_some_units_are_linear():
    """A matrix law for these, and a law for each of the others, at any size."""

    def fn(p, x):
        h = p["W"] @ x
        return p["V"] @ jnp.concatenate([relu(h[:30]), h[30:]])

    made = model(fn, W=(50, 30), V=(10, 50))
    laws = hf.laws(made, jnp.ones(30))
    assert [law.contraction for law in laws] == ["matrix", "units"]
    p = made.p
    gap = gram(p["W"]) - gram(p["V"], 1)
    sign = np.sign(float(laws[1].value(made)[0] * gap[0, 0]))
    np.testing.assert_allclose(laws[0].value(made), sign * gap[30:, 30:], atol=1e-12)
    np.testing.assert_allclose(
        laws[1].value(made), sign * jnp.diag(gap)[:30], atol=1e-12
    )


# What crashed, or took forever ---------------------------------------------------------


def test_arrays_without_entries_and_long_recurrences():
    empty = model(lambda p, x: jax.nn.softmax(p["w"])[:1] * x, w=(2,), unused=(0,))
    names = [law.name for law in hf.laws(empty, jnp.ones(1))]
    assert "sums[p['w']]" in names

    def recurrent(p, x):
        older, now = jnp.asarray(1.0), jnp.asarray(0.3)
        for _ in range(400):
            older, now = now, 0.6 * now - older
        return p["V"] @ relu(now * (p["W"] @ x))

    made = model(recurrent, W=(3, 2), V=(2, 3))
    (law,) = hf.laws(made, jnp.ones(2))
    expected = (made.p["V"] ** 2).sum(0) - (made.p["W"] ** 2).sum(1)
    np.testing.assert_allclose(law.value(made), expected)


# Classes that compute something else than their base -----------------------------------


class Skipping(hf.MLP):
    def __call__(self, x):
        h = relu(self.layers[0](x))
        return self.layers[2](h + relu(self.layers[1](h)))


class Doubled(eqx.nn.Linear):
    def __call__(self, x, *, key=None):
        return super().__call__(x) + 1.0


class Shifted(hf.ReLU):
    def __call__(self, z):
        return relu(z) + 1.0


class Renamed(hf.MLP):
    """A subclass that computes the same."""


def test_laws_of_layers_hold_for_the_forward_pass_of_the_class_only():
    sizes = (2, 3, 3, 2)
    skipping = Skipping(sizes, key=KEY)
    assert len(hf.laws(skipping)) == 0
    assert "not known" in hf.laws(skipping).note
    (law,) = hf.laws(skipping, jnp.ones(2))
    w = [layer.weight for layer in skipping.layers]
    # What leaves a unit of the first layer also leaves the same unit of the second.
    gap = (w[0] ** 2).sum(1) + (w[1] ** 2).sum(1) - (w[2] ** 2).sum(0)
    np.testing.assert_allclose(
        law.value(skipping), gap - (w[1] ** 2).sum(0), atol=1e-13
    )
    plain = hf.MLP(sizes, use_bias=True, key=KEY)
    replaced = eqx.tree_at(lambda m: m.layers[1], plain, Doubled(3, 3, key=KEY))
    assert len(hf.laws(replaced)) == 0
    shifted = hf.MLP(sizes, activation=Shifted(), key=KEY)
    assert len(hf.laws(shifted)) == 0
    renamed = Renamed(sizes, key=KEY)
    assert len(hf.laws(renamed)) == len(hf.laws(hf.MLP(sizes, key=KEY))) == 4


def test_a_flow_records_no_laws_that_the_model_does_not_have():
    """Of a subclass with a forward pass of its own, those that a search finds."""
    x = jnp.linspace(-1, 1, 8).reshape(4, 2)
    model = Skipping((2, 3, 3, 2), key=KEY)
    run = hf.flow(model, (x, x), 0.1)
    found = [law.name for law in hf.laws(model, x[0])]
    assert found
    assert list(run.laws) == found
    inherited = [law.name for law in hf.laws(hf.MLP((2, 3, 3, 2), key=KEY))]
    assert not set(inherited) & set(found)
    drift = max(float(jnp.max(jnp.abs(v - v[0]))) for v in run.laws.values())
    assert drift < 1e-9
