"""The equations that move the weights."""
