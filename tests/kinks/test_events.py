"""What the exact flow tells of its events, against closed forms and forward passes."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from jaxtyping import Array

import homoflow as hf
import homoflow.plot
from homoflow._jaxpr import expose_kinks
from homoflow._kinks._layers import kink_layers

pytestmark = pytest.mark.usefixtures("quick_compilation")

matplotlib.use("Agg")
END = 1.5


class Toys(eqx.Module):
    """Small problems that do not know of each other, side by side: L is their sum.

    - `crossed`: ½(φ(c) + 1)² with φ a leaky relu: c = (c₀ + 1)e⁻ᵗ − 1 crosses 0 down
        at t = ln(1 + c₀).
    - `entered`: |e| is reached at t = |e₀|, and kept.
    - `left_up`: |u| − up − p: p = p₀ + t while u = 0, which is left at p = 1; after that
        u = cosh s − 1, p = 1 + sinh s. `left_down` is its mirror image.
    - `convex`, `concave`: |k| and −|k| from k = 0.
    - `turned`: h·relu(r) − 0.3·rh + h from r = 0: h = h₀ − t, and r slides until h = 0,
        where its kink turns concave.
    - `jumped`: |a| − ¼a − 3 relu(b + |a|) − b from a = 0: b = b₀ + t, and a slides until
        b = 0, where the jump at a becomes 1 − 3: concave at once.
    """

    crossed: Array
    entered: Array
    left_up: Array
    left_down: Array
    convex: Array
    concave: Array
    turned: Array
    jumped: Array

    def __call__(self, x):
        (u, p), (d, q) = self.left_up, self.left_down
        (r, h), (a, b) = self.turned, self.jumped
        losses = [
            0.5 * jnp.sum((jax.nn.leaky_relu(self.crossed, 0.1) + 1) ** 2),
            jnp.sum(jnp.abs(self.entered)),
            jnp.abs(u) - u * p - p,
            jnp.abs(d) + d * q - q,
            h * jax.nn.relu(r) - 0.3 * r * h + h,
            (of_a := jnp.abs(a)) - 0.25 * a - 3 * jax.nn.relu(b + of_a) - b,
            jnp.abs(self.convex),
            -jnp.abs(self.concave),
        ]
        return x[0] * jnp.stack(losses)


def total(prediction, target):
    return jnp.sum(prediction)


@pytest.fixture(scope="module")
def toys():
    start = Toys(
        *map(jnp.asarray, ([2.0, 0.5, 1.0], [0.55, -0.7], [0.0, 0.25], [0.0, 0.1])),
        *map(jnp.asarray, (0.0, 0.0, [0.0, 0.6], [0.0, -0.8])),
    )
    one = jnp.ones((1, 1))
    return hf.flow(
        start, (one, one), END, loss=total, rtol=1e-10, ts=[0.0, 0.6, END],
        solver=hf.Filippov(max_active=12, events=60),
    )  # fmt: skip


def of_kind(events, *kinds):
    """(time, layer, unit) of the events of these kinds."""
    return [(e.time, e.layer, e.unit) for e in events if e.kind in kinds]


def test_crossings_happen_when_they_should(toys):
    found = of_kind(toys.events, "crossing_down")
    expected = sorted((np.log(1 + c), 1, (i,)) for i, c in enumerate([2.0, 0.5, 1.0]))
    assert [e[1:] for e in found] == [e[1:] for e in expected]
    np.testing.assert_allclose(
        [e[0] for e in found], [e[0] for e in expected], rtol=1e-9
    )


def test_entries_happen_when_they_should(toys):
    entries = of_kind(toys.events, "entry")
    # At the start those that begin at 0, and attract there: all but the concave one.
    assert entries[:-2] == [(0.0, layer, ()) for layer in (3, 4, 5, 6, 9)]
    assert [e[1:] for e in entries[-2:]] == [(2, (0,)), (2, (1,))]
    np.testing.assert_allclose([e[0] for e in entries[-2:]], [0.55, 0.7], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "layer", "kind", "time"),
    [("left_up", 3, "exit_up", 0.75), ("left_down", 4, "exit_down", 0.9)],
)
def test_exits_happen_when_they_should(toys, name, layer, kind, time):
    (found,) = (e for e in of_kind(toys.events, kind) if e[1] == layer)
    # An exit waits for its slope to be 1e-5 of the width, 2, outside its interval.
    assert time <= found[0] < time + 2.1e-5
    s = END - time
    left = np.array([np.cosh(s) - 1, 1 + np.sinh(s)])
    left[0] *= 1 if kind == "exit_up" else -1
    np.testing.assert_allclose(getattr(toys.model, name), left, rtol=1e-8)


def chosen_side(toys, layer):
    """Time and side of the choice at a layer, which must be the only one there."""
    (choice,) = (
        (e.time, 1 if e.kind == "choice_up" else -1)
        for e in toys.events
        if e.kind.startswith("choice") and e.layer == layer
    )
    return choice


def test_a_start_on_a_concave_kink_is_a_choice(toys):
    """k̇ = sign k: k = ±t, or 0 for some time before that."""
    time, side = chosen_side(toys, 8)
    assert time == 0
    np.testing.assert_allclose(toys.model.concave, side * END, rtol=1e-12)


def test_a_slider_whose_kink_turns_concave_is_a_choice(toys):
    time, side = chosen_side(toys, 5)
    assert 0.6 <= time < 0.6 + 1e-5
    s, rate = END - 0.6, 0.3 if side < 0 else 0.7
    # ṙ = rate·h downwards and −rate·h upwards, ḣ = −1 − rate·|r|.
    r = side * (np.cosh(rate * s) - 1) / rate
    h = -np.sinh(rate * s) / rate
    np.testing.assert_allclose(toys.model.turned, [r, h], rtol=1e-4)


def test_a_slider_that_a_crossing_makes_concave_is_a_choice(toys):
    time, side = chosen_side(toys, 6)
    assert time == pytest.approx(0.8, rel=1e-9)
    s = END - 0.8
    # |a| grows at 2 ± ¼, and b at 1 + 3.
    np.testing.assert_allclose(
        toys.model.jumped, [side * (2 + 0.25 * side) * s, 4 * s], rtol=1e-8
    )
    assert of_kind(toys.events, "crossing_up") == [(time, 7, ())]


def test_nothing_else_is_told(toys):
    events = list(toys.events)
    # Three choices; convex kinks, crossings, and sliders that leave are none.
    assert sum(e.kind.startswith("choice") for e in events) == 3
    assert toys.stats["num_nonunique_pairs"] == 3
    assert toys.stats["first_nonunique_time"] == 0
    assert len(events) == len(toys.events) == 3 + 7 + 2 + 2 + 1 + 3
    assert toys.events.dropped == 0
    assert toys.events.complete_until == END
    assert toys.stats["forced_steps"] == 0
    assert "3 pairs with a choice" in repr(toys)
    assert [e.time for e in events] == sorted(e.time for e in events)


def test_units_of_any_model_have_names(toys):
    names = [toys.events.label(kink) for kink in range(11)]
    assert names[:5] == [
        *(f"leaky_relu 1, unit {i}" for i in range(3)), "abs 2, unit 0", "abs 2, unit 1",
    ]  # fmt: skip
    assert names[5:] == ["abs 3", "abs 4", "relu 5", "abs 6", "relu 7", "abs 8"]
    assert toys.events.label(11) == "abs 9"
    with pytest.raises(IndexError, match="12 units"):
        toys.events.layer_of(12)


def test_what_is_printed_names_samples_and_units(toys):
    text = repr(toys.events)
    assert "18 kept, 0 dropped" in text
    assert "entry" in text
    assert "sample 0, abs 3" in text


SEED, SIZES, SAMPLES = 13, (3, 3, 3, 1), 10
ROOM = 200


def data():
    return jr.normal(jr.key(6), (SAMPLES, 3)), jr.normal(jr.key(7), (SAMPLES, 1))


def network(seed):
    return hf.MLP(SIZES, key=jr.key(seed))


def solved(model, problem):
    return hf.flow(
        model, problem, 20.0, laws=(), save_models=True,
        solver=hf.Filippov(max_active=40, events=ROOM),
    )  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return solved(network(SEED), data())


def preactivations(run):
    """z at all recorded times, by NumPy: (times, samples, 6)."""
    first, second, _ = (np.asarray(a.weight) for a in run.models.layers)
    below = np.einsum("tij,mj->tmi", first, np.asarray(data()[0]))
    above = np.einsum("tij,tmj->tmi", second, np.maximum(below, 0))
    return np.concatenate([below, above], 2)


SIDES = {
    "crossing_up": 1, "crossing_down": -1, "entry": 0, "exit_up": 1, "exit_down": -1,
}  # fmt: skip


def sides(run):
    """The side of every pair at all recorded times: the list, replayed from z at 0."""
    z = preactivations(run)
    side = np.where(z[0] > 0, 1, -1)
    events, over_time = list(run.events), []
    for t in np.asarray(run.ts):
        while events and events[0].time <= t:
            e = events.pop(0)
            if e.kind in SIDES:
                kink = e.unit[0] + SIZES[1] * (e.layer - 1)
                side[e.sample, kink] = SIDES[e.kind]
        over_time.append(side.copy())
    assert not events
    return z, np.stack(over_time)


def test_forward_passes_agree_with_the_list(run):
    z, side = sides(run)
    zero = np.abs(z) < 1e-10
    np.testing.assert_array_equal(np.sign(z)[~zero], side[~zero])
    assert np.all(zero[side == 0])
    # A pair that nothing reaches is at 0 and does not slide: layer 2, layer 1 being off.
    below_is_off = np.all(z[..., :3] <= 1e-10, 2)
    idle = zero & (side != 0)
    assert np.any(idle)
    assert np.all(below_is_off[np.any(idle, 2)])
    # There was something to tell: signs that change without an event would be seen.
    assert np.sum(side[0] != side[-1]) > 5
    assert np.sum(side == 0) > 0


def test_counts_are_those_of_the_list(run):
    kinds = [e.kind for e in run.events]
    for name, members in (
        ("crossings", ("crossing_up", "crossing_down")),
        ("entries", ("entry",)),
        ("exits", ("exit_up", "exit_down")),
    ):
        assert run.stats[name] == sum(kinds.count(kind) for kind in members) > 0
    choices = [e for e in run.events if e.kind.startswith("choice")]
    pairs = {(e.sample, e.layer, e.unit) for e in choices}
    assert run.stats["num_nonunique_pairs"] == len(pairs)
    first = choices[0].time if choices else np.nan
    np.testing.assert_equal(float(run.stats["first_nonunique_time"]), first)


def test_who_slides_when(run):
    _, side = sides(run)
    times, sizes = run.events.sliding_count()
    for t, slides in zip(np.asarray(run.ts), side == 0, strict=True):
        pairs = [(int(i), int(k)) for i, k in np.argwhere(slides)]
        assert run.events.sliding_at(float(t)) == pairs
        assert sizes[np.searchsorted(times, t, side="right") - 1] == len(pairs)
    assert sizes.max() == run.stats["largest_sliding_set"]
    assert sizes[-1] == run.stats["entries"] - run.stats["exits"]
    assert np.all(np.diff(times) > 0)
    assert np.all(np.diff(sizes) != 0)
    # ∫ size dt, two ways.
    held = np.diff(np.append(times, 20.0))
    total_time = run.events.sliding_time()
    assert total_time.shape == (SAMPLES, 6)
    assert np.sum(total_time) == pytest.approx(np.sum(held * sizes), rel=1e-12)


@pytest.mark.parametrize("t", [-0.1, 20.1])
def test_sliding_is_not_known_outside_of_the_run(run, t):
    with pytest.raises(ValueError, match="from 0 to t = 20"):
        run.events.sliding_at(t)


def without_weights_below_unit_0():
    """Its weights above are positive: ∂L/∂a there has the sign of f − y."""
    first, second, last = (layer.weight for layer in network(SEED).layers)
    weights = [first.at[0].set(0), jnp.abs(second) + 0.1, jnp.abs(last) + 0.1]
    model = eqx.tree_at(lambda m: [a.weight for a in m.layers], network(SEED), weights)
    return model, [np.asarray(w) for w in weights]


def test_a_unit_without_weights_below_has_a_choice_at_concave_kinks():
    """It may stay at 0; or leave along a ray, along which L falls."""
    model, (first, second, last) = without_weights_below_unit_0()
    x, y = data()
    result = solved(model, (x, jnp.full_like(y, 50.0)))
    start = [e for e in result.events if e.time == 0]
    assert {(e.layer, e.unit, e.kind) for e in start} == {(1, (0,), "choice_down")}
    assert result.stats["first_nonunique_time"] == 0
    # u̇ = Σ_i c_i x_i over the samples with u·x_i > 0, by NumPy: the samples that are
    # named are those of a ray that solves this.
    x = np.asarray(x)
    above = np.maximum(x @ first.T, 0) @ second.T
    prediction = np.maximum(above, 0) @ last.T
    c = (50 - prediction[:, 0]) * ((above >= 0) @ (last[0] * second[:, 0]))
    named = [e.sample for e in start]
    ray = c[named] @ x[named]
    assert np.flatnonzero(x @ ray > 0).tolist() == named


def test_a_unit_without_weights_below_has_none_at_convex_kinks():
    x, y = data()
    result = solved(without_weights_below_unit_0()[0], (x, jnp.full_like(y, -50.0)))
    assert all(e.time > 0 for e in result.events)
    # Of the others some meet, much later, where a choice may be.
    assert not any((e.layer, e.unit) == (1, (0,)) for e in result.events)
    assert np.all(np.asarray(result.model.layers[0].weight)[0] == 0)


def test_a_symmetric_start_off_all_kinks_is_no_choice():
    """Two equal units stay equal: the field is a function there."""
    model = network(SEED)
    where = lambda m: [m.layers[0].weight, m.layers[1].weight]  # noqa: E731
    below, above = where(model)
    model = eqx.tree_at(
        where, model, [below.at[1].set(below[0]), above.at[:, 1].set(above[:, 0])]
    )
    result = solved(model, data())
    below, above = where(result.model)
    np.testing.assert_allclose(below[0], below[1], rtol=1e-9)
    np.testing.assert_allclose(above[:, 0], above[:, 1], rtol=1e-9)
    assert result.stats["num_nonunique_pairs"] == 0
    first, second = (
        [(e.sample, e.kind) for e in result.events if (e.layer, e.unit) == (1, (i,))]
        for i in (0, 1)
    )
    assert first == second != []


@pytest.fixture(scope="module")
def batch():
    models = [network(seed) for seed in (SEED, 14)]
    stacked = jax.tree.map(
        lambda *a: jnp.stack(a) if eqx.is_array(a[0]) else a[0], *models
    )
    few = hf.Filippov(max_active=40, events=8)
    return eqx.filter_jit(
        eqx.filter_vmap(
            lambda m: hf.flow(m, data(), 20.0, laws=(), solver=few, throw=False)
        )
    )(stacked)


def member(batch, i):
    return jax.tree.map(lambda a: a[i] if eqx.is_array(a) else a, batch)


def test_vmap_and_too_little_room(run, batch):
    short = member(batch, 0).events
    assert len(short) == 8
    assert short.count + short.dropped == run.events.count
    told, all_ = list(short), list(run.events)
    assert [e[1:] for e in told] == [e[1:] for e in all_[:8]]
    np.testing.assert_allclose([e.time for e in told], [e.time for e in all_[:8]])
    # Known until the first event that is missing, and not beyond.
    end = float(short.complete_until)
    assert end == pytest.approx(all_[8].time)
    assert short.sliding_at(0.9 * end) == run.events.sliding_at(0.9 * end)
    with pytest.raises(ValueError, match="dropped"):
        short.sliding_at(end)
    assert f"{int(short.dropped)} dropped" in repr(short)
    assert short.sliding_count()[0][-1] < end


def test_members_of_a_batch_are_told_apart(batch):
    assert batch.events.times.shape == (2, 8)
    assert "shape of times: (2, 8)" in repr(batch.events)
    first, second = (list(member(batch, i).events) for i in (0, 1))
    assert [e.time for e in first] != [e.time for e in second]
    for method in (batch.events.slides, batch.events.sliding_count):
        with pytest.raises(ValueError, match="one member"):
            method()


def test_no_list_unless_asked_for():
    model, problem = network(0), data()
    shapes = eqx.filter_eval_shape(
        lambda m: hf.flow(m, problem, 1.0, solver=hf.Filippov(max_active=40)), model
    )
    assert shapes.events is None
    with pytest.raises(ValueError, match=r"Filippov\(events"):
        homoflow.plot.sliding(shapes)


@pytest.mark.parametrize("events", [-1, True])
def test_room_for_events_is_a_number_of_them(events):
    with pytest.raises(ValueError, match="events"):
        hf.Filippov(events=events)


def layers_of(model, shape):
    arrays, rest = eqx.partition(model, eqx.is_array)
    function = expose_kinks(
        lambda w, _, x: eqx.combine(w, rest)(x), arrays, (), jnp.ones(shape)
    )
    return kink_layers(model, function.operations)


def test_units_of_homoflow_networks_belong_to_their_layers():
    activations = ["relu", "linear", hf.LeakyReLU(0.1), jnp.tanh, "abs"]
    model = hf.MLP((3, 5, 4, 3, 2, 6, 1), activation=activations, key=jr.key(0))
    assert layers_of(model, (3,)) == (
        ("relu", 1, "layer 1", (5,)), ("leaky_relu", 3, "layer 3", (3,)),
        ("abs", 5, "layer 5", (6,)),
    )  # fmt: skip
    convolutional = hf.ConvNet((1, 5, 5), (2,), 3, hidden=(4,), key=jr.key(0))
    first, second = layers_of(convolutional, (1, 5, 5))
    assert (first.label, first.shape, second.shape) == ("layer 1", (2, 3, 3), (4,))


def test_units_of_a_convolution_are_channel_row_and_column():
    layers = layers_of(
        hf.ConvNet((1, 5, 5), (2,), 3, hidden=(4,), key=jr.key(0)), (1, 5, 5)
    )
    none, number = jnp.zeros(0), jnp.asarray(0)
    events = hf.Events(none, none.astype(int), none.astype(int), none.astype(int),
                       number, number, jnp.asarray(0.0), layers, 1)  # fmt: skip
    indices = list(itertools.product(range(2), range(3), range(3)))
    assert [events.layer_of(k)[1] for k in range(18)] == indices
    assert events.label(14) == "layer 1, unit (1, 1, 2)"
    assert events.label(18) == "layer 2, unit 0"


@pytest.fixture
def figures():
    yield
    plt.close("all")


@pytest.mark.usefixtures("figures")
def test_picture_of_what_slides(run):
    raster, size = homoflow.plot.sliding(run)
    slides = run.events.slides()
    (bars,) = raster.collections[:1]
    drawn = [
        (segment[0, 0], segment[1, 0], round(segment[0, 1]))
        for segment in bars.get_segments()
    ]
    rows = sorted({(s.kink, s.sample) for s in slides})
    expected = [(s.start, s.end, rows.index((s.kink, s.sample))) for s in slides]
    assert drawn == expected
    samples = [
        int(label.get_text())
        for child in raster.child_axes
        for label in child.get_yticklabels()
    ]
    assert samples == [sample for _, sample in rows]
    (line,) = size.lines
    times, sizes = run.events.sliding_count()
    at = np.linspace(0.01, 19.99, 500)
    heights = line.get_ydata()[np.searchsorted(line.get_xdata(), at, "right") - 1]
    np.testing.assert_array_equal(
        heights, sizes[np.searchsorted(times, at, "right") - 1]
    )
    assert size.get_xlabel() == "time t"


@pytest.mark.usefixtures("figures")
def test_picture_of_one_layer(run):
    raster, _ = homoflow.plot.sliding(run, layer=2)
    expected = [s for s in run.events.slides() if s.kink >= 3]
    assert 0 < len(expected) < len(run.events.slides())
    assert len(raster.collections[0].get_segments()) == len(expected)


@pytest.mark.usefixtures("figures")
def test_picture_on_logarithmic_time(run):
    raster, size = homoflow.plot.sliding(run, log_time=True)
    slides = run.events.slides()
    times = [t for s in slides for t in (s.start, s.end)]
    begin = min(t for t in times if t > 0) / 2
    for ax in (raster, size):
        assert ax.get_xscale() == "log"
        left, right = ax.get_xlim()
        assert 0 < left <= min(max(s.start, begin) for s in slides)
        assert right == float(run.events.complete_until)
    drawn = [(a[0], b[0]) for a, b in raster.collections[0].get_segments()]
    assert drawn == [(max(s.start, begin), s.end) for s in slides]


@pytest.mark.usefixtures("figures")
def test_picture_says_that_events_were_dropped(batch):
    _, size = homoflow.plot.sliding(member(batch, 0))
    assert "were dropped" in size.get_xlabel()


@pytest.mark.usefixtures("figures")
def test_picture_of_how_long(run):
    ax = homoflow.plot.sliding_time(run)
    (image,) = ax.images
    total_time = run.events.sliding_time()
    kinks = np.flatnonzero(total_time.sum(0))
    np.testing.assert_allclose(
        np.ma.filled(image.get_array(), 0), total_time[:, kinks].T, rtol=1e-12
    )
    # Nothing is drawn over it.
    assert all(p.get_zorder() < image.get_zorder() for p in ax.patches)
