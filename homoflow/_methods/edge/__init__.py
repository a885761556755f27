"""A method for motion along the edge of stability, mode by mode."""
