"""What is recorded along a run: times and observables."""
