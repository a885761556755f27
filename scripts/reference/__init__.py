"""Oracles for the exact flow that share no code with the package."""
