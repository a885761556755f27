"""ReLU networks from vanishing starts, beside their limit flow in closed form."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import homoflow as hf

pytestmark = pytest.mark.usefixtures("quick_compilation")

SAMPLES, FEATURES, UNITS, SEEDS = 6, 3, 5, 64


def balanced_net(seed, size):
    """Units with |a| = ‖w‖, of `size` times usual weights, and data."""
    of_x, of_y, of_model = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(of_x, (SAMPLES, FEATURES))
    y = jax.random.normal(of_y, (SAMPLES, 1))
    model = hf.MLP((FEATURES, UNITS, 1), key=of_model)
    w, a = (layer.weight for layer in model.layers)
    a = jnp.sign(a) * jnp.linalg.norm(w, axis=1)
    model = eqx.tree_at(lambda m: m.layers[1].weight, model, a)
    return jax.tree.map(lambda v: size * v, model), (x, y)


class LimitFlow:
    """w' = aD, a' = w·D of one unit as long as f = 0.

    D = (1/m) Σ y_i 1[w·x_i > 0] x_i is constant between kinks, where w and a are
    combinations of cosh |D|t and sinh |D|t.
    At a kink the sides are tried one by one, and the share of a sample on which the unit
    stays is what keeps w·x_i at 0 [Filippov 1988].
    """

    def __init__(self, w, a, x, y):
        self.w, self.a, self.x, self.y, self.t = w, a, x, y / len(y), 0.0
        self.side = np.sign(x @ w).astype(int)
        self.push = x.T @ (self.y * (self.side > 0))
        self.slides = 0

    def ahead(self, time):
        """∫a, and a."""
        speed = np.linalg.norm(self.push)
        if speed == 0:
            return self.a * time, self.a
        along, c, s = (
            self.w @ self.push / speed,
            np.cosh(speed * time),
            np.sinh(speed * time),
        )
        return (self.a * s + along * (c - 1)) / speed, self.a * c + along * s

    def at(self, time):
        area, a = self.ahead(time)
        return self.w + self.push * area, a

    def next_kink(self, longest):
        """When w·x_i is 0 next, and for which i."""
        found = (longest, None)
        for i in np.flatnonzero(self.side):
            z, rate = self.x[i] @ self.w, self.x[i] @ self.push

            side = self.side[i]

            def to_kink(time: float, z=z, rate=rate, side=side) -> float:
                return side * (z + rate * self.ahead(time)[0])

            if to_kink(found[0]) < 0:
                # What has just left a kink is on the wrong side by rounding.
                starts = (0.0, *np.geomspace(1e-14, 1e-6, 9))
                first = next(s for s in starts if to_kink(s) > 0)
                found = (
                    scipy.optimize.brentq(to_kink, first, found[0], xtol=1e-15),
                    i,
                )
        return found

    def turn(self):
        """The sides of what is at its kink from here on, and their push."""
        at_kink, found = np.flatnonzero(self.side == 0), []
        others = self.x.T @ (self.y * (self.side > 0))
        for sides in itertools.product((-1, 0, 1), repeat=len(at_kink)):
            on, stays = (at_kink[np.equal(sides, s)] for s in (1, 0))
            push = others + self.x[on].T @ self.y[on]
            back = np.linalg.lstsq(self.x[stays].T, -push, rcond=None)[0]
            push = push + self.x[stays].T @ back
            shares = back / self.y[stays]
            rates = np.sign(self.a) * (self.x[at_kink] @ push)
            leaves = np.not_equal(sides, 0)
            goes = np.sign(rates[leaves]) == np.asarray(sides)[leaves]
            if np.all(goes) and np.all((shares >= 0) & (shares <= 1)):
                found.append((sides, push))
        ((sides, self.push),) = found  # One way on: else the flow is not unique.
        self.side[at_kink] = sides
        self.slides += int(np.sum(np.equal(sides, 0)))

    def follow(self, ts):
        states = []
        for t in ts:
            while True:
                time, kink = self.next_kink(t - self.t)
                if kink is None:
                    break
                self.w, self.a = self.at(time)
                self.t += time
                self.side[kink] = 0
                self.turn()
            states.append(self.at(t - self.t))
        return (np.stack(part) for part in zip(*states, strict=True))


def limit_flow(seed, ts):
    """w and a of all units at all times, of a start of size 1, and how often one slides."""
    model, (x, y) = balanced_net(seed, 1.0)
    w, a = (np.asarray(layer.weight) for layer in model.layers)
    parts, slides = [], 0
    for unit in range(UNITS):
        flow = LimitFlow(w[unit], a[0, unit], np.asarray(x), np.asarray(y)[:, 0])
        parts.append(tuple(flow.follow(ts)))
        slides += flow.slides
    return (
        np.stack([p[0] for p in parts], 1),
        np.stack([p[1] for p in parts], 1),
        slides,
    )


def units(w):
    return w / np.linalg.norm(w, axis=-1, keepdims=True)


@pytest.mark.parametrize("digits", [8, 15, 30, 150])
def test_directions_are_those_of_the_limit_flow(digits):
    ts, size, slides = np.linspace(0, 6, 13), 10.0**-digits, 0
    for seed in range(SEEDS):
        model, data = balanced_net(seed, size)
        run = hf.flow(model, data, ts[-1], ts=ts, save_models=True, laws=())
        assert run.stats["solver"] == "Filippov"
        w, a, slid = limit_flow(seed, ts)
        assert run.models is not None
        slides += slid
        hidden, out = (np.asarray(layer.weight) / size for layer in run.models.layers)
        np.testing.assert_allclose(units(hidden), units(w), atol=1e-7)
        np.testing.assert_allclose(out[:, 0], a, rtol=1e-6)
    assert slides > 50


def test_to_half_of_the_escape_directions_of_large_units_are_right():
    of_large_units, of_all = 0.0, 0.0
    for seed in range(SEEDS):
        model, data = balanced_net(seed, 1e-30)
        x, y = map(np.asarray, data)
        ts = np.linspace(0, 0.5, 6) * 30 * np.log(10)
        ts = ts / np.mean(np.abs(y[:, 0]) * np.linalg.norm(x, axis=1))
        run = hf.flow(model, data, ts[-1], ts=ts, save_models=True, laws=(), rtol=1e-9)
        w, *_ = limit_flow(seed, ts)
        assert run.models is not None
        hidden = np.asarray(run.models.layers[0].weight) * 1e30
        sizes = np.linalg.norm(w, axis=2)
        share = sizes / np.linalg.norm(sizes, axis=1)[:, None]
        off = np.linalg.norm(hidden / sizes[..., None] - units(w), axis=2)
        of_large_units = max(of_large_units, np.max(off[share > 1e-4]))
        of_all = max(of_all, np.max(share * off))
    assert of_large_units < 1e-6
    assert of_all < 1e-7


def test_weights_too_small_for_products_are_refused():
    model, data = balanced_net(0, 1e-280)
    with pytest.raises(hf.TrajectoryError, match="below 1e-246"):
        hf.flow(model, data, 1.0)
    zero = jax.tree.map(jnp.zeros_like, model)
    assert hf.flow(zero, data, 1.0).result == hf.RESULTS.successful
