"""Random small networks, as users write them, and how many laws they have.

The oracle knows nothing of homoflow: the quadratic and linear laws are the null space of
sampled conditions w_i g_j + w_j g_i and g_i, and dim Lie is at least the rank of the span
of sampled gradients at the best of many weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

INPUTS = 2
ACTIVATIONS: dict[str, Callable] = {
    "relu": jax.nn.relu,
    "abs": jnp.abs,
    "leaky": lambda z: jnp.where(z > 0, z, 0.3 * z),
    "square": jnp.square,
    "tanh": jnp.tanh,
    "linear": lambda z: z,
    "exp": lambda z: jnp.exp(0.3 * z),
    "softplus": jax.nn.softplus,
    "relu by product": lambda z: z * (z > 0).astype(z.dtype),
    "half linear": lambda z: jnp.concatenate([z[:1], jax.nn.relu(z[1:])]),
    "powers": lambda z: jnp.abs(z) ** jnp.arange(1.0, 1.0 + z.shape[0]),
}


class Network(eqx.Module):
    """Stages one after another, and a dense layer at the end."""

    p: list[dict[str, jax.Array]]
    stages: tuple[Callable, ...] = eqx.field(static=True)

    def __call__(self, x):
        for p, stage in zip(self.p, self.stages, strict=True):
            x = stage(p, x)
        return x


class Case(NamedTuple):
    name: str
    model: Network
    loss: Callable
    draw_target: Callable[[np.random.Generator], Any]


def _dense(n, k, act, bias):
    shapes = {"W": (k, n)} | ({"b": (k,)} if bias else {})
    return shapes, lambda p, h: act(p["W"] @ h + p.get("b", 0.0)), k


def _stages(n: int, k: int, act: Callable) -> dict[str, tuple[dict, Callable, int]]:
    """Stages from n to k numbers (or n), by name: shapes, function, width."""
    swap = jnp.arange(n)[::-1]
    return {
        "dense": _dense(n, k, act, False),
        "dense with bias": _dense(n, k, act, True),
        "gain": ({"g": (n,)}, lambda p, h: act(p["g"] * h), n),
        "exponential gain": (
            {"s": (n,), "W": (k, n)},
            lambda p, h: act(p["W"] @ (jnp.exp(p["s"]) * h)),
            k,
        ),
        "difference of squares": (
            {"u": (n,), "v": (n,)},
            lambda p, h: (p["u"] ** 2 - p["v"] ** 2) * h,
            n,
        ),
        "product of gains": ({"u": (n,), "v": (n,)}, lambda p, h: p["u"] * p["v"] * h, n),
        "gated": (
            {"W": (k, n), "V": (k, n)},
            lambda p, h: (p["W"] @ h) * act(p["V"] @ h),
            k,
        ),
        "softmax gate": (
            {"G": (2, n), "W": (2, k, n)},
            lambda p, h: jnp.einsum(
                "e,ei->i", jax.nn.softmax(p["G"] @ h), act_rows(act, p["W"] @ h)
            ),
            k,
        ),
        "residual": ({"A": (n, n)}, lambda p, h: h + act(p["A"] @ h), n),
        "residual of two": (
            {"A": (k, n), "B": (n, k)},
            lambda p, h: h + p["B"] @ act(p["A"] @ h),
            n,
        ),
        "sum of two branches": (
            {"A": (k, n), "B": (k, n)},
            lambda p, h: act(p["A"] @ h) + act(p["B"] @ h),
            k,
        ),
        "centred": (
            {"W": (k, n)},
            lambda p, h: (lambda z: act(z - z.mean()))(p["W"] @ h),
            k,
        ),
        "normalized": (
            {"W": (k, n)},
            lambda p, h: (lambda z: z / jnp.sqrt(jnp.sum(z**2)))(p["W"] @ h),
            k,
        ),
        "clipped": (
            {"W": (k, n)},
            lambda p, h: act(jnp.clip(p["W"], -10, 10) @ h),
            k,
        ),
        "bounded norm": (
            {"W": (k, n)},
            lambda p, h: act(p["W"] @ h / jnp.maximum(1, jnp.sum(p["W"] ** 2) / 300)),
            k,
        ),
        "scan": (
            {"W": (2, n, n)},
            lambda p, h: jax.lax.scan(lambda h, w: (act(w @ h), None), h, p["W"])[0],
            n,
        ),
        "scan by index": (
            {"W": (2, n, n)},
            lambda p, h: jax.lax.scan(
                lambda h, i: (act(p["W"][i] @ h), None), h, jnp.arange(2)
            )[0],
            n,
        ),
        "tied": ({"W": (k, n)}, lambda p, h: p["W"].T @ act(p["W"] @ h), n),
        "frozen gain": (
            {"g": (n,)},
            lambda p, h: jax.lax.stop_gradient(p["g"]) * h,
            n,
        ),
        "scattered": (
            {"W": (n, n)},
            lambda p, h: act(jnp.zeros(n).at[swap].add(p["W"] @ h)),
            n,
        ),
        "gathered": ({"W": (n, n)}, lambda p, h: act((p["W"] @ h)[swap]), n),
        "complex gain": (
            {"a": (n,), "b": (n,)},
            lambda p, h: jnp.real(
                jax.lax.complex(p["a"], p["b"]) * jax.lax.complex(h, h[::-1])
            ),
            n,
        ),
        "top unit": (
            {"W": (k, n), "g": (k,)},
            lambda p, h: (lambda z: p["g"][jnp.argmax(z)] * z)(act(p["W"] @ h)),
            k,
        ),
        "attention": (
            {"Q": (1, 1), "K": (1, 1), "V": (1, 1)},
            lambda p, h: (lambda t: (
                jax.nn.softmax((t @ p["Q"].T) @ (t @ p["K"].T).T) @ (t @ p["V"].T)
            ).ravel())(h[:, None]),
            n,
        ),
    }  # fmt: skip


def act_rows(act: Callable, rows):
    return jnp.stack([act(row) for row in rows])


def _cross_entropy(prediction, label):
    return -jax.nn.log_softmax(prediction)[label]


def _one_hot(prediction, label):
    return -jnp.sum(jax.nn.one_hot(label, 2) * jax.nn.log_softmax(prediction))


def _squared(prediction, target):
    return jnp.sum((prediction - target) ** 2)


LOSSES = {
    "squared": (_squared, lambda rng: rng.standard_normal(2)),
    "cross-entropy": (_cross_entropy, lambda rng: rng.integers(0, 2)),
    "one-hot": (_one_hot, lambda rng: rng.integers(0, 2)),
}


def make_case(seed: int) -> Case:
    """The network of a seed: one or two stages, a dense layer, a loss."""
    rng = np.random.default_rng(seed)
    width, names, p, functions = INPUTS, [], [], []
    for _ in range(rng.integers(1, 3)):
        act = str(rng.choice(list(ACTIVATIONS)))
        stages = _stages(width, int(rng.integers(2, 4)), ACTIVATIONS[act])
        name = str(rng.choice(list(stages)))
        shapes, function, width = stages[name]
        names.append(f"{name} ({act})")
        p.append(
            {key: jnp.asarray(rng.standard_normal(s)) for key, s in shapes.items()}
        )
        functions.append(function)
    last = {"V": (2, width)} | ({"c": (2,)} if rng.random() < 0.3 else {})
    p.append({key: jnp.asarray(rng.standard_normal(s)) for key, s in last.items()})
    functions.append(lambda p, h: p["V"] @ h + p.get("c", 0.0))
    loss = str(rng.choice(list(LOSSES)))
    name = f"{seed}: {', '.join(names)}{', bias' if 'c' in last else ''}; {loss}"
    return Case(name, Network(p, tuple(functions)), *LOSSES[loss])


class Oracle:
    """Gradients of a case at weights and data of its own."""

    def __init__(self, case: Case, seed: int = 0):
        self.case, self.rng = case, np.random.default_rng((7, seed))
        flat, self.unravel = ravel_pytree(eqx.filter(case.model, eqx.is_array))
        static = eqx.filter(case.model, eqx.is_array, inverse=True)
        self.size = flat.size

        def gradient(w, x, y):
            def objective(w):
                return case.loss(eqx.combine(self.unravel(w), static)(x), y)

            return jax.grad(objective)(w)

        self.along = jax.jit(jax.vmap(gradient))

    def sample(self, count: int, weights: np.ndarray | None = None):
        """(w, gradient) in rows, where the gradient is finite and not small.

        Some weights are so large that they leave the region of a clip.
        """
        rng = self.rng
        w = np.empty((count, self.size))
        if weights is None:
            size = rng.choice([1.0, 1.0, 1.0, 30.0], (count, 1))
            w[:] = size * rng.standard_normal(w.shape)
        else:
            w[:] = weights
        x = rng.choice([0.5, 1.0, 2.0], (count, 1)) * rng.standard_normal(
            (count, INPUTS)
        )
        y = np.stack([self.case.draw_target(rng) for _ in range(count)])
        g = np.asarray(self.along(w, x, y))
        usable = np.isfinite(g).all(1)
        w, g = w[usable], g[usable]
        # Scaled first: of gradients beyond 1e154 the squares overflow.
        largest = np.max(np.abs(g), axis=1, initial=0.0)
        w, g, largest = w[largest > 0], g[largest > 0], largest[largest > 0]
        g = g / largest[:, None]
        lengths = np.linalg.norm(g, axis=1)
        norms = largest * lengths
        # Where a softmax saturates, what is left of a gradient is rounding: it is of size
        # 1e-16, and no more than 1e-12 of what is kept.
        usual = np.median(norms) if len(norms) else 0.0
        large = (norms > 1e-4 * usual) & (norms > 1e-4)
        return w[large], g[large] / lengths[large, None]

    def null_laws(self) -> tuple[np.ndarray, np.ndarray]:
        """All (A, b) with ⟨2Aw + b, g⟩ = 0, as coefficients of w_i w_j and of w_i."""
        i, j = np.triu_indices(self.size)
        need = len(i) + self.size
        parts = [np.zeros((0, self.size))] * 2
        for _ in range(8):
            more = self.sample(max(400, int(1.3 * need)))
            parts = [np.concatenate(pair) for pair in zip(parts, more, strict=True)]
            if len(parts[0]) > 1.15 * need:
                break
        w, g = parts
        rows = w[:, i] * g[:, j] + np.where(i == j, 0, 1) * w[:, j] * g[:, i]
        rows = np.concatenate([rows * np.where(i == j, 2, 1), g], 1)
        _, values, directions = np.linalg.svd(rows, full_matrices=False)
        null = directions[values < 1e-9 * values[0]]
        return null[:, : len(i)], null[:, len(i) :]

    def rank_of_null_laws(self) -> int:
        """How many independent functions all quadratic laws are, at generic weights."""
        quadratic, linear = self.null_laws()
        i, j = np.triu_indices(self.size)
        ranks = []
        for w in self.rng.standard_normal((3, self.size)):
            slopes = linear.copy()
            for row, c in zip(slopes, quadratic, strict=True):
                np.add.at(row, i, c * w[j])
                np.add.at(row, j, c * w[i])
            ranks.append(rank(slopes))
        return max(ranks)

    def rank_of_gradients(self, tries: int = 60) -> int:
        """A lower bound of dim Lie, from single fields at the best of many weights."""
        best = 0
        for w in self.rng.standard_normal((tries, self.size)):
            best = max(best, rank(self.sample(4 * self.size + 20, w)[1], 1e-8))
        return best

    def judge(self, laws) -> tuple[int, float]:
        """The rank of laws as functions, and by how much one is violated, relatively."""

        def values(w):
            model = eqx.combine(self.unravel(w), self.case.model)
            return jnp.concatenate([jnp.ravel(law.value(model)) for law in laws])

        if not len(laws):
            return 0, 0.0
        jacobian = jax.jit(jax.jacfwd(values))
        ranks, worst = [], 0.0
        for size in (1.0, 1.0, 0.3, 30.0):
            w = size * self.rng.standard_normal(self.size)
            slopes = np.asarray(jacobian(w))
            ranks.append(rank(slopes))
            _, g = self.sample(60, w)
            if len(g):
                cancel = (np.abs(slopes) @ np.abs(g).T).max(1, initial=0.0)
                error = np.abs(slopes @ g.T).max(1, initial=0.0)
                # Rounding of a gradient of length 1 is 1e-15: below 1e-4 it may show.
                least = 1e-4 * np.linalg.norm(slopes, axis=1)
                scale = np.maximum(cancel, least)
                worst = max(worst, float((error / np.where(scale > 0, scale, 1)).max()))
        return max(ranks), worst


def rank(rows: np.ndarray, tolerance: float = 1e-7) -> int:
    """The rank of the rows, each taken at length one."""
    norms = np.linalg.norm(rows, axis=1)
    rows = rows[norms > 0] / norms[norms > 0, None]
    if not len(rows):
        return 0
    values = np.linalg.svd(rows, compute_uv=False)
    return int((values > tolerance * values[0]).sum())
