"""Losses: pure functions of tensors and denoisers."""
