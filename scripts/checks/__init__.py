"""The facts that doctor.py collects about a machine, and the checks that it runs there."""
