"""Speed of homoflow: beside bare loops, and beside other ODE solvers; see `bench.py`."""
