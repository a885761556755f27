"""The ledger's parts of many Optax chains, against their definition evaluated step by step.

A part is what the optimizer makes of the memory alone, or of the weights alone; NumPy does
all that is done with it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import oracles
import pytest
from oracles import RATE, laws_and_others, network
from problems import arrays_of

import homoflow as hf

LAWS = laws_and_others()[2:]
STEPS = 6


def is_big(params):
    return jax.tree.map(lambda leaf: leaf.size > 10, params)


def from_step_3(transformation):
    return optax.conditionally_transform(transformation, lambda step: step >= 3)


def late_rate(step):
    return jnp.where(step >= 4, RATE, 0.0)


def by_size(big, small):
    return optax.multi_transform({True: big, False: small}, is_big)


def rough(gradient, _):
    return gradient - 0.5 * jnp.roll(gradient, 1)


chain, decay = optax.chain, optax.add_decayed_weights
sgd, heavy = optax.sgd(RATE), optax.sgd(RATE, momentum=0.75)
# name: (optimizer, parts that are separate)
CHAINS = {
    "two averages": (chain(optax.trace(0.5), heavy), "momentum"),
    "corrected average": (chain(optax.ema(0.5), sgd), "momentum"),
    "single precision": (
        optax.sgd(RATE, momentum=0.5, accumulator_dtype=jnp.float32), "momentum",
    ),
    "four in one": (
        optax.MultiSteps(heavy, 3).gradient_transformation(), "momentum",
    ),
    "a sum of three": (
        optax.MultiSteps(sgd, 3, use_grad_mean=False).gradient_transformation(), "momentum",
    ),
    "three Adams in one": (
        optax.MultiSteps(optax.adam(RATE), 3).gradient_transformation(), "",
    ),
    "every second": (chain(optax.apply_every(2), sgd), "momentum"),
    "injected": (optax.inject_hyperparams(optax.sgd)(RATE, momentum=0.5), "momentum"),
    "injected schedule": (
        optax.inject_hyperparams(optax.sgd)(lambda k: RATE / (1 + k)), "",
    ),
    "decay by schedule": (chain(decay(lambda k: 0.1 * k), sgd), "decay"),
    "late decay": (chain(from_step_3(decay(0.2)), sgd), "decay"),
    "late momentum": (chain(from_step_3(optax.trace(0.5)), sgd), "momentum"),
    "late signs": (chain(from_step_3(optax.scale_by_sign()), sgd), ""),
    "late start": (
        optax.sgd(
            late_rate,
            momentum=0.75,
        ),
        "momentum",
    ),
    "decay of the big array": (
        chain(optax.masked(decay(0.1), is_big), heavy), "momentum decay",
    ),
    "rates by size": (by_size(optax.sgd(RATE / 8), sgd), ""),
    "momentum by size": (by_size(heavy, sgd), "momentum"),
    "Adam by size": (by_size(optax.adam(RATE), sgd), ""),
    "a frozen array": (by_size(optax.set_to_zero(), sgd), ""),
    "smoothed": (chain(optax.stateless_with_tree_map(rough), heavy), "momentum"),
    "flattened": (optax.flatten(sgd), ""),
    "flattened momentum and decay": (
        optax.flatten(chain(optax.add_decayed_weights(0.1), heavy)), "momentum decay",
    ),
    "clipped, then momentum": (chain(optax.clip(0.1), heavy), "momentum"),
    "clipped norm, then momentum": (
        chain(optax.clip_by_global_norm(0.4), heavy), "momentum",
    ),
    "AdamW": (optax.adamw(RATE, weight_decay=0.3), "decay"),
    "Lion": (optax.lion(RATE, weight_decay=0.3), "decay"),
    "trust": (optax.lars(RATE), "momentum"),
    "finite only": (optax.apply_if_finite(heavy, 3), "momentum"),
    "plateau": (
        chain(heavy, optax.contrib.reduce_on_plateau(factor=0.5, patience=1)), "momentum",
    ),
    "line search": (chain(sgd, optax.scale_by_backtracking_linesearch(4)), ""),
    "Polyak": (optax.polyak_sgd(), ""),
    "decay to the power": (
        chain(optax.stateless(lambda u, w: jax.tree.map(lambda a, b: a + b**3, u, w)), sgd),
        "decay",
    ),
}  # fmt: skip


def value_of(model) -> jax.Array:
    first, second = jax.tree.leaves(model)
    residual = oracles.X @ first.T @ second.T - oracles.Y
    return 0.5 * jnp.sum(residual**2) / len(oracles.X)


def steps_of(optimizer):
    """Weights and states before each step, gradients and updates."""
    params = eqx.filter(network(), eqx.is_inexact_array)
    state = optimizer.init(params)

    def update(gradient, state, params):
        value = value_of(params)
        return optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=value_of
        )

    update = jax.jit(update)
    gradient_of = jax.jit(jax.grad(value_of))
    for _ in range(STEPS):
        gradient = gradient_of(params)
        moved, after = update(gradient, state, params)
        yield params, state, gradient, moved, update
        params, state = optax.apply_updates(params, moved), after


def without_memory(state):
    def clear(leaf):
        is_memory = eqx.is_inexact_array(leaf) and leaf.ndim > 0
        return jnp.zeros_like(leaf) if is_memory else leaf

    return jax.tree.map(clear, state)


def books_of(optimizer, separate) -> dict[str, dict]:
    """Part → law → sum, with each part as it is defined."""
    books = {}
    for params, state, gradient, moved, update in steps_of(optimizer):
        w, g, u = map(arrays_of, (params, gradient, moved))
        zeros = jax.tree.map(jnp.zeros_like, params)
        alone = {
            "momentum": (zeros, state, zeros),
            "decay": (zeros, without_memory(state), params),
        }
        parts = {part: arrays_of(update(*alone[part])[0]) for part in separate}
        rest = oracles.plus(u, *(oracles.times(-1, part) for part in parts.values()))
        multiple = sum((a * b).sum() for a, b in zip(rest, g, strict=True))
        parts["gradient"] = oracles.times(multiple / sum((a**2).sum() for a in g), g)
        parts["transformation"] = oracles.plus(
            rest, oracles.times(-1, parts["gradient"])
        )
        added = {name: oracles.rate(w, part) for name, part in parts.items()}
        added["discretization"] = oracles.q(u)
        for name, rates in added.items():
            sums = books.setdefault(name, dict.fromkeys(rates, 0))
            books[name] = {law: sums[law] + rate for law, rate in rates.items()}
    return books


def ledger_of(optimizer) -> hf.Ledger:
    tracked = hf.track(LAWS, optimizer)
    *_, (params, state, gradient, moved, update) = steps_of(tracked)
    _, state = update(gradient, state, params)
    return hf.tracked(state, optax.apply_updates(params, moved))


@pytest.mark.parametrize("name", CHAINS)
def test_parts_are_what_memory_and_weights_do_alone(name, quick_compilation):
    optimizer, separate = CHAINS[name]
    optimizer = optax.with_extra_args_support(optimizer)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes on purpose.
        books, ledger = books_of(optimizer, separate.split()), ledger_of(optimizer)
    for law, mine in ledger.items():
        for part, sums in books.items():
            np.testing.assert_allclose(
                getattr(mine, part), sums[law], rtol=0, atol=1e-13, err_msg=part
            )
        assert np.abs(mine.rounding).max() < 1e-13
        assert set(separate.split()) == {"momentum", "decay"} & set(mine.parts)
    assert "Something else" not in ledger.note
