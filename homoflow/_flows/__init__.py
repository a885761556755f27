"""The public functions that follow a flow."""
