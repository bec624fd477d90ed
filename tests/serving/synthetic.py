"""A model without a network, for tests of everything around the model: numbered frames of any size and speed.

As a program, with a folder for clips as its argument, it serves them with the page of the demo and prints its address.
"""

from __future__ import annotations

import argparse
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.serving.clips import Gallery
from pipeline.serving.hub import Hub
from pipeline.serving.limits import Limits
from pipeline.serving.live import MOST_FRAME_BYTES
from pipeline.serving.messages import Start
from pipeline.serving.missing import MissingFile, MissingWeights
from pipeline.serving.server import Server
from pipeline.serving.spec import StreamSpec
from pipeline.session import Chunk
from pipeline.states import SessionState, Stopped

CHUNK_FRAMES = 12
END = object()
BITS = 16  # of the frame number, drawn in the top left corner
BLOCK = 8  # side in pixels of a bit


class SyntheticSession:
    """Makes chunks of numbered frames. Each chunk takes `seconds`."""

    def __init__(self, spec: StreamSpec, seconds: float = 0.0) -> None:
        self.spec, self.seconds = spec, seconds
        self.prompt = spec.prompt
        self.paused, self.stopped, self.finished = threading.Event(), threading.Event(), False
        self.denoised = 0
        self.settings: dict[str, Any] = {}
        self.followed: list[torch.Tensor] = []  # frames of the source [H W 3]
        self.source_over = False
        generator = torch.Generator().manual_seed(spec.seed)
        texture = torch.rand(spec.height // 16, spec.width // 16, 3, generator=generator)
        self.picture = (texture.repeat_interleave(16, 0).repeat_interleave(16, 1) * 255).to(torch.uint8)

    @property
    def state(self) -> SessionState:
        if self.stopped.is_set():
            return SessionState.stopped
        if self.finished:
            return SessionState.finished
        return SessionState.paused if self.paused.is_set() else SessionState.running

    def pause(self) -> None:
        self.paused.set()

    def resume(self) -> None:
        self.paused.clear()

    def stop(self) -> None:
        self.stopped.set()

    def switch(self, prompt: str, style: Any, **settings: Any) -> None:
        self.prompt = prompt
        self.settings |= settings

    def ready(self) -> bool:
        """Whether a chunk of the source is there; it takes what has come."""
        if self.spec.source is None or self.stopped.is_set():
            return True
        while (frame := next(self.spec.source, END)) is not None and frame is not END:
            pixels = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
            self.followed.append(pixels.view(self.spec.height, self.spec.width, 3))
        self.source_over = frame is END
        return self.source_over or len(self.followed) >= CHUNK_FRAMES

    def denoise(self, wait: bool = True) -> Any:
        if self.paused.is_set() or self.stopped.wait(self.seconds) or self.paused.is_set():
            return None
        start = 3 * self.denoised
        if self.spec.num_frames is not None and start >= self.spec.num_frames:
            self.finished = True
            return None
        frames = None
        if self.spec.source is not None:
            frames, self.followed = self.followed[:CHUNK_FRAMES], self.followed[CHUNK_FRAMES:]
            if not frames:
                self.finished = self.source_over
                return None
            frames = torch.stack(frames + frames[-1:] * (CHUNK_FRAMES - len(frames)))
        self.denoised += 1
        return SimpleNamespace(
            frames=frames, index=start // 3, start_frame=start, latents=torch.zeros(1, 3), prompt=self.prompt
        )

    def decode(self, block: Any, show: Callable[[torch.Tensor], None]) -> Chunk:
        if self.stopped.is_set():
            raise Stopped("stopped")
        first = block.start_frame * CHUNK_FRAMES // 3
        frames = block.frames
        if frames is None:
            frames = torch.stack([numbered(self.picture, first + i) for i in range(CHUNK_FRAMES)])
        parts = frames.split([1, 4, CHUNK_FRAMES - 5]) if block.index == 0 else [frames]
        for part in parts:
            show(part)
        return Chunk(block.index, block.start_frame, frames, block.prompt, {"denoise": self.seconds})


def numbered(picture: torch.Tensor, number: int) -> torch.Tensor:
    """Return a picture [H W 3] for a frame, with the frame's number as black and white blocks."""
    frame = picture.roll(3 * number, dims=1)
    for bit in range(BITS if picture.shape[1] >= BITS * BLOCK else 0):
        frame[:BLOCK, bit * BLOCK : (bit + 1) * BLOCK] = 255 * (number >> bit & 1)
    return frame


@dataclass
class SyntheticModel:
    """Serves synthetic sessions of one size."""

    height: int = 48
    width: int = 48
    fps: int = 24
    seconds: float = 0.0
    """The time that a chunk takes."""
    names: list[str] = field(default_factory=lambda: ["synthetic"])

    absent: set[str] = field(default_factory=set)
    """Names of models whose weights must be downloaded first."""

    def __post_init__(self) -> None:
        self.chosen = self.names[0]

    def check(self, name: str) -> None:
        pass

    def choose(self, name: str) -> None:
        self.chosen = name

    def load(self, report: Callable[[str, float], None]) -> None:
        report("pretending", 0.5)
        if self.chosen in self.absent:
            raise MissingWeights(
                "Weights of this model are missing.", [MissingFile("wan/model.safetensors", 5 * 10**9)]
            )

    def download(self, report: Callable[[str, float], None]) -> None:
        report("downloading: 2.50 of 5.00 GB", 0.5)
        self.absent.clear()

    def options(self) -> dict[str, Any]:
        return {
            "model": "synthetic",
            "examples": ["numbers"],
            "sizes": [(self.height, self.width)],
            "fps": self.fps,
            "steps": 4,
            "most_steps": 8,
            "num_frames": 9,
            "frames_per_chunk": 3,
            "temporal_scale": 4,
            "decoders": ["none"],
            "precisions": ["full"],
            "compile": False,
            "styles": {"recache": "", "keep": "", "cut": ""},
            "longest_prompt": 2000,
            "most_fps": 60,
            "most_seed": 2**53 - 1,
            "most_blend_chunks": 16,
            "source_bytes": MOST_FRAME_BYTES,
        }

    def spec(self, message: Start, image: bytes | None) -> StreamSpec:
        fps = message.fps or self.fps
        shape = self.height, self.width, fps
        return StreamSpec(message.prompt, *shape, message.seed, message.num_frames, image=image, record=message.record)

    def is_prepared(self, spec: StreamSpec) -> bool:
        return True

    def prepare(self, spec: StreamSpec) -> None:
        pass

    def open(self, spec: StreamSpec) -> SyntheticSession:
        return SyntheticSession(spec, self.seconds)

    @staticmethod
    def command(spec: StreamSpec, cues: list, latents: int, clip: Path) -> list[str]:
        return ["make", spec.prompt]


def synthetic_server(
    folder: Path,
    model: SyntheticModel,
    *,
    max_viewers: int = 4,
    limits: Limits | None = None,
    clips: int = 200,
    greeting: str = "",
    may_choose: bool = False,
) -> Server:
    """Return a server without a socket."""
    gallery = Gallery(folder, model.command, most=clips)
    hub = Hub(max_viewers, gallery, limits=limits)
    return Server(model, hub, gallery, limits, greeting=greeting, may_choose=may_choose)


def main() -> None:
    from pipeline.serving.door import Door
    from pipeline.serving.guard import LOOPBACK, Access, Guard
    from pipeline.serving.run import make_runner
    from pipeline.serving.site import Site

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--max-viewers", type=int, default=2)
    parser.add_argument("--names", nargs="+", default=["synthetic"])
    parser.add_argument("--absent", nargs="*", default=[], help="names of models that must be downloaded first")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = SyntheticModel(args.height, args.width, seconds=args.seconds, names=args.names, absent=set(args.absent))
    server = synthetic_server(args.folder, model, max_viewers=args.max_viewers, may_choose=True)
    site = Site(server, started=lambda: None, failed=lambda: None)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"open http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    limits = Limits()
    make_runner(Guard(site, Access(LOOPBACK), limits), Door(limits), []).run(sockets=[listener])


if __name__ == "__main__":
    main()
