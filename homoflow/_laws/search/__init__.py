"""Numerical search for laws."""
