"""Exponential Adams methods."""
