"""The long tests. Each module is a part of scripts/endure.py."""
