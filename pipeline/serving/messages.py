"""The messages that a client may send over the WebSocket, with their limits. docs/api.md describes each message."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from pipeline.serving.clips import is_control

LONGEST_PROMPT = 2000  # characters
MOST_SEED = 2**53 - 1  # the largest integer that JavaScript can store exactly
MOST_FPS = 60
MOST_FRAMES = 100_000  # latent frames of a stream with an end
SHOWN = 40  # characters of a wrong value that an error message shows
KINDS = ("hello", "start", "switch", "rate", "record", "pause", "resume", "stop", "shown", "source_ended")
FULL_PRECISION = "full"  # the model's own precision
DEFAULT_STRENGTH = 0.6  # of inference.py too
MOST_BLEND_CHUNKS = 16
LONGEST_TEXT = 32 * 1024  # bytes of a text message
DEFAULT_STYLE = "recache"  # the default of inference.py too


def checked_prompt(prompt: str) -> str:
    """Return a prompt on one line. Control characters become spaces, so that no command or file of a clip has any.

    Raises:
        ValueError: the prompt is empty.
    """
    line = " ".join("".join(" " if is_control(character) else character for character in prompt).split())
    if not line:
        raise ValueError("the prompt is empty; write what the video should show")
    return line


Prompt = Annotated[str, StringConstraints(max_length=LONGEST_PROMPT), AfterValidator(checked_prompt)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Hello(_Message):
    """The first message. A session id of an earlier connection brings back the clips of that session."""

    type: Literal["hello"]
    session: Annotated[str, StringConstraints(max_length=64)] | None = None


class Start(_Message):
    """Begin a stream. A stream that runs on this connection is stopped."""

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
    source: bool = False
    strength: Annotated[float, Field(gt=0, le=1)] = DEFAULT_STRENGTH
    record: bool = True


class SwitchPrompt(_Message):
    """Change the prompt of the running stream at its next chunk."""

    type: Literal["switch"]
    prompt: Prompt | None = None
    style: Literal["cut", "keep", "recache", "blend"] = DEFAULT_STYLE
    id: Annotated[int, Field(ge=0, le=MOST_SEED)] = 0
    blend_chunks: Annotated[int, Field(ge=1, le=MOST_BLEND_CHUNKS)] | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None
    steps: Annotated[int, Field(ge=1, le=50)] | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None


class ChangeRate(_Message):
    """Show the running stream at another rate."""

    type: Literal["rate"]
    fps: Annotated[int, Field(ge=1, le=MOST_FPS)]


class RecordPart(_Message):
    """Begin or end a clip of the running stream at its next chunk."""

    type: Literal["record"]
    on: bool


class SourceEnded(_Message):
    """No more frames of the source follow. The running stream ends with it."""

    type: Literal["source_ended"]


class Pause(_Message):
    """Pause the running stream."""

    type: Literal["pause"]


class Resume(_Message):
    """Continue the paused stream."""

    type: Literal["resume"]


class Stop(_Message):
    """End the running stream. Its clip is kept."""

    type: Literal["stop"]


class Shown(_Message):
    """How many frames of the stream the client has shown. The stream continues only while these messages come."""

    type: Literal["shown"]
    stream: int
    frames: Annotated[int, Field(ge=0)]
    late: Annotated[int, Field(ge=0)] = 0


ClientMessage = Hello | Start | SwitchPrompt | ChangeRate | RecordPart | Pause | Resume | Stop | Shown | SourceEnded
CLIENT_MESSAGE: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])


def explain(error: ValidationError) -> str:
    """Return a sentence that says what is wrong with a message: the field, its value and what is allowed."""
    first = error.errors(include_url=False)[0]
    names = [str(part) for part in first["loc"] if part not in KINDS]
    name = ".".join(names) or "the message"
    if first["type"] in ("json_invalid", "union_tag_invalid", "union_tag_not_found", "model_type", "dict_type"):
        return f"the message cannot be read: {first['msg']}"
    if first["type"] == "extra_forbidden":
        return f"{name} is not a field of this message"
    if first["type"] == "missing":
        return f"{name} is missing"
    if first["type"] == "string_too_long":
        return f"the {name} has {len(first['input']):,} characters; at most {first['ctx']['max_length']:,} are allowed"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    shown = repr(first["input"])
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    return f"{name} = {shown} is not possible: {first['msg'].removeprefix('Input ')}"
