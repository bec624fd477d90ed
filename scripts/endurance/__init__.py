"""The long tests of what must not break, each a part of scripts/endure.py."""
