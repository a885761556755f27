"""From a problem to a run: the choice of a method, and the methods."""
