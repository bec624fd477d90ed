"""The work of inference.py: plan the videos of a run, find those that exist, make the others, and record them."""
