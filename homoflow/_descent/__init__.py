"""Gradient descent by Optax: loop, clock, minibatches, budget of the laws."""
