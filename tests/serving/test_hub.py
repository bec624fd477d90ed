"""Seats, turns and ends of streams, with sessions that take no time."""

import threading
import time
from collections import Counter

import pytest

from pipeline.serving.clips import Gallery
from pipeline.serving.frames import HEADER
from pipeline.serving.hub import Hub
from pipeline.serving.spec import PromptChange, StreamSpec
from tests.serving.synthetic import CHUNK_FRAMES, SyntheticModel, SyntheticSession

SPEC = StreamSpec("numbers", 48, 48, fps=24)
PATIENCE = 60.0


class Client:
    """Keeps its messages. Unless `watches` is false, it reports each frame as shown at once."""

    def __init__(self, hub: Hub, spec: StreamSpec = SPEC, *, watches: bool = True, visitor: str = "me") -> None:
        self.messages: list[dict] = []
        self.frames: list[bytes] = []
        self.watches = watches
        self.changed = threading.Condition()
        self.stream = None
        self.stream = hub.submit(spec, self.deliver, visitor, "session")

    def deliver(self, message) -> None:
        with self.changed:
            (self.frames if isinstance(message, bytes) else self.messages).append(message)
            self.changed.notify_all()
        if isinstance(message, bytes) and self.watches:
            stream = self.stream
            if stream is not None:
                stream.frame_sent()
                stream.frames_shown(len(self.frames))

    def of(self, kind: str) -> list[dict]:
        return [message for message in self.messages if message["type"] == kind]

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE), (self.messages[-5:], len(self.frames))

    def wait_for(self, kind: str) -> dict:
        self.wait(lambda: self.of(kind))
        return self.of(kind)[-1]


@pytest.fixture
def open_hub(tmp_path):
    hubs = []

    def open_hub(max_viewers: int = 4, open_session=SyntheticSession) -> Hub:
        hub = Hub(max_viewers, Gallery(tmp_path, SyntheticModel.command))
        hub.ready(open_session)
        hubs.append(hub)
        return hub

    yield open_hub
    for hub in hubs:
        hub.close()


def test_a_stream_with_an_end_gives_its_frames_in_order_and_a_clip(open_hub):
    viewer = Client(open_hub(), StreamSpec("numbers", 48, 48, fps=60, num_frames=9))
    clip = viewer.wait_for("clip")["clip"]
    assert clip["frames"] == len(viewer.frames) == 3 * CHUNK_FRAMES
    assert [HEADER.unpack_from(frame)[2] for frame in viewer.frames] == list(range(3 * CHUNK_FRAMES))
    assert viewer.of("ended")[0]["frames"] == 3 * CHUNK_FRAMES


def test_streams_asked_for_before_the_model_is_there_begin_with_it(tmp_path):
    hub = Hub(1, Gallery(tmp_path, SyntheticModel.command))
    viewer = Client(hub)
    time.sleep(0.1)
    assert not viewer.frames
    hub.ready(SyntheticModel().open)
    viewer.wait(lambda: viewer.frames)
    hub.close()


def test_later_viewers_wait_and_see_their_place_move_up(open_hub):
    hub = open_hub(max_viewers=1)
    first, second, third = (Client(hub) for _ in range(3))
    assert [hub.place(client.stream) for client in (first, second, third)] == [None, 1, 2]
    second.stream.stop()
    first.stream.stop()
    third.wait_for("seated")
    assert not second.of("seated")
    assert second.of("ended")
    third.wait(lambda: third.frames)


def test_turns_are_fair(open_hub):
    """With sessions of any duration, no viewer gets more than one chunk ahead of another."""
    turns: list[str] = []

    class Slow(SyntheticSession):
        def denoise(self, wait: bool = True):
            turns.append(self.spec.prompt)
            return super().denoise(wait)

    hub = open_hub(open_session=lambda spec: Slow(spec, 0.02))
    viewers = [Client(hub, StreamSpec(name, 48, 48, fps=60)) for name in "abc"]
    for viewer in viewers:
        viewer.wait(lambda viewer=viewer: len(viewer.of("chunk")) >= 4)
    together = turns[turns.index("c") :][:9]
    assert all(count == 3 for count in Counter(together).values()), turns


def test_a_viewer_that_does_not_watch_gets_little(open_hub):
    """The hub neither generates nor buffers for a client that takes nothing."""
    viewer = Client(open_hub(), watches=False)
    viewer.wait(lambda: viewer.frames)
    time.sleep(0.5)
    assert len(viewer.frames) <= 3 * CHUNK_FRAMES


def test_others_go_on_beside_a_viewer_that_hangs(open_hub):
    hub = open_hub()
    hung, lively = Client(hub, watches=False), Client(hub)
    lively.wait(lambda: len(lively.frames) >= 6 * CHUNK_FRAMES)
    assert len(hung.frames) <= 3 * CHUNK_FRAMES


def test_pause_holds_and_resume_goes_on(open_hub):
    viewer = Client(open_hub())
    viewer.wait(lambda: viewer.frames)
    viewer.stream.pause()
    time.sleep(0.1)
    held = len(viewer.frames)
    time.sleep(0.3)
    assert len(viewer.frames) == held
    viewer.stream.resume()
    viewer.wait(lambda: len(viewer.frames) > held)


def test_a_switch_shows_in_the_next_chunk_and_in_the_clip(open_hub):
    viewer = Client(open_hub(open_session=SyntheticModel(seconds=0.05).open))
    viewer.wait_for("chunk")
    seen = len(viewer.of("chunk"))
    viewer.stream.change_prompt(PromptChange("letters", "recache"))
    viewer.wait(lambda: any(chunk["prompt"] == "letters" for chunk in viewer.of("chunk")))
    first = next(i for i, chunk in enumerate(viewer.of("chunk")) if chunk["prompt"] == "letters")
    assert first <= seen + 2
    viewer.stream.stop()
    assert viewer.wait_for("clip")["clip"]["prompts"] == ["numbers", "letters"]


def test_a_switch_does_not_wait_until_the_frames_in_hand_are_watched(open_hub):
    """Without this it would take four seconds. The chunk comes within two, and a message names its first frame."""
    viewer = Client(open_hub(), StreamSpec("numbers", 48, 48, fps=CHUNK_FRAMES // 4), watches=False)
    viewer.wait_for("chunk")
    for _ in range(CHUNK_FRAMES):
        viewer.stream.frame_sent()
    viewer.stream.frames_shown(1)
    started = time.monotonic()
    viewer.stream.change_prompt(PromptChange("letters", "cut", id=7))
    viewer.wait(lambda: viewer.of("chunk")[-1]["prompt"] == "letters")
    assert time.monotonic() - started < 2.0
    stream, first = viewer.stream.number, viewer.of("chunk")[-1]["first_frame"]
    assert viewer.of("switched") == [
        {"type": "switched", "stream": stream, "first_frame": first, "prompt": "letters", "style": "cut", "id": 7}
    ]


def test_only_a_part_is_recorded(open_hub):
    """Each part is a clip of its own, with the time at which it begins and the prompt it shows first."""
    viewer = Client(open_hub(), StreamSpec("numbers", 48, 48, fps=24, record=False))
    viewer.wait(lambda: len(viewer.of("chunk")) >= 2)
    viewer.stream.change_prompt(PromptChange("letters", "keep", seed=3))
    viewer.wait(lambda: viewer.of("chunk")[-1]["prompt"] == "letters")
    viewer.stream.record(True)
    begun = len(viewer.of("chunk"))
    viewer.wait(lambda: len(viewer.of("chunk")) >= begun + 3)
    viewer.stream.record(False)
    part = viewer.wait_for("clip")["clip"]
    assert part["prompts"] == ["letters"] and part["begin"] >= CHUNK_FRAMES / 24
    assert 0 < part["frames"] < len(viewer.frames)
    viewer.stream.stop()
    viewer.wait_for("ended")
    assert viewer.of("switched")[0]["seed"] == 3
    assert len(viewer.of("clip")) == 1


def test_changes_before_a_chunk_are_joined():
    """A later prompt does not lose an earlier seed, and settings alone keep the prompt."""
    first = PromptChange(None, "keep", seed=3).after(None, "numbers")
    both = PromptChange("letters", "cut", steps=2).after(first, "numbers")
    assert (first.prompt, both.prompt, both.style, both.settings) == (
        "numbers",
        "letters",
        "cut",
        {"seed": 3, "steps": 2},
    )
    assert PromptChange(None, "keep", seed=4).after(both, "letters") == PromptChange("letters", "cut", seed=4, steps=2)


def test_stop_does_not_wait_for_the_chunk(open_hub):
    """A session in the middle of a chunk that takes a minute ends within a moment, and its seat is free."""
    hub = open_hub(max_viewers=1, open_session=lambda spec: SyntheticSession(spec, 60 if spec.seed else 0))
    busy, next_one = Client(hub, StreamSpec("numbers", 48, 48, 24, seed=1)), Client(hub)
    time.sleep(0.2)
    started = time.monotonic()
    busy.stream.stop()
    next_one.wait(lambda: next_one.frames)
    assert time.monotonic() - started < 1.0


def test_a_failing_session_tells_its_viewer_and_no_other(open_hub):
    class Failing(SyntheticSession):
        def denoise(self, wait: bool = True):
            if self.spec.prompt == "broken":
                raise ValueError("no such thing")
            return super().denoise(wait)

    hub = open_hub(open_session=Failing)
    broken, fine = Client(hub, StreamSpec("broken", 48, 48, 24)), Client(hub)
    assert broken.wait_for("error")["message"] == "no such thing"
    fine.wait(lambda: len(fine.frames) >= 4 * CHUNK_FRAMES)
    assert broken.wait_for("ended")
    assert hub.counters.failures == 1


def test_closing_finishes_clips_and_leaves_no_thread(tmp_path):
    before = threading.active_count()
    hub = Hub(2, Gallery(tmp_path, SyntheticModel.command))
    hub.ready(SyntheticModel().open)
    viewer = Client(hub)
    viewer.wait(lambda: viewer.frames)
    hub.close()
    assert threading.active_count() == before
    assert viewer.of("clip")
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def test_streams_of_one_kind_share_a_batch(tmp_path):
    """With batches, chunks that are wanted at about the same time are made together, unless their sizes differ."""
    batches: list[int] = []

    def together(sessions):
        batches.append(len(sessions))
        assert len({session.spec.height for session in sessions}) == 1
        return [session.denoise(wait=False) for session in sessions]

    hub = Hub(4, Gallery(tmp_path, SyntheticModel.command), together)
    viewers = [Client(hub, StreamSpec("numbers", side, side, 24)) for side in (48, 48, 64)]
    hub.ready(SyntheticSession)
    for viewer in viewers:
        viewer.wait(lambda viewer=viewer: len(viewer.of("chunk")) >= 3)
    hub.close()
    assert set(batches) == {2}
