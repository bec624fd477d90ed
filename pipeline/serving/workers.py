"""Handle uploads and clips in child processes: only a few at the same time, with limits of memory and time."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from pipeline.serving import images
from pipeline.serving.clips import Clip, Gallery
from pipeline.serving.limits import Limits
from utils.files import is_own_file

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[2]
IMAGE_SECONDS = 20.0  # of wall-clock time
IMAGE_MEMORY = 1.5 * 2**30  # bytes of addresses; Python and Pillow alone take 0.1 GB
GIF_SECONDS = 120.0
GIF_MEMORY = 3 * 2**30


class Busy(Exception):
    """The server is too busy or the file cannot be made. The message says which."""


class ImageDecoder:
    """Decodes uploaded images, at most ``limits.decoders`` at the same time."""

    def __init__(self, limits: Limits) -> None:
        self._slots = asyncio.Semaphore(limits.decoders)

    async def clean(self, data: bytes) -> tuple[bytes, int, int]:
        """Run ``images.clean_image`` in a child process.

        Raises:
            images.Refused: the image is refused. The message says why.
        """
        async with self._slots:
            code, out, err = await run_child("pipeline.serving.images", data=data, seconds=IMAGE_SECONDS)
        if code == 0 and len(out) > images.SIZE.size:
            return out[images.SIZE.size :], *images.SIZE.unpack_from(out)
        if code == images.REFUSED:
            raise images.Refused(err.decode(errors="replace"))
        raise images.Refused("the image takes too much memory or time; make it smaller")


class GifMaker:
    """Makes each clip's GIF once, one GIF at a time. Further requests for the same GIF wait for it."""

    def __init__(self, gallery: Gallery, limits: Limits) -> None:
        self._gallery, self._most = gallery, limits.gifs_waiting
        self._slot = asyncio.Semaphore(1)
        self._making: dict[str, asyncio.Task[Path]] = {}

    async def path(self, clip: Clip) -> Path:
        """Return the path of the clip's GIF. Make it if it does not exist.

        Raises:
            Busy: too many GIFs are waiting, or this one could not be made.
        """
        path = clip.path.with_suffix(".gif")
        if is_own_file(path):
            return path
        if clip.name not in self._making:
            if len(self._making) >= self._most:
                raise Busy("too many GIFs are being made; try again in a minute")
            task = asyncio.create_task(self._make(clip, path))
            self._making[clip.name] = task
            task.add_done_callback(lambda _: self._making.pop(clip.name, None))
        return await asyncio.shield(self._making[clip.name])

    async def _make(self, clip: Clip, path: Path) -> Path:
        arguments = [str(clip.path.resolve()), str(path.resolve()), str(clip.frames), str(clip.fps)]
        async with self._slot:
            if self._gallery.get(clip.name) is None or not is_own_file(clip.path):
                raise Busy("the clip is gone")
            code, _, err = await run_child("pipeline.serving.gifs", *arguments, seconds=GIF_SECONDS, memory=GIF_MEMORY)
        if code != 0 or not is_own_file(path):
            log.warning("a GIF was not made: %s", err.decode(errors="replace").strip().rpartition("\n")[2])
            raise Busy("the GIF could not be made; the server's log says why")
        if self._gallery.get(clip.name) is None:  # deleted meanwhile
            path.unlink(missing_ok=True)
            raise Busy("the clip is gone")
        return path


async def run_child(
    module: str, *arguments: str, data: bytes = b"", seconds: float, memory: float = IMAGE_MEMORY
) -> tuple[int, bytes, bytes]:
    """Run a module of this project in a child process with lower priority. Return its exit code, output and errors.

    The process is ended after `seconds` of wall-clock or CPU time. It cannot use more than `memory` bytes of address
    space.
    """
    process = await limited_child(module, *arguments, seconds=seconds, memory=memory, stderr=asyncio.subprocess.PIPE)
    try:
        out, err = await asyncio.wait_for(process.communicate(data), seconds)
    except (TimeoutError, asyncio.TimeoutError):
        return -1, b"", b"it took too long"
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    return process.returncode, out, err


async def limited_child(
    module: str,
    *arguments: str,
    seconds: float,
    memory: float = IMAGE_MEMORY,
    stderr: int = asyncio.subprocess.DEVNULL,
) -> asyncio.subprocess.Process:
    """Start a module of this project in its own process, with pipes to its input and from its output.

    The process cannot use more than `seconds` of CPU time and `memory` bytes of address space.
    """
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LIMITED, str(int(memory)), str(int(seconds)), module, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )


# The program of the child process. It sets its own limits, then runs the module.
LIMITED = """
import os, runpy, sys
memory, seconds = int(sys.argv[1]), int(sys.argv[2])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(3)
except (ImportError, OSError, ValueError, AttributeError):
    pass
sys.argv = sys.argv[3:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
