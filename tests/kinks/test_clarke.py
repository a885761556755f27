"""`scripts/reference/clarke.py` on functions whose sub-differential is known."""

import numpy as np
import pytest
from reference.clarke import gradients_around, least_around, least_element


def pieces(size: int, number: int, seed: int) -> np.ndarray:
    """Slopes a_k of max_k ⟨a_k, w⟩, most of all in the first direction and of all sizes."""
    rng = np.random.default_rng(seed)
    slopes = rng.standard_normal((number, size)) + 2 * np.eye(size)[0]
    scale = 10 ** rng.uniform(-2, 0, size)
    scale[0] = 1
    return slopes * scale


def gradients_of(slopes: np.ndarray):
    return lambda w: slopes[np.argmax(w @ slopes.T, axis=1)]


#: With cells at 0 that random points miss.
NARROW = [(8, 40, 1), (20, 200, 0), (20, 200, 1), (40, 80, 1)]


@pytest.mark.parametrize("given", [*NARROW, (20, 60, 0)])
def test_all_slopes_of_a_maximum_are_gradients_around_0(given):
    slopes = pieces(*given)
    expected = least_element(slopes)
    found = least_around(gradients_of(slopes), np.zeros(given[0]))
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.linalg.norm(expected))


@pytest.mark.parametrize("given", NARROW)
def test_random_points_alone_miss_some(given):
    """The negative control; what they miss makes their least element too long."""
    slopes = pieces(*given)
    at_random = gradients_around(gradients_of(slopes), np.zeros(given[0]))
    lengths = [np.linalg.norm(least_element(rows)) for rows in (slopes, at_random)]
    assert lengths[1] > 1.0001 * lengths[0]


def test_a_concave_kink_has_a_segment_of_gradients():
    """−|w₁| + w₂ at 0: Clarke's set is [−1, 1] × {1}; L falls fastest at its ends."""

    def gradients(w):
        return np.stack([-np.sign(w[:, 0]), np.ones(len(w))], 1)

    least = least_around(gradients, np.zeros(2))
    np.testing.assert_allclose(least, [0, 1], atol=1e-8)


def test_where_nothing_depends_on_w_it_is_0():
    assert np.all(least_around(np.zeros_like, np.ones(3)) == 0)
