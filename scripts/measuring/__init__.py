"""What benchmark.py and doctor.py measure, and the machine they measure it on."""

MEASURES = {
    "inference": "inference",
    "session": "sessions",
    "viewers": "sessions",
    "endless": "inference",
    "floor": "floors",
    "peer": "peers",
    "codec": "codecs",
    "codec_peer": "peers",
    "graph": "graphs",
    "load": "programs",
    "train": "programs",
}
"""Measurement -> module of scripts.measuring whose function ``measure_NAME`` makes it."""
ALONE = ("graph",)
"""Measurements that are not part of ``all``."""
