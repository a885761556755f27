"""What is minimized: model, data, loss, and the checks of a user's input."""
