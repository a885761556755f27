"""Thresholds and tolerances by which a method is chosen when nobody says how."""

#: Relative tolerances used when none is given.
SMOOTH_RTOL = {"float64": 1e-10, "float32": 1e-5}
#: Where kinks are averaged over, and where each is followed.
AVERAGED_RTOL = 1e-4
EXACT_RTOL = 1e-8
#: On the way to a stationary point, by a method with a dense Hessian.
STEADY_STATE_RTOL = 1e-8

#: Each pair of a sample and a kink costs the exact flow gradients over all samples at its
#: events: beyond this many pairs the time of a run is counted in minutes. Averaged, so
#: many pairs get a method of their own, as thousands may slide at a time.
MAX_FOLLOWED_PAIRS = 20_000

#: From so many products of samples and weights on, a gradient takes longer than the rest
#: of an exponential Adams step (about 25 µs on a core): then the fewest gradients win.
MIN_ADAMS_PRODUCTS = 30_000
#: Its compilation takes ten seconds or more. Where an explicit solver can be tried first
#: (not inside of jit or vmap), it begins only where such a trial, some 1,500 gradients if
#: it is held up, would take seconds in every call.
MIN_UNTRIED_PRODUCTS = 300_000
#: From this tolerance on, order 5 needs fewer gradients than order 8.
MIN_LOOSE_RTOL = 1e-5
#: An explicit solver that has taken so many steps and is not at the end is held up by
#: stability more often than not, and then exponential Adams is a multiple faster; it takes
#: seconds to compile, so that it is not what begins.
MAX_EXPLICIT_STEPS = 1000
#: Exponential Adams takes hundreds of steps, where it is at its best. It is held up where
#: weights differ by hundreds of orders of magnitude, as between saddles on the way from a
#: vanishing start: there a method with a dense Hessian goes on, if there are few weights.
MAX_ADAMS_STEPS = 10_000
#: Up to so many weights a step with a dense Hessian costs little, and plateaus and slow
#: directions, on which flows to a stationary point spend their time, are stiff.
MAX_DENSE_WEIGHTS = 500

#: Where the largest weight starts below this, weights that grow and those that shrink come
#: to differ by more than the digits of a float, squared.
MAX_VANISHING = 1e-16

#: How much coarser the second solve of an error estimate is. Twice the step is no more: an
#: explicit method has to stay stable.
COARSER_RTOL = 4.0
COARSER_STEP = 2.0
