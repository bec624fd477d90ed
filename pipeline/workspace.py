"""What the streams of a pipeline share on a device: one set of key buffers, and one CUDA stream that decodes."""

from __future__ import annotations

import weakref
from collections import deque

import torch

from model.kv_cache import KVCache
from model.layer_cache import LayerBuffers


class Workspace:
    """The buffers and the decoding stream that one stream leaves to the next.

    CUDA graphs are recorded for the addresses of their inputs, and each CUDA stream has memory of its own. So both are
    made once, and not for each viewer. Streams that run at the same time have a cache each. When they have ended, the
    buffers of one are kept.
    """

    def __init__(self) -> None:
        self._kept: deque[LayerBuffers] = deque(maxlen=1)
        self._decoding: dict[torch.device, torch.cuda.Stream] = {}

    def cache(self, num_layers: int) -> KVCache:
        """Make a cache for one stream. Its buffers come back when nothing holds the cache any more.

        So a pass that still runs in another thread, while its stream is stopped, never shares them with a new stream.
        """
        try:
            buffers = self._kept.pop()
        except IndexError:
            buffers = LayerBuffers()
        cache = KVCache(num_layers, buffers=buffers)
        weakref.finalize(cache, self._kept.append, buffers).atexit = False
        return cache

    def decoding_stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the CUDA stream that decodes the chunks of all sessions."""
        if device not in self._decoding:
            self._decoding[device] = torch.cuda.Stream(device)
        return self._decoding[device]
