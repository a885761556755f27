"""`track` in a training loop of one's own, against an account in NumPy."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import optax.contrib
import oracles
import pytest
from oracles import CLIP, DECAY, MOMENTUM, RATE, account, laws_and_others, network
from problems import arrays_of

import homoflow as hf

STEPS = 5
LAWS = laws_and_others()[2:]
X, Y = jnp.asarray(oracles.X), jnp.asarray(oracles.Y)


def chained(before, **keywords):
    return optax.chain(before, optax.sgd(RATE, **keywords))


momentum = {"momentum": MOMENTUM}
by_hand = {
    "sgd": (optax.sgd(RATE), oracles.sgd),
    "schedule": (optax.sgd(optax.exponential_decay(RATE, 1, 0.5)), oracles.scheduled),
    "heavy ball": (optax.sgd(RATE, momentum=MOMENTUM), oracles.heavy_ball),
    "injected rate": (
        optax.inject_hyperparams(optax.sgd)(RATE, momentum=MOMENTUM),
        oracles.heavy_ball,
    ),
    "Nesterov": (
        optax.sgd(RATE, momentum=MOMENTUM, nesterov=True), oracles.nesterov,
    ),
    "coupled decay": (
        chained(optax.add_decayed_weights(DECAY), nesterov=True, **momentum),
        oracles.coupled_nesterov,
    ),
    "decoupled decay": (
        optax.chain(
            optax.trace(MOMENTUM), optax.add_decayed_weights(DECAY), optax.scale(-RATE)
        ),
        oracles.decoupled_heavy_ball,
    ),
    "clipped norm": (chained(optax.clip_by_global_norm(CLIP)), oracles.clipped_norm),
    "clipped": (chained(optax.clip(CLIP / 4)), oracles.clipped),
    "signs": (optax.sign_sgd(RATE), oracles.signs),
    "Adam": (optax.adam(RATE), oracles.adam),
    "AdamW": (optax.adamw(RATE, weight_decay=DECAY), oracles.adamw),
}  # fmt: skip
others = {
    "Lion": optax.lion(RATE),
    "RMSprop": optax.rmsprop(RATE),
    "decay, then clipping": optax.chain(
        optax.add_decayed_weights(DECAY), chained(optax.clip_by_global_norm(CLIP))
    ),
}


def loss(arrays) -> jax.Array:
    first, second = jax.tree.leaves(arrays)
    residual = X @ first.T @ second.T - Y
    return 0.5 * jnp.sum(residual**2) / len(X)


def train(optimizer, steps=STEPS, dtype=jnp.float64):
    """Weights before every step and at the end, and the account of all."""
    params = eqx.filter(network(dtype), eqx.is_inexact_array)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        update, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, update), state

    history = [params]
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes on purpose.
        for _ in range(steps):
            params, state = step(params, state)
            history.append(params)
    return [arrays_of(p) for p in history], hf.tracked(state, params)


@functools.cache
def wrapped(optimizer):
    return train(hf.track(LAWS, optimizer))


@pytest.mark.parametrize("name", by_hand)
def test_every_part_is_that_of_numpy(name):
    optimizer, rule = by_hand[name]
    weights, ledger = wrapped(optimizer)
    history, books = account(weights[0], rule, [slice(None)] * STEPS)
    # Optax's Adam corrects its bias in single precision.
    atol = 1e-9 if name in ("Adam", "AdamW") else 1e-13
    for mine, expected in zip(weights[-1], history[-1], strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=atol)
    for law, mine in ledger.items():
        for part in ("discretization", *oracles.PARTS):
            np.testing.assert_allclose(
                getattr(mine, part), books[-1][part][law], rtol=0, atol=atol,
                err_msg=law + part,
            )  # fmt: skip


@pytest.mark.parametrize("name", [*by_hand, *others])
def test_parts_sum_to_the_change_of_any_optimizer(name):
    optimizer = others[name] if name in others else by_hand[name][0]
    weights, ledger = wrapped(optimizer)
    start, end = oracles.values(weights[0]), oracles.values(weights[-1])
    for law, mine in ledger.items():
        change = end[law] - start[law]
        assert np.abs(change).max() > 1e-5
        np.testing.assert_allclose(mine.observed, change, rtol=0, atol=1e-14)
        np.testing.assert_allclose(mine.explained, change, rtol=0, atol=1e-14)


def test_momentum_is_the_recursion_of_heavy_ball():
    """Σ −2ηP, P⁺ = μ(P − ηq(v)): nothing but q of the velocities, which are NumPy's."""
    weights, ledger = wrapped(by_hand["heavy ball"][0])
    w = weights[0]
    velocity, p, expected = oracles.times(0, w), np.zeros((4, 4)), np.zeros((4, 4))
    for _ in range(STEPS):
        p = MOMENTUM * (p - RATE * oracles.q(velocity)["matrix[1]"])
        grown = oracles.times(MOMENTUM, velocity)
        velocity = oracles.plus(oracles.gradient(w), grown)
        w = oracles.plus(w, oracles.times(-RATE, velocity))
        expected = expected - 2 * RATE * p
    assert np.abs(expected).max() > 1e-3
    mine = ledger["matrix[1]"].momentum
    np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-14)


def test_what_single_precision_rounds_off_is_rounding():
    """It is in no other part: those are as in double precision."""
    _, single = train(hf.track(LAWS, by_hand["heavy ball"][0]), dtype=jnp.float32)
    _, double = wrapped(by_hand["heavy ball"][0])
    mine, exact = single["matrix[1]"], double["matrix[1]"]
    assert mine.rounding.dtype == jnp.float32
    assert 1e-9 < np.abs(mine.rounding).max() < 1e-5
    for part in ("discretization", "momentum"):
        size = np.abs(getattr(exact, part)).max()
        np.testing.assert_allclose(
            getattr(mine, part), getattr(exact, part), rtol=0, atol=1e-5 * size
        )


@pytest.mark.parametrize("name", ["heavy ball", "AdamW"])
def test_at_the_end_of_a_chain_there_are_two_parts(name):
    optimizer = optax.chain(by_hand[name][0], hf.track(LAWS))
    weights, ledger = train(optimizer)
    _, whole = wrapped(by_hand[name][0])
    for law, mine in ledger.items():
        updates = [
            [b - a for a, b in zip(*pair, strict=True)]
            for pair in itertools.pairwise(weights)
        ]
        q = sum(oracles.q(u)[law] for u in updates)
        first = sum(
            oracles.rate(w, u)[law] for w, u in zip(weights[:-1], updates, strict=True)
        )
        np.testing.assert_allclose(mine.discretization, q, rtol=0, atol=1e-13)
        np.testing.assert_allclose(mine.first_order, first, rtol=0, atol=1e-13)
        np.testing.assert_allclose(whole[law].first_order, first, rtol=0, atol=1e-13)
        with pytest.raises(AttributeError, match="sees updates but no gradients"):
            _ = mine.momentum


def test_it_changes_no_update():
    tracked, _ = wrapped(by_hand["AdamW"][0])
    plain, _ = train(optax.chain(by_hand["AdamW"][0], hf.track(())))
    for a, b in zip(tracked[-1], plain[-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14)


def test_what_else_moves_the_weights_shows():
    """A negative control: rounding is not what makes the parts add up."""
    optimizer = hf.track(LAWS, by_hand["sgd"][0])
    params = eqx.filter(network(), eqx.is_inexact_array)
    state = optimizer.init(params)
    update, state = optimizer.update(jax.grad(loss)(params), state, params)
    moved = optax.apply_updates(params, update)
    pushed = eqx.tree_at(
        lambda m: m.layers[0].weight, moved, replace_fn=lambda w: 2 * w
    )
    extra = LAWS[0].value(pushed) - LAWS[0].value(moved)
    mine = hf.tracked(state, pushed)["matrix[1]"]
    np.testing.assert_allclose(mine.rounding, extra, rtol=1e-11)
    assert np.abs(hf.tracked(state, moved)["matrix[1]"].rounding).max() < 1e-14
    assert hf.tracked(state, moved).note == ""
    assert "Something else moved the weights" in hf.tracked(state, pushed).note


@pytest.mark.parametrize("part", ["decay", "momentum", "transformation"])
def test_parts_that_come_late_are_told_apart(part):
    """For eight steps this is gradient descent."""
    extra = {
        "decay": optax.add_decayed_weights(DECAY),
        "momentum": optax.trace(MOMENTUM),
        "transformation": optax.scale_by_sign(),
    }[part]
    late = optax.conditionally_transform(extra, lambda step: step >= 8)
    weights, ledger = train(hf.track(LAWS[:1], chained(late)), steps=10)
    mine = ledger["matrix[1]"]
    w, g = weights[8:10], [oracles.gradient(w) for w in weights[8:10]]
    expected = {
        "decay": sum(
            oracles.rate(a, oracles.times(-RATE * DECAY, a))["matrix[1]"] for a in w
        ),
        "momentum": oracles.rate(w[1], oracles.times(-RATE * MOMENTUM, g[0]))[
            "matrix[1]"
        ],
        "transformation": sum(
            oracles.rate(a, [-RATE * np.sign(b) for b in c])["matrix[1]"]
            for a, c in zip(w, g, strict=True)
        ),
    }[part]
    assert np.abs(expected).max() > 1e-5
    np.testing.assert_allclose(getattr(mine, part), expected, rtol=0, atol=1e-14)
    assert np.abs(mine.rounding).max() < 1e-14
    assert np.abs(mine.gradient).max() < 1e-15


def test_noise_is_not_attributed():
    optimizer = optax.chain(optax.sgd(RATE), optax.add_noise(1e-4, 0.0, 0))
    _, ledger = train(hf.track(LAWS, optimizer))
    mine = ledger["matrix[1]"]
    assert set(mine.parts) == {"discretization", "gradient", "unattributed"}
    assert np.abs(mine.unattributed).max() > 1e-4
    assert np.abs(mine.gradient).max() < 1e-15
    assert np.abs(mine.rounding).max() < 1e-14
    assert "noise" in ledger.note


def test_noise_beside_what_turns_the_gradient_is_not_attributed():
    """The clip's part is what is left without the noise."""
    noise = optax.add_noise(1e-4, 0.0, 0)
    optimizer = optax.chain(optax.clip(1e-3), noise, optax.sgd(RATE))
    weights, ledger = train(hf.track(LAWS, optimizer))
    mine = ledger["matrix[1]"]
    zeros = [jnp.zeros(w.shape) for w in weights[0]]
    state, wanted = noise.init(zeros), 0
    for w in weights[:-1]:
        with jax.numpy_dtype_promotion("standard"):
            added, state = noise.update(zeros, state)
        moved = [-RATE * np.asarray(n) for n in added]
        wanted = wanted + oracles.rate(w, moved)["matrix[1]"]
    assert np.abs(wanted).max() > 1e-5
    np.testing.assert_allclose(mine.unattributed, wanted, rtol=0, atol=1e-14)
    assert np.abs(mine.transformation).max() > 1e-5
    assert np.abs(mine.rounding).max() < 1e-14


@pytest.mark.parametrize(
    "clip",
    [optax.clip(1e-3), optax.sign_sgd(1.0)],
    ids=["clip", "sign"],
)
def test_noise_ahead_of_what_turns_it_is_named(clip):
    """What a clip makes of gradient and noise together has no parts."""
    optimizer = optax.chain(optax.add_noise(1e-4, 0.0, 0), clip, optax.sgd(RATE))
    _, ledger = train(hf.track(LAWS, optimizer))
    assert "transformation" in ledger["matrix[1]"].parts
    assert "makes of its noise cannot be told from the rest" in ledger.note


def test_a_line_search_that_optax_cannot_flatten_is_refused():
    def optimizer(rate):
        search = optax.scale_by_backtracking_linesearch(6)
        return optax.flatten(optax.chain(optax.sgd(rate), search))

    with pytest.raises(TypeError, match="Put the line search outside"):
        hf.descend(network(), (X, Y), 3, learning_rate=RATE, optimizer=optimizer)


def test_different_rates_turn_the_gradient():
    """The gradient's own part is its projection; the rest is told from it by size."""
    small = optax.multi_transform(
        {True: optax.sgd(RATE / 8), False: optax.sgd(RATE)},
        lambda params: jax.tree.map(lambda a: a.size > 10, params),
    )
    weights, ledger = wrapped(small)
    expected = {"gradient": 0, "transformation": 0}
    for w in weights[:-1]:
        g = oracles.gradient(w)
        u = [-RATE * a / (8 if a.size > 10 else 1) for a in g]
        multiple = sum((a * b).sum() for a, b in zip(u, g, strict=True))
        along = oracles.times(multiple / sum((a**2).sum() for a in g), g)
        rest = [a - b for a, b in zip(u, along, strict=True)]
        for part, moved in (("gradient", along), ("transformation", rest)):
            expected[part] = expected[part] + oracles.rate(w, moved)["entries"]
    for part, value in expected.items():
        assert np.abs(value) > 1e-4
        np.testing.assert_allclose(getattr(ledger["entries"], part), value, atol=1e-14)


def test_a_rate_that_is_traced_is_accounted_for_as_well():
    def final(rate):
        params = eqx.filter(network(), eqx.is_inexact_array)
        optimizer = hf.track(LAWS[:1], optax.sgd(rate, momentum=MOMENTUM))
        state = optimizer.init(params)
        for _ in range(2):
            update, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, update)
        return hf.tracked(state, params)

    sweep = jax.jit(jax.vmap(final))(jnp.array([RATE / 2, RATE]))["matrix[1]"]
    assert sweep.rounding.shape == (2, 4, 4)
    assert np.abs(sweep.rounding).max() < 1e-14
    known = train(hf.track(LAWS[:1], by_hand["heavy ball"][0]), 2)[1]["matrix[1]"]
    np.testing.assert_allclose(sweep.momentum[1], known.momentum, atol=1e-14)
    assert np.abs(known.momentum).max() > 1e-4


@pytest.mark.parametrize(
    ("optimizer", "parts", "word"),
    [
        (by_hand["schedule"][0], "", ""),
        (by_hand["injected rate"][0], "momentum", ""),
        (by_hand["coupled decay"][0], "momentum decay", ""),
        (by_hand["clipped norm"][0], "", ""),
        (by_hand["clipped"][0], "transformation", ""),
        (by_hand["Adam"][0], "transformation", "its memory"),
        (by_hand["AdamW"][0], "decay transformation", "its memory"),
        (others["decay, then clipping"], "decay", ""),
        (
            chained(optax.chain(optax.add_decayed_weights(DECAY), optax.clip(1.0))),
            "decay transformation",
            "its weights",
        ),
        (optax.MultiSteps(optax.sgd(0.1), 3), "momentum", ""),
        (optax.MultiSteps(optax.adam(0.1), 3), "transformation", "its memory"),
        (optax.polyak_sgd(), "", ""),
        (optax.lbfgs(0.1), "transformation", "its memory"),
        (optax.contrib.schedule_free_sgd(0.1), "momentum", ""),
    ],
)
def test_parts_are_read_off_the_optimizer(optimizer, parts, word):
    params = eqx.filter(network(), eqx.is_inexact_array)
    budget = hf.track(LAWS, optimizer).init(params).budget
    assert set(budget.parts) == {"discretization", "gradient", *parts.split()}
    note = budget.update_parts.note
    assert word in note if word else note == ""


# Bad input. -----------------------------------------------------------------------------


def test_parameters_are_needed():
    optimizer = hf.track(LAWS)
    params = eqx.filter(network(), eqx.is_inexact_array)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"call `optimizer\.update\(.*with `params`"):
        optimizer.update(params, state)


@pytest.mark.parametrize("params", [{"w": jnp.ones(3)}, network().layers[0]])
def test_parameters_must_have_the_arrays_of_the_laws(params):
    with pytest.raises(ValueError, match=r"about the array `layers\[\d\]\.weight`"):
        hf.track(LAWS).init(params)


@pytest.mark.parametrize(("count", "word"), [(0, "no"), (2, "2")])
def test_one_account_is_read_at_a_time(count, word):
    params = eqx.filter(network(), eqx.is_inexact_array)
    optimizer = optax.chain(optax.sgd(0.1), *[hf.track(LAWS)] * count)
    with pytest.raises(ValueError, match=f"holds {word} accounts"):
        hf.tracked(optimizer.init(params), params)


def test_laws_must_be_laws(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="law objects"):
        hf.track(["neurons[1]"])  # pyright: ignore


def test_two_sets_of_weights_are_refused():
    both = optax.LookaheadParams.init_synced(network())
    with pytest.raises(TypeError, match=r"lookahead.*two sets of weights"):
        hf.track(LAWS, optax.lookahead(optax.sgd(0.1), 5, 0.5)).init(both)
    with pytest.raises(TypeError, match=r"lookahead.*two sets of weights"):
        hf.descend(
            network(), (X, Y), 2, learning_rate=0.1,
            optimizer=lambda rate: optax.lookahead(optax.sgd(rate), 5, 0.5),
        )  # fmt: skip
