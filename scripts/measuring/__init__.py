"""What benchmark.py and doctor.py measure, and the machine they measure it on."""
