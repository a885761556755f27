"""Independent oracles: what homoflow must agree with, computed another way.

- `relu_gradient` and `midpoint` for networks with kinks and their flow;
- `account`, in NumPy, of what a step does to the laws of a linear network of two layers,
    for its squared loss and optimizers that are written out by hand;
- `compilations`, XLA's own count.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.tree_util import GetAttrKey, SequenceKey
from jaxtyping import Array
from problems import SAMPLES

import homoflow as hf
from homoflow._laws._law import Entries, Term

#: A power of two: Optax computes schedules in single precision.
RATE = 2.0**-6
MOMENTUM, DECAY, CLIP = 0.8, 0.3, 0.4
PARTS = ("gradient", "momentum", "decay", "transformation")
X, Y = (
    np.random.default_rng(s).standard_normal((SAMPLES, n)) for s, n in ((1, 3), (2, 2))
)
Arrays = list[np.ndarray]


@contextlib.contextmanager
def compilations():
    """A list that grows by one for each XLA compilation."""
    seen = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def relu_gradient(weights: list[np.ndarray], x: np.ndarray, y: np.ndarray):
    """∇ of (1/m) Σ ½‖f(x_i) − y_i‖²; leading axes of the weights are a batch."""
    inputs, before = [x], []
    for w in weights:
        before.append(inputs[-1] @ w.swapaxes(-1, -2))
        inputs.append(np.maximum(before[-1], 0))
    error = (before[-1] - y) / len(x)
    gradients = []
    for w, h in zip(weights[::-1], range(len(weights) - 1, -1, -1), strict=True):
        gradients.insert(0, error.swapaxes(-1, -2) @ inputs[h])
        if h:
            error = (error @ w) * (before[h - 1] > 0)
    return gradients


@eqx.filter_jit
def midpoint(model, data, t1, steps) -> Array:
    """Explicit midpoint with constant steps, on autodiff's gradient: flat weights."""
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    w0, unravel = jax.flatten_util.ravel_pytree(arrays)
    x, y = data

    def loss(w):
        predictions = jax.vmap(eqx.combine(unravel(w), rest))(x)
        return 0.5 * jnp.sum((predictions - y) ** 2) / len(x)

    gradient, step = jax.grad(loss), t1 / steps.astype(w0.dtype)

    def step_on(_, w):
        return w - step * gradient(w - 0.5 * step * gradient(w))

    return jax.lax.fori_loop(0, steps, step_on, w0)


# What a step does to laws.


def network(dtype=jnp.float64) -> hf.MLP:
    model = hf.MLP((3, 4, 2), activation="linear", key=jax.random.key(4))
    return jax.tree.map(lambda w: w.astype(dtype), model)


def weight(h):
    return (GetAttrKey("layers"), SequenceKey(h - 1), GetAttrKey("weight"))


def laws_and_others() -> list[hf.Law]:
    """The laws of the network, one with b ≠ 0 and one of entries that are not conserved."""
    mixed = hf.Law(
        "mixed", "", "units", (Term(weight(1), 1),), (Term(weight(2), 3, axis=1),)
    )
    entries = hf.Law(
        "entries", "", "total", (),
        entries=(
            Entries(weight(1), (1,), (2.0,), weight(2), (5,)),
            Entries(weight(1), (0,), (-1.0,)),
        ),
    )  # fmt: skip
    return [*hf.laws(network()), mixed, entries]


def values(w: Arrays) -> dict[str, np.ndarray]:
    """Each of them, as a formula."""
    first, second = w
    matrix = first @ first.T - second.T @ second
    return {
        "neurons[1]": np.diag(matrix),
        "layers[1]": np.trace(matrix),
        "matrix[1]": matrix,
        "mixed": (first**2).sum(axis=1) + 3 * second.sum(axis=0),
        "entries": 2 * first[0, 1] * second[1, 1] - first[0, 0],
    }


def q(u: Arrays) -> dict[str, np.ndarray]:
    plus, minus = values(u), values([-a for a in u])
    return {name: (plus[name] + minus[name]) / 2 for name in plus}


def rate(w: Arrays, u: Arrays) -> dict[str, np.ndarray]:
    """⟨2Aw + b, u⟩, by polarization."""
    plus, minus = (
        values([a + s * b for a, b in zip(w, u, strict=True)]) for s in (1, -1)
    )
    return {name: (plus[name] - minus[name]) / 2 for name in plus}


def gradient(w: Arrays, batch=slice(None)) -> Arrays:
    """∇ of (1/m) Σ ½‖W₂W₁x − y‖²."""
    x, y = X[batch], Y[batch]
    error = (x @ w[0].T @ w[1].T - y) / len(x)
    return [(error @ w[1]).T @ x, error.T @ (x @ w[0].T)]


# Optimizers written out by hand: (w, g, memory, step) -> the parts of the update, and
# the memory after it. A rule does its part of `PARTS`; what turns the gradient comes as
# `turned`.


def sgd(w, g, memory, step, rate=RATE):
    return {"gradient": times(-rate, g)}, None


def scheduled(w, g, memory, step):
    return sgd(w, g, memory, step, RATE * 0.5**step)


def heavy_ball(w, g, memory, step):
    memory = memory or times(0, g)
    parts = {"gradient": times(-RATE, g), "momentum": times(-RATE * MOMENTUM, memory)}
    return parts, plus(g, times(MOMENTUM, memory))


def nesterov(w, g, memory, step):
    memory = memory or times(0, g)
    parts = {
        "gradient": times(-RATE * (1 + MOMENTUM), g),
        "momentum": times(-RATE * MOMENTUM**2, memory),
    }
    return parts, plus(g, times(MOMENTUM, memory))


def coupled_nesterov(w, g, memory, step):
    memory = memory or times(0, g)
    ahead = -RATE * (1 + MOMENTUM)
    parts = {
        "gradient": times(ahead, g),
        "decay": times(ahead * DECAY, w),
        "momentum": times(-RATE * MOMENTUM**2, memory),
    }
    return parts, plus(g, times(DECAY, w), times(MOMENTUM, memory))


def decoupled_heavy_ball(w, g, memory, step):
    parts, memory = heavy_ball(w, g, memory, step)
    return parts | {"decay": times(-RATE * DECAY, w)}, memory


def clipped_norm(w, g, memory, step):
    size = np.sqrt(sum((a**2).sum() for a in g))
    return {"gradient": times(-RATE * min(1, CLIP / size), g)}, None


def clipped(w, g, memory, step):
    return {"turned": [-RATE * np.clip(a, -CLIP / 4, CLIP / 4) for a in g]}, None


def signs(w, g, memory, step):
    return {"turned": [-RATE * np.sign(a) for a in g]}, None


def adam(w, g, memory, step, b1=0.9, b2=0.999, eps=1e-8):
    first, second = memory or (times(0, g), times(0, g))
    first = plus(times(b1, first), times(1 - b1, g))
    second = plus(times(b2, second), [(1 - b2) * a**2 for a in g])
    debias = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
    turned = [
        -RATE * (m / debias[0]) / (np.sqrt(v / debias[1]) + eps)
        for m, v in zip(first, second, strict=True)
    ]
    return {"turned": turned}, (first, second)


def adamw(w, g, memory, step):
    parts, memory = adam(w, g, memory, step)
    return parts | {"decay": times(-RATE * DECAY, w)}, memory


def times(c, arrays: Arrays) -> Arrays:
    return [c * a for a in arrays]


def plus(*summands: Arrays) -> Arrays:
    return [sum(arrays) for arrays in zip(*summands, strict=True)]


# The account.


def account(
    w: Arrays, rule: Callable, batches: list
) -> tuple[list[Arrays], list[dict]]:
    """Weights, and part → law → sum so far, before each step and at the end."""
    memory: Any = None
    history = [w]
    books = [{part: times_all(0, values(w)) for part in ("discretization", *PARTS)}]
    for step, batch in enumerate(batches):
        g = gradient(w, batch)
        parts, memory = rule(w, g, memory, step)
        update = plus(*parts.values())
        added = {name: rate(w, u) for name, u in _by_part(parts, g).items()}
        added["discretization"] = q(update)
        books.append(
            {
                part: {n: v + added.get(part, {}).get(n, 0) for n, v in sums.items()}
                for part, sums in books[-1].items()
            }
        )
        w = plus(w, update)
        history.append(w)
    return history, books


def _by_part(parts: dict, g: Arrays) -> dict:
    """What turns the gradient, as a multiple of it and the rest."""
    turned = parts.get("turned")
    if turned is None:
        return parts
    parts = {name: part for name, part in parts.items() if name != "turned"}
    multiple = sum((a * b).sum() for a, b in zip(turned, g, strict=True))
    multiple = multiple / sum((a**2).sum() for a in g)
    rest = [a - multiple * b for a, b in zip(turned, g, strict=True)]
    return parts | {"gradient": times(multiple, g), "transformation": rest}


def times_all(c, values: dict) -> dict:
    return {name: c * value for name, value in values.items()}


def largest_margin(x, y):
    """The direction of the hard-margin support vector machine, and its margin."""
    rows = np.asarray(y)[:, None] * np.asarray(x)
    found = scipy.optimize.minimize(
        lambda w: 0.5 * w @ w,
        np.ones(rows.shape[1]),
        jac=lambda w: w,
        constraints={
            "type": "ineq",
            "fun": lambda w: rows @ w - 1,
            "jac": lambda w: rows,
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    size = np.linalg.norm(found.x)
    assert (rows @ found.x).min() > 1 - 1e-9
    return found.x / size, 1 / size
