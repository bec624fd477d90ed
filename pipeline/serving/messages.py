"""What a client may send over the WebSocket, checked and bounded; docs/api.md describes each message."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

LONGEST_PROMPT = 2000  # characters
MOST_SEED = 2**53 - 1  # what a JavaScript number holds exactly
MOST_FPS = 60
MOST_FRAMES = 100_000  # latent frames of a stream with an end
FULL_PRECISION = "full"  # the model's own
DEFAULT_STYLE = "recache"  # of inference.py too

Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_PROMPT)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hello(_Message):
    """The first message; with the session of an earlier connection its clips are found again."""

    type: Literal["hello"]
    session: Annotated[str, StringConstraints(max_length=64)] | None = None


class Start(_Message):
    """Begin a stream; one that runs is stopped."""

    type: Literal["start"]
    prompt: Prompt
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    num_frames: Annotated[int, Field(ge=1, le=MOST_FRAMES)] | None = None
    height: Annotated[int, Field(ge=1, le=8192)] | None = None
    width: Annotated[int, Field(ge=1, le=8192)] | None = None
    fps: Annotated[int, Field(ge=1, le=MOST_FPS)] | None = None
    steps: Annotated[int, Field(ge=1, le=50)] | None = None
    decoder: Annotated[str, StringConstraints(max_length=40)] | None = None
    precision: Annotated[str, StringConstraints(max_length=40)] = FULL_PRECISION
    compile: bool = False
    image: bool = False


class Switch(_Message):
    """Change the prompt of the running stream at its next chunk."""

    type: Literal["switch"]
    prompt: Prompt
    style: Literal["cut", "keep", "recache", "blend"] = DEFAULT_STYLE


class Pause(_Message):
    """Hold the running stream."""

    type: Literal["pause"]


class Resume(_Message):
    """Go on."""

    type: Literal["resume"]


class Stop(_Message):
    """End the running stream; its clip is kept."""

    type: Literal["stop"]


class Shown(_Message):
    """How many frames of the stream have been shown: what keeps it going."""

    type: Literal["shown"]
    stream: int
    frames: Annotated[int, Field(ge=0)]


ClientMessage = Hello | Start | Switch | Pause | Resume | Stop | Shown
CLIENT_MESSAGE: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])
