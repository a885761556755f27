"""The exact, sliding flow of networks with kinks."""
