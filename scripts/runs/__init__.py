"""The work of the programs in scripts/. After scripts/NAME.py has read its arguments, it calls scripts/runs/NAME.py."""
