"""What each program of scripts does once its arguments are read: scripts/NAME.py calls scripts/runs/NAME.py."""
