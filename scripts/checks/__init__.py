"""What doctor.py finds out about a machine, and what it tries there."""
