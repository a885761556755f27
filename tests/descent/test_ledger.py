"""The ledger of `descend` against an account in NumPy, part by part."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import optax
import oracles
import pytest
from oracles import (
    DECAY,
    MOMENTUM,
    RATE,
    X,
    Y,
    account,
    compilations,
    laws_and_others,
    network,
)
from problems import SAMPLES, arrays_of, flat

import homoflow as hf
import homoflow.plot
from homoflow._descent._batches import Batches

matplotlib.use("Agg")

STEPS, BATCH = 10, 4


def coupled_nesterov(learning_rate):
    return optax.chain(
        optax.add_decayed_weights(DECAY),
        optax.sgd(learning_rate, momentum=MOMENTUM, nesterov=True),
    )


SOME = laws_and_others()[2:4]  # One of them with b ≠ 0.
RUNS = {
    "gradient descent": (
        optax.sgd,
        oracles.sgd,
        {"record_every": 4, "laws": laws_and_others()},
    ),
    "minibatches, Nesterov, decay": (
        coupled_nesterov,
        oracles.coupled_nesterov,
        {"batch_size": BATCH, "key": jr.key(6), "record_every": 5, "laws": SOME},
    ),
    "AdamW": (
        functools.partial(optax.adamw, weight_decay=DECAY),
        oracles.adamw,
        {"laws": SOME},
    ),
}


@functools.cache
def run(name: str, learning_rate: float = RATE) -> hf.Trajectory:
    optimizer, _, options = RUNS[name]
    return hf.descend(
        network(), (X, Y), STEPS, learning_rate=learning_rate, optimizer=optimizer,
        ledger=True, **options,
    )  # fmt: skip


def ledger_of(trajectory: hf.Trajectory) -> hf.Ledger:
    assert trajectory.ledger is not None
    return trajectory.ledger


@functools.cache
def batches_of(name: str) -> list:
    options = RUNS[name][2]
    if "key" not in options:
        return [slice(None)] * STEPS
    batches, drawn = Batches(SAMPLES, BATCH), []
    order = batches.init(options["key"])
    for step in range(STEPS):
        indices, order = batches.take(order, jnp.array(step), jnp.arange(SAMPLES))
        drawn.append(np.asarray(indices))
    return drawn


def recorded(options) -> list[int]:
    return [*range(0, STEPS, options.get("record_every", 1)), STEPS]


every_run = pytest.mark.parametrize("name", RUNS)


@every_run
def test_every_part_is_that_of_numpy(name):
    _, rule, options = RUNS[name]
    history, books = account(arrays_of(network()), rule, batches_of(name))
    done = run(name)
    final = np.concatenate([a.ravel() for a in history[-1]])
    np.testing.assert_allclose(flat(done.model), final, rtol=0, atol=1e-12)
    for law, mine in ledger_of(done).items():
        for part in ("discretization", *oracles.PARTS):
            expected = np.stack([books[i][part][law] for i in recorded(options)])
            np.testing.assert_allclose(
                getattr(mine, part), expected, rtol=0, atol=1e-12, err_msg=law + part
            )


@every_run
def test_parts_sum_to_the_observed_change(name):
    done = run(name)
    start = oracles.values(arrays_of(network()))
    end = oracles.values(arrays_of(done.model))
    for law, mine in ledger_of(done).items():
        change = end[law] - start[law]
        assert np.abs(change).max() > 1e-4
        np.testing.assert_allclose(mine.observed[-1], change, rtol=0, atol=1e-13)
        np.testing.assert_allclose(mine.explained[-1], change, rtol=0, atol=1e-13)
        np.testing.assert_array_equal(mine.rounding, mine.observed - mine.explained)
        assert np.abs(mine.rounding).max() < 1e-13


@every_run
def test_the_gradient_certifies_laws_and_convicts_others(name):
    for law, mine in ledger_of(run(name)).items():
        size = np.abs(mine.gradient).max()
        if law in ("mixed", "entries"):
            assert size > 1e-4
        else:
            assert size < 1e-15


def test_a_batch_is_split_into_mean_and_noise():
    name = "minibatches, Nesterov, decay"
    _, rule, options = RUNS[name]
    batches = batches_of(name)
    history, _ = account(arrays_of(network()), rule, batches)
    eta = RATE * (1 + MOMENTUM)
    for law, mine in ledger_of(run(name)).items():
        assert mine.batch is not None
        for i, step in enumerate(recorded(options)[:-1]):
            g = oracles.gradient(history[step], batches[step])
            mean = oracles.gradient(history[step])
            noise = oracles.plus(g, oracles.times(-1, mean))
            cross = oracles.rate(mean, noise)[law] - oracles.rate([0, 0], noise)[law]
            for of, expected in (
                (mine.batch.mean, oracles.q(mean)[law]),
                (mine.batch.noise, oracles.q(noise)[law]),
                (mine.batch.cross, cross),
                (
                    mine.batch.mean + mine.batch.cross + mine.batch.noise,
                    oracles.q(g)[law],
                ),
            ):
                assert of.shape == (len(recorded(options)) - 1, *expected.shape)
                np.testing.assert_allclose(of[i], eta**2 * expected, rtol=0, atol=1e-14)


def test_full_batches_and_transformed_gradients_have_no_split():
    assert ledger_of(run("gradient descent"))["matrix[1]"].batch is None
    assert ledger_of(run("AdamW"))["matrix[1]"].batch is None


def test_only_parts_that_the_optimizer_has_are_kept():
    kept = {name: set(ledger_of(run(name))["matrix[1]"].parts) for name in RUNS}
    assert kept == {
        "gradient descent": {"discretization", "gradient"},
        "minibatches, Nesterov, decay": {
            "discretization", "gradient", "momentum", "decay",
        },
        "AdamW": {"discretization", "gradient", "decay", "transformation"},
    }  # fmt: skip
    assert "memory" in ledger_of(run("AdamW")).note
    assert ledger_of(run("gradient descent")).note == ""


def test_the_run_itself_does_not_change():
    plain = hf.descend(
        network(), (X, Y), STEPS, learning_rate=RATE, laws=(), record_every=4
    )
    assert plain.ledger is None
    mine = run("gradient descent")
    np.testing.assert_allclose(flat(mine.model), flat(plain.model), rtol=1e-14)
    np.testing.assert_allclose(mine.losses, plain.losses, rtol=1e-13)


def test_new_values_compile_nothing_new():
    run("gradient descent")
    with compilations() as compiled:
        run("gradient descent", RATE / 2)
    assert compiled == []


def test_vmap_equals_a_loop():
    @eqx.filter_vmap
    def sweep(rate):
        done = hf.descend(
            network(), (X, Y), STEPS, learning_rate=rate, record_every=4,
            laws=SOME[1:], ledger=True, throw=False,
        )  # fmt: skip
        return done.ledger

    rates = [RATE / 2, RATE]
    batch = sweep(jnp.array(rates))
    for i, rate in enumerate(rates):
        single = ledger_of(run("gradient descent", rate))
        for law in batch:
            mine = single[law]
            for part in ("observed", "discretization", "gradient"):
                np.testing.assert_allclose(
                    getattr(batch[law], part)[i],
                    getattr(mine, part), rtol=0, atol=1e-14,
                )  # fmt: skip


def test_what_follows_a_divergence_is_nan():
    done = hf.descend(
        network(), (X, Y), STEPS, learning_rate=1e40, record_every=4, throw=False,
        laws=laws_and_others(), ledger=True,
    )  # fmt: skip
    lost = np.isnan(done.losses)
    assert lost.any()
    for mine in ledger_of(done).values():
        for values in (mine.observed, *mine.parts.values()):
            assert np.isnan(np.asarray(values)[lost]).all()
            assert np.isfinite(np.asarray(values)[~lost]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_accounts_are_in_single_precision_at_least(dtype):
    def ledger(model):
        return hf.descend(
            model, (X, Y), 3, learning_rate=0.1, ledger=True, batch_size=4,
            key=jr.key(0), throw=False,
        ).ledger  # fmt: skip

    shapes = eqx.filter_eval_shape(ledger, network(dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_a_missing_account_says_which_there_are():
    with pytest.raises(KeyError, match=r"layers\[1\]"):
        ledger_of(run("gradient descent"))["layers[2]"]


def test_printed_ledgers_name_laws_and_parts():
    text = repr(ledger_of(run("gradient descent")))
    assert "matrix[1]: Account(largest |observed|" in text
    assert "discretization" in text
    assert "momentum" not in text


# The picture. ---------------------------------------------------------------------------


def test_the_picture_shows_the_parts_of_one_entry():
    done = run("minibatches, Nesterov, decay")
    mine = ledger_of(done)["matrix[1]"]
    ax = hf.plot.ledger(done, "matrix[1]", component=(0, 1))
    lines = {str(line.get_label()): line for line in ax.get_lines()}
    for name in ("observed", "discretization", "gradient", "momentum", "decay"):
        shown = lines[name].get_xydata()
        expected = np.stack([done.ts, getattr(mine, name)[:, 0, 1]], axis=1)
        np.testing.assert_array_equal(shown, expected)
    assert "transformation" not in lines
    assert ax.get_ylabel() == "change of matrix[1], entry 0, 1"
    largest = np.abs(np.asarray(mine.observed)).max(axis=0)
    ax = hf.plot.ledger(done, "matrix[1]")
    i, j = np.unravel_index(np.argmax(largest), largest.shape)
    assert ax.get_ylabel() == f"change of matrix[1], entry {i}, {j}"
    plt.close("all")


def test_a_picture_that_cannot_be_drawn_says_why():
    done = run("gradient descent")
    with pytest.raises(ValueError, match="2 indices, one for each axis"):
        hf.plot.ledger(done, "matrix[1]", component=1)
    with pytest.raises(KeyError, match=r"No account of a law 'layers\[9\]'"):
        hf.plot.ledger(done, "layers[9]")
    without = eqx.tree_at(lambda t: t.ledger, done, None)
    with pytest.raises(ValueError, match="ledger=True"):
        hf.plot.ledger(without, "matrix[1]")
    batch = jax.tree.map(lambda a: jnp.stack([a, a]) if eqx.is_array(a) else a, done)
    with pytest.raises(ValueError, match="a batch of runs"):
        hf.plot.ledger(batch, "matrix[1]")
    plt.close("all")
