"""What a run returns: trajectory, status, events, ledger, comparison."""
