"""The laws of models that nobody here wrote, against formulas, counts and null spaces."""

import functools
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import model

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEY = jax.random.key(3)


class SelfAttention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __call__(self, x):
        return self.attention(x, x, x)


class Normalized(eqx.Module):
    """Linear, a normalization layer of Equinox, ReLU, linear."""

    a: eqx.nn.Linear
    norm: eqx.Module
    b: eqx.nn.Linear

    def __call__(self, x):
        return self.b(jax.nn.relu(self.norm(self.a(x))))  # pyright: ignore


def normalized(norm, eps: float) -> Normalized:
    return Normalized(
        eqx.nn.Linear(3, 4, key=KEY), norm(4, eps=eps), eqx.nn.Linear(4, 2, key=KEY)
    )


class Images(eqx.Module):
    """Two convolutions, the second in groups, pooling, and a dense layer."""

    c1: eqx.nn.Conv2d
    c2: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __call__(self, x):
        x = eqx.nn.MaxPool2d(2, 2)(jax.nn.relu(self.c1(x)))
        return self.out(jax.nn.relu(self.c2(x)).reshape(-1))


def images() -> Images:
    return Images(
        eqx.nn.Conv2d(1, 4, 1, key=KEY),
        eqx.nn.Conv2d(4, 6, 2, groups=2, key=KEY),
        eqx.nn.Linear(6 * 2 * 2, 3, key=KEY),
    )


class Stateful(eqx.Module):
    """Equinox's own GRU cell, run over a sequence, and a dense layer."""

    cell: eqx.nn.GRUCell
    out: eqx.nn.Linear

    def __call__(self, xs):
        start = jnp.zeros(self.cell.hidden_size, xs.dtype)
        last, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), start, xs)
        return self.out(last)


def batch_norm(p, x):
    h = x @ p["a"].T + p["bias"]
    h = (h - h.mean(axis=0)) / jnp.sqrt(h.var(axis=0))
    return jax.nn.relu(h * p["gain"]) @ p["b"].T


def recurrent(p, xs):
    def step(h, x):
        return jax.nn.relu(p["a"] @ h + p["b"] @ x), None

    last, _ = jax.lax.scan(step, jnp.zeros(len(p["a"]), xs.dtype), xs)
    return p["c"] @ last


def stacked(p, x):
    def layer(h, wv):
        return h + wv[1] @ jax.nn.relu(wv[0] @ h), None

    return p["out"] @ jax.lax.scan(layer, x, (p["w"], p["v"]))[0]


def embedded(p, tokens):
    return p["out"] @ jax.nn.relu(p["w"] @ p["e"][tokens].mean(axis=0))


def packed_attention(p, x):
    q, k, v = jnp.split(x @ p["qkv"].T, 3, axis=1)
    return jax.nn.softmax(q @ k.T) @ v @ p["o"].T


def sq(a, axis=None):
    """Sums of squares: over all axes but one, or over all."""
    a = np.asarray(a)
    if axis is None:
        return (a**2).sum()
    return (a**2).sum(axis=tuple(i for i in range(a.ndim) if i != axis))


def gram(a, axis=0):
    a = np.moveaxis(np.asarray(a), axis, 0).reshape(np.shape(a)[axis], -1)
    return a @ a.T


def mlp(activation=jax.nn.relu, depth=2, **keywords):
    return eqx.nn.MLP(3, 2, 4, depth, activation, key=KEY, **keywords)


# Every case: a model, an input, and NumPy's formula for every law. ---------------------

SAMPLE, SEQUENCE = jnp.ones(3), jnp.ones((5, 3))
CASES: dict[str, tuple[Callable, Any, Callable, dict]] = {
    "eqx.nn.MLP": (
        mlp,
        SAMPLE,
        lambda m: {
            "rows[layers[0].weight]": sq(m.layers[0].weight, 0)
            + np.asarray(m.layers[0].bias) ** 2
            - sq(m.layers[1].weight, 1),
            "rows[layers[1].weight]": sq(m.layers[1].weight, 0)
            + np.asarray(m.layers[1].bias) ** 2
            - sq(m.layers[2].weight, 1),
        },
        {},
    ),
    "linear": (
        lambda: mlp(lambda z: z, 1, use_bias=False, use_final_bias=False),
        SAMPLE,
        lambda m: {
            "matrix[layers[0].weight]": gram(m.layers[0].weight)
            - gram(m.layers[1].weight, 1)
        },
        {},
    ),
    "eqx.nn.Conv2d": (
        images,
        jnp.ones((1, 6, 6)),
        lambda m: {
            "channels[c1.weight]": sq(m.c1.weight, 0)
            + sq(m.c1.bias, 0)
            - np.concatenate([sq(m.c2.weight[:3], 1), sq(m.c2.weight[3:], 1)]),
            "channels[c2.weight]": sq(m.c2.weight, 0)
            + sq(m.c2.bias, 0)
            - sq(m.out.weight.reshape(3, 6, 4), 1),
        },
        {},
    ),
    "eqx.nn.MultiheadAttention": (
        lambda: SelfAttention(
            eqx.nn.MultiheadAttention(2, 4, use_key_bias=True, key=KEY)
        ),
        jnp.ones((3, 4)),
        lambda m: attention_laws(m.attention),
        {},
    ),
    "eqx.nn.LayerNorm": (
        lambda: normalized(eqx.nn.LayerNorm, 0.0),
        SAMPLE,
        lambda m: {
            "total[a.weight]": sq(m.a.weight) + sq(m.a.bias),
            "entries[norm.weight]": sq(m.norm.weight, 0)
            + sq(m.norm.bias, 0)
            - sq(m.b.weight, 1),
            "sums[a.weight]": np.asarray(m.a.weight).sum(axis=0),
            "sums[a.bias]": np.asarray(m.a.bias).sum(),
        },
        {},
    ),
    "eqx.nn.RMSNorm": (
        lambda: normalized(functools.partial(eqx.nn.RMSNorm, use_bias=False), 0.0),
        SAMPLE,
        lambda m: {
            "total[a.weight]": sq(m.a.weight) + sq(m.a.bias),
            "entries[norm.weight]": sq(m.norm.weight, 0) - sq(m.b.weight, 1),
        },
        {},
    ),
    "batch statistics": (
        lambda: model(batch_norm, a=(4, 3), bias=4, gain=4, b=(2, 4)),
        jnp.ones((6, 3)),
        lambda m: {
            "rows[p['a']]": sq(m.p["a"], 0) + sq(m.p["bias"], 0),
            "columns[p['b']]": sq(m.p["b"], 1) - sq(m.p["gain"], 0),
            "entries[p['bias']]": m.p["bias"],
        },
        {"batched": True},
    ),
    "gated": (
        lambda: model(
            lambda p, x: p["o"] @ (jax.nn.silu(p["g"] @ x) * (p["u"] @ x)),
            g=(4, 3), u=(4, 3), o=(2, 4),
        ),
        SAMPLE,
        lambda m: {"columns[p['o']]": sq(m.p["o"], 1) - sq(m.p["u"], 0)},
        {},
    ),
    "gated, bilinear": (
        lambda: model(
            lambda p, x: p["o"] @ ((p["g"] @ x) * (p["u"] @ x)),
            g=(4, 3), u=(4, 3), o=(2, 4),
        ),
        SAMPLE,
        lambda m: {
            "rows[p['g']]": sq(m.p["g"], 0) - sq(m.p["o"], 1),
            "columns[p['o']]": sq(m.p["o"], 1) - sq(m.p["u"], 0),
        },
        {},
    ),
    "scan over time": (
        lambda: model(recurrent, a=(3, 3), b=(3, 2), c=(1, 3)),
        jnp.ones((6, 2)),
        lambda m: {
            "rows[p['a']]": sq(m.p["a"], 0)
            - sq(m.p["a"], 1)
            + sq(m.p["b"], 0)
            - sq(m.p["c"], 1)
        },
        {},
    ),
    "scan over layers": (
        lambda: model(stacked, w=(2, 4, 3), v=(2, 3, 4), out=(2, 3)),
        SAMPLE,
        lambda m: {
            f"rows[p['v'][{k}]]": None for k in ()
        }
        | {
            f"columns[p['v'][{k}]]": sq(m.p["v"][k], 1) - sq(m.p["w"][k], 0)
            for k in range(2)
        },
        {},
    ),
    "embedding": (
        lambda: model(embedded, e=(6, 3), w=(4, 3), out=(2, 4)),
        jnp.array([0, 5, 2]),
        lambda m: {
            "matrix[p['e']]": gram(m.p["e"], 1) - gram(m.p["w"], 1),
            "columns[p['out']]": sq(m.p["out"], 1) - sq(m.p["w"], 0),
        },
        {},
    ),
    "packed attention": (
        lambda: model(packed_attention, qkv=(9, 3), o=(3, 3)),
        SEQUENCE,
        lambda m: {
            "matrix[p['o']]": gram(m.p["o"], 1) - gram(m.p["qkv"][6:]),
            "matrix[p['qkv']]": gram(m.p["qkv"][:3]) - gram(m.p["qkv"][3:6]),
        },
        {},
    ),
    "powers": (
        lambda: model(
            lambda p, x: jnp.sum(p["u"] ** 2 * p["v"] ** 3 * x), u=(3,), v=(3,)
        ),
        SAMPLE,
        lambda m: {
            "entries[p['u']]": 3 * sq(m.p["u"], 0) - 2 * sq(m.p["v"], 0)
        },
        {},
    ),
    "polynomial activation": (
        lambda: model(lambda p, x: p["v"] @ (p["u"] @ x) ** 3, u=(4, 3), v=(2, 4)),
        SAMPLE,
        lambda m: {"rows[p['u']]": sq(m.p["u"], 0) - 3 * sq(m.p["v"], 1)},
        {},
    ),
    "quotient": (
        lambda: model(lambda p, x: jnp.sum(p["u"] / p["v"] * x), u=(3,), v=(3,)),
        SAMPLE,
        lambda m: {"entries[p['u']]": sq(m.p["u"], 0) + sq(m.p["v"], 0)},
        {},
    ),
    "weight normalization": (
        lambda: model(
            lambda p, x: p["g"] * (p["v"] @ x) / jnp.linalg.norm(p["v"], axis=1),
            v=(4, 3), g=(4,),
        ),
        SAMPLE,
        lambda m: {"rows[p['v']]": sq(m.p["v"], 0)},
        {},
    ),
    "shifted gain": (
        lambda: model(lambda p, x: p["w"] @ ((1 + p["g"]) * x), g=(2,), w=(2, 2)),
        jnp.ones(2),
        lambda m: {
            f"quadratic[{k}]": (m.p["g"][i] ** 2 + 2 * m.p["g"][i] - sq(m.p["w"][:, i]))
            for k, i in ((1, 0), (2, 1))
        },
        {},
    ),
    "linear recurrence": (
        lambda: model(
            lambda p, x: p["c"]
            @ jax.lax.fori_loop(0, 4, lambda _, h: p["a"] @ h, p["b"] @ x),
            a=(2, 2), b=(2, 3), c=(1, 2),
        ),
        SAMPLE,
        lambda m: {
            "matrix[p['a']]": gram(m.p["a"]) - gram(m.p["a"], 1)
            + gram(m.p["b"]) - gram(m.p["c"], 1),
            "total[p['a']]": sq(m.p["a"]) - 4 * sq(m.p["c"]),
        },
        {},
    ),
    "tied": (
        lambda: model(lambda p, x: p["w"] @ jax.nn.relu(p["w"] @ x), w=(3, 3)),
        SAMPLE,
        lambda m: {},
        {},
    ),
    "eqx.nn.GRUCell": (
        lambda: Stateful(
            eqx.nn.GRUCell(2, 3, key=KEY), eqx.nn.Linear(3, 1, key=KEY)
        ),
        jnp.ones((4, 2)),
        lambda m: {},
        {},
    ),
}  # fmt: skip


def attention_laws(a):
    def by_head(weight):
        return np.asarray(weight).reshape(2, 2, -1)

    def grams(rows):
        return rows @ rows.swapaxes(1, 2)

    return {
        "blocks[attention.query_proj.weight]": grams(by_head(a.query_proj.weight))
        - grams(by_head(a.key_proj.weight))
        - grams(by_head(a.key_proj.bias)),
        "blocks[attention.value_proj.weight]": grams(by_head(a.value_proj.weight))
        - grams(by_head(a.output_proj.weight.T)),
        "entries[attention.key_proj.bias]": a.key_proj.bias,
    }


@functools.cache
def found(name: str) -> tuple[Any, Any, hf.Laws]:
    build, x, _, keywords = CASES[name]
    made = build()
    return made, x, hf.laws(made, x, **keywords)


def redrawn(tree, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: (
            jnp.asarray(rng.standard_normal(a.shape)) / max(1, a.ndim)
            if eqx.is_inexact_array(a)
            else a
        ),
        tree,
    )


def flat(tree) -> np.ndarray:
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def gradient_at(made, x, seed: int, *, batched: bool):
    """∇L by plain JAX on new weights, data and targets, for the squared loss."""
    rng = np.random.default_rng(seed)
    shape = x.shape if batched else (7, *x.shape)
    if jnp.issubdtype(x.dtype, jnp.integer):
        xs = jnp.asarray(rng.integers(0, int(x.max()) + 1, shape))
    else:
        xs = jnp.asarray(rng.standard_normal(shape))
    made = redrawn(made, seed)

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(m):
        outputs = m(xs) if batched else jax.vmap(m)(xs)
        targets = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
        return jnp.sum((outputs - targets) ** 2)

    return made, gradient(made)


every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_the_laws_are_those_of_the_formulas(name):
    made, _, laws = found(name)
    made = redrawn(made, seed=8)
    expected = CASES[name][2](made)
    assert {law.name for law in laws} == set(expected)
    for law in laws:
        np.testing.assert_allclose(law.value(made), expected[law.name], atol=1e-13)


@every_case
def test_the_formulas_are_conserved_to_rounding(name):
    """h(w + tg) = h(w − tg) for quadratic h with ⟨∇h, g⟩ = 0, by NumPy alone."""
    _, x, formulas, keywords = CASES[name]
    made, gradient = gradient_at(
        found(name)[0], x, 31, **({"batched": False} | keywords)
    )
    t = np.linalg.norm(flat(made)) / np.linalg.norm(flat(gradient))
    step = jax.tree.map(lambda g: t * g, gradient)
    ahead = formulas(eqx.apply_updates(made, step))
    behind = formulas(eqx.apply_updates(made, jax.tree.map(jnp.negative, step)))
    for law in ahead:
        off = np.abs(ahead[law] - behind[law]).max()
        assert off < 1e-12 * np.linalg.norm(flat(made)) ** 2


# Counts, by a null space that this file computes itself --------------------------------


def quadratic_null_space(made, x, count: int) -> int:
    """How many independent pairs (A, b) have ⟨2Aw + b, ∇L⟩ = 0 at `count` points."""
    weights, structure = jax.flatten_util.ravel_pytree(  # pyright: ignore
        eqx.filter(made, eqx.is_inexact_array)
    )
    frozen = eqx.filter(made, eqx.is_inexact_array, inverse=True)

    @jax.jit
    @jax.vmap
    def gradients(w, xi, yi):
        return jax.grad(
            lambda v: jnp.sum((eqx.combine(structure(v), frozen)(xi) - yi) ** 2)
        )(w)

    rng = np.random.default_rng(5)
    ws = rng.uniform(-2, 2, (count, weights.size))
    outputs = eqx.filter_eval_shape(made, x).shape
    xs = rng.uniform(-4, 4, (count, *x.shape))
    gs = np.asarray(gradients(ws, xs, rng.standard_normal((count, *outputs))))
    kept = np.linalg.norm(gs, axis=1) > 1e-3
    ws, gs = ws[kept], gs[kept]
    pairs = ws[:, :, None] * gs[:, None, :]
    pairs = pairs + pairs.swapaxes(1, 2)
    rows = np.stack([np.concatenate([p[np.triu_indices(len(p))], g])
                     for p, g in zip(pairs, gs, strict=True)])  # fmt: skip
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    values = np.linalg.svd(rows, compute_uv=False)
    return rows.shape[1] - int((values > 1e-10 * values[0]).sum())


@pytest.mark.parametrize(
    ("made", "x", "expected"),
    [
        (mlp(depth=1), SAMPLE, 4),
        (mlp(lambda z: z, 1, use_bias=False, use_final_bias=False), SAMPLE, 10),
        (normalized(eqx.nn.LayerNorm, 0.0), SAMPLE, 9),
        (model(lambda p, x: p["v"] @ jax.nn.relu(p["u"] @ x) ** 2, u=(3, 2), v=(1, 3)),
         jnp.ones(2), 3),
        (model(lambda p, x: x * p["u"] * p["v"] / p["w"], u=(3,), v=(3,), w=(3,)),
         SAMPLE, 6),
        (model(lambda p, x: p["a"] @ p["b"] @ x + p["c"] @ x, a=(2, 2), b=(2, 2), c=(2, 2)),
         jnp.ones(2), 3),
    ],
    ids=["relu", "linear", "layer norm", "squared relu", "diagonal", "linear residual"],
)  # fmt: skip
def test_no_quadratic_law_is_missed(made, x, expected):
    laws = hf.laws(made, x)
    size = flat(made).size
    null = quadratic_null_space(made, x, (size + 1) * (size + 2) // 2 + 150)
    values = [np.ravel(law.value(redrawn(made, seed=2))) for law in laws]
    # A symmetric matrix holds each of its entries off the diagonal twice.
    count = len({round(float(v), 10) for value in values for v in value})
    linear = sum(
        len(v) for v, law in zip(values, laws, strict=True) if not law.quadratic_terms
    )
    # Products of linear laws are quadratic laws too, but no new ones.
    assert null == count + linear * (linear + 1) // 2
    assert count == expected


# What is not conserved is no law -------------------------------------------------------


@pytest.mark.parametrize(
    "activation", [jnp.tanh, jax.nn.sigmoid, jax.nn.gelu, jax.nn.softplus, jax.nn.relu6]
)
def test_other_activations_have_no_law_and_a_reason(activation):
    laws = hf.laws(mlp(activation, 1), SAMPLE)
    assert len(laws) == 0
    assert "leaves the function unchanged" in laws.note
    assert len(laws.approximate) == 0


def test_normalization_with_epsilon_conserves_the_norm_approximately():
    """The violation, measured again at other weights, grows with ε and is no rounding."""
    measured = []
    for eps in (1e-6, 1e-4):
        made = normalized(eqx.nn.RMSNorm, eps)
        laws = hf.laws(made, SAMPLE)
        assert "total[a.weight]" not in {law.name for law in laws}
        (nearly,) = laws.approximate
        assert nearly.name == "total[a.weight]"
        assert "approximately" in repr(nearly)
        assert nearly.violation is not None
        made, gradient = gradient_at(made, SAMPLE, seed=4, batched=False)
        rate = float(2 * nearly.bilinear(made, gradient))
        assert abs(rate) > 1e-10
        measured.append((nearly.violation, rate))
    (small, small_rate), (large, large_rate) = measured
    assert 1e-10 < small < large < 1e-2
    assert 30 < large / small < 300
    assert 30 < large_rate / small_rate < 300


def test_a_law_that_the_gradient_breaks_is_left_out():
    """Straight-through rounding: the function has a symmetry that its gradient lacks."""

    @jax.custom_jvp
    def odd(z):
        return jax.nn.relu(z)

    odd.defjvp(lambda z, dz: (odd(*z), jnp.cos(z[0]) * dz[0]))
    laws = hf.laws(
        model(lambda p, x: p["v"] @ odd(p["u"] @ x), u=(3, 3), v=(2, 3)), SAMPLE
    )
    assert len(laws) == 0
    assert "not conserved by the gradients" in laws.note


def test_a_branch_that_usual_data_do_not_reach_is_seen():
    def fn(p, x):
        z = p["u"] @ x
        return p["v"] @ jnp.where(x[0] > 1000, jnp.tanh(z), jax.nn.relu(z))

    assert len(hf.laws(model(fn, u=(3, 2), v=(1, 3)), jnp.ones(2))) == 0


def test_frozen_arrays_have_no_law():
    made = mlp(depth=1)
    mask = jax.tree.map(eqx.is_inexact_array, made)
    mask = eqx.tree_at(lambda m: m.layers[1].weight, mask, replace=False)
    assert len(hf.laws(made, SAMPLE, trainable=mask)) == 0


def test_stopped_gradients_have_no_law():
    def fn(p, x):
        return p["v"] @ jax.nn.relu(jax.lax.stop_gradient(p["u"]) @ x)

    laws = hf.laws(model(fn, u=(5, 3), v=(2, 5)), SAMPLE)
    assert [law.name for law in laws] == ["entries[p['u']]"]  # Constant, each of them.


def test_dead_neurons_have_laws_as_others_do():
    made = mlp(depth=1)
    dead = eqx.tree_at(lambda m: m.layers[0].bias, made, jnp.full(4, -1e3))
    assert [law.formula for law in hf.laws(dead, SAMPLE)] == [
        law.formula for law in hf.laws(made, SAMPLE)
    ]


# The loss, objectives, and where there is nothing to search ----------------------------


def cross_entropy(prediction, label):
    return -jax.nn.log_softmax(prediction)[label]


@pytest.mark.parametrize("loss", [hf.SoftmaxCrossEntropy(), cross_entropy])
def test_softmax_conserves_sums_over_outputs(loss):
    made = mlp(depth=1)
    laws = hf.laws(made, SAMPLE, loss)
    names = ["rows[layers[0].weight]", "sums[layers[1].weight]", "sums[layers[1].bias]"]
    assert [law.name for law in laws] == names
    np.testing.assert_allclose(
        laws["sums[layers[1].weight]"].value(made),
        np.asarray(made.layers[1].weight).sum(axis=0),
    )


def test_sums_of_two_arrays_that_are_added():
    """Token and position embeddings: what one gains the other gains too."""

    def fn(p, tokens):
        h = p["token"][tokens] + p["place"]
        return p["out"] @ jnp.tanh(h).ravel()

    made = model(fn, token=(4, 3), place=(2, 3), out=(2, 6))
    laws = hf.laws(made, jnp.array([0, 3]))
    assert [law.name for law in laws] == ["sums[p['place'], p['token']]"]
    expected = np.asarray(made.p["place"]).sum(0) - np.asarray(made.p["token"]).sum(0)
    np.testing.assert_allclose(laws[0].value(made), expected, atol=1e-14)


def test_an_objective_is_searched_too():
    def objective(m, target):
        decay = jnp.sum(m.p["c"] ** 2)
        return jnp.sum((m.p["a"] @ m.p["b"] @ m.p["c"] - target) ** 2) + decay

    made = model(lambda p, x: x, a=(3, 2), b=(2, 2), c=(2, 3))
    laws = hf.laws(made, jnp.ones((3, 3)), objective=objective)
    assert [law.name for law in laws] == ["matrix[p['a']]"]
    expected = gram(made.p["a"], 1) - gram(made.p["b"])
    np.testing.assert_allclose(laws[0].value(made), expected, atol=1e-14)


@pytest.mark.parametrize(
    "net",
    [
        hf.MLP((4, 3, 2), key=jax.random.key(0)),
        eqx.nn.MLP(4, 2, 3, 1, key=jax.random.key(0)),
    ],
)
@pytest.mark.parametrize(
    ("example", "says"),
    [
        ((jnp.ones((5, 4)), jnp.ones((5, 2))), r"\(x, y\)` pass `x\[0\]`"),
        (jnp.ones((5, 4)), r"it is `x\[0\]`, and this one has shape \(5, 4\)"),
        (jnp.ones(3), r"this one has shape \(3,\)"),
        ("x", "one input sample"),
    ],
)
def test_what_is_no_sample_is_refused_at_the_door(net, example, says):
    with pytest.raises(ValueError, match=says):
        hf.laws(net, example)


def test_without_an_example_or_inside_a_trace_there_is_a_reason():
    made = mlp(depth=1)
    assert "pass `x_example`" in hf.laws(made).note
    notes = []

    @jax.jit
    def traced(x):
        notes.append(hf.laws(made, x).note)
        return x

    traced(SAMPLE)
    assert "inside a trace" in notes[0]


def test_a_long_loop_has_the_laws_of_a_short_one():
    made = found("scan over time")[0]
    long = hf.laws(made, jnp.ones((1500, 2)))
    assert [law.name for law in long] == [
        law.name for law in found("scan over time")[2]
    ]


# Laws as objects -----------------------------------------------------------------------


def test_values_under_jit_and_vmap_and_in_single_precision():
    made, _, laws = found("eqx.nn.MultiheadAttention")
    models = [redrawn(made, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *eqx.filter(models, eqx.is_array))
    values = jax.jit(jax.vmap(laws.values))(stack)
    for i, m in enumerate(models):
        for name, value in laws.values(m).items():
            np.testing.assert_allclose(values[name][i], value, atol=1e-14)
    single = jax.tree.map(
        lambda a: a.astype(jnp.float32), eqx.filter(made, eqx.is_array)
    )
    assert all(v.dtype == jnp.float32 for v in laws.values(single).values())


def test_the_gradient_is_that_of_the_value():
    made, _, laws = found("eqx.nn.MultiheadAttention")
    law = laws["blocks[attention.value_proj.weight]"]
    direction = redrawn(made, seed=6)

    def along(t):
        moved = eqx.apply_updates(made, jax.tree.map(lambda u: t * u, direction))
        return float(law.value(moved)[1, 0, 1])

    expected = (along(1e-4) - along(-1e-4)) / 2e-4  # Exact for quadratics.
    slope = np.dot(flat(law.gradient(made, (1, 0, 1))), flat(direction))
    np.testing.assert_allclose(slope, expected, rtol=1e-8)
    with pytest.raises(ValueError, match="say of which entry"):
        law.gradient(made)


def test_formulas_for_people_and_for_papers():
    laws = found("eqx.nn.MLP")[2]
    assert laws[0].formula == (
        "‖layers[0].weight[i, :]‖² + layers[0].bias[i]² − ‖layers[1].weight[:, i]‖²"
    )
    assert laws[0].latex == (
        r"\lVert \mathtt{layers[0].weight}[i, :]\rVert^2 + \mathtt{layers[0].bias}[i]^2"
        r" - \lVert \mathtt{layers[1].weight}[:, i]\rVert^2"
    )
    assert hf.laws(hf.MLP((2, 3, 1), use_bias=True, key=KEY))[0].latex == (
        r"\lVert W_{1}[i,:]\rVert^2 + b_{1}[i]^2 - \lVert W_{2}[:,i]\rVert^2"
    )


def test_a_run_records_the_laws_that_were_found():
    made, _, laws = found("eqx.nn.MLP")
    rng = np.random.default_rng(2)
    data = (
        jnp.asarray(rng.standard_normal((8, 3))),
        jnp.asarray(rng.standard_normal((8, 2))),
    )
    run = hf.descend(made, data, 5, learning_rate=0.01, laws=laws)
    (name, _), expected = [law.name for law in laws], CASES["eqx.nn.MLP"][2]
    np.testing.assert_allclose(run.laws[name][0], expected(made)[name], atol=1e-14)
    np.testing.assert_allclose(
        run.laws[name][-1], expected(run.model)[name], atol=1e-14
    )


def test_large_models_take_seconds():
    """ReLU MLP 784-256-256-10: 512 hidden neurons, none missed, in 20 s of one core."""
    start = time.process_time()
    made = eqx.nn.MLP(784, 10, 256, 2, key=KEY)
    laws = hf.laws(made, jnp.ones(784), hf.SoftmaxCrossEntropy())
    assert time.process_time() - start < 20
    neurons = [law.value(made).size for law in laws if law.quadratic_terms]
    assert neurons == [256, 256]
    assert [law.value(made).size for law in laws if law.linear_terms] == [256, 1]
