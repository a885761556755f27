"""What JAX itself lacks: tracing state, caches, dtypes, compilation; no network."""
