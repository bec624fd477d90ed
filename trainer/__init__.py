"""Training: objectives as pure functions, and the loops that drive them."""
