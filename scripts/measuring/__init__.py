"""The measurements of benchmark.py and doctor.py, and the machine that they run on."""

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
"""Measurement NAME -> the module of scripts.measuring with its function ``measure_NAME``."""
ALONE = ("graph",)
"""Measurements that are not part of ``all``."""
