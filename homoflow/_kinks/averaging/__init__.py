"""Flows averaged over kinks."""
