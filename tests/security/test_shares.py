"""Each visitor has a share of seats, sessions, clips and starts. Nobody can use up the share of another."""

import json
import random
import time

import pytest

from pipeline.serving.clips import Clip, Gallery
from pipeline.serving.guard import LOOPBACK, Access
from pipeline.serving.hub import Hub
from pipeline.serving.limits import Limits, Rate, visitor_of
from pipeline.serving.seats import FairTurns
from pipeline.serving.spec import StreamSpec
from tests.serving.served import Client
from tests.serving.synthetic import SyntheticModel
from tests.serving.test_hub import Client as HubClient

GREEDY, MODEST = "127.0.0.2", "127.0.0.3"


def client_from(site, address: str) -> Client:
    return Client(site.connect(address))


def test_hellos_do_not_push_out_the_sessions_of_others(serve):
    site = serve(limits=Limits(sessions=20, sessions_each=8))
    modest = client_from(site, MODEST)
    modest.socket.close()
    for _ in range(30):
        client_from(site, GREEDY).socket.close()
    with site.connect(MODEST) as socket:
        socket.send(json.dumps({"type": "hello", "session": modest.session}))
        assert json.loads(socket.recv(timeout=10))["session"] == modest.session
    assert len(site.server.sessions) <= 20


def add_clip(gallery: Gallery, visitor: str, number: int) -> Clip:
    path = gallery.folder / f"clip-{number:024x}.mp4"
    path.write_bytes(b"video")
    clip = Clip(f"{number:024x}", visitor, visitor, path, ["p"], 1, 1, 1, 1, 0, True, "make")
    gallery.add(clip)
    return clip


def test_clips_do_not_push_out_those_of_others(tmp_path):
    gallery = Gallery(tmp_path, SyntheticModel.command, most=10)
    mine = [add_clip(gallery, MODEST, number) for number in range(3)]
    for number in range(100, 150):
        add_clip(gallery, GREEDY, number)
    assert gallery.of(MODEST) == mine[::-1]
    assert all(clip.path.exists() for clip in mine)
    assert len(list(tmp_path.iterdir())) == 10


@pytest.fixture
def open_hub(tmp_path):
    hubs = []

    def open_hub(seats: int, model: SyntheticModel | None = None, **limits) -> Hub:
        hub = Hub(seats, Gallery(tmp_path, SyntheticModel.command), limits=Limits(**limits))
        hub.ready((model or SyntheticModel()).open)
        hubs.append(hub)
        return hub

    yield open_hub
    for hub in hubs:
        hub.close()


def test_whoever_holds_all_seats_gives_one_to_somebody_else(open_hub):
    hub = open_hub(3)
    greedy = [HubClient(hub, visitor=GREEDY) for _ in range(10)]
    for client in greedy[:3]:
        client.wait_for("chunk")
    modest = HubClient(hub, visitor=MODEST)
    modest.wait_for("seated")
    stopped = [client for client in greedy if client.of("notice")]
    assert len(stopped) == 1 and "you have several" in stopped[0].of("notice")[0]["message"]
    assert stopped[0].wait_for("clip")  # what was made is kept
    time.sleep(0.2)
    assert sum(bool(client.of("notice")) for client in greedy) == 1  # two seats are its share


def test_somebody_alone_may_use_all_seats(open_hub):
    hub = open_hub(3)
    clients = [HubClient(hub, visitor=GREEDY) for _ in range(4)]
    for client in clients[:3]:
        client.wait_for("chunk")
    assert hub.place(clients[3].stream) == 1
    assert not any(client.of("notice") for client in clients)


@pytest.mark.parametrize("how", ["paused", "pauses again and again", "watches nothing", "reports old frames"])
def test_a_seat_without_progress_is_given_up_in_demand(open_hub, how):
    hub = open_hub(1, idle_seat_in_demand=0.5)
    idle = HubClient(hub, visitor=GREEDY, watches=how.startswith("pause"))
    idle.wait(lambda: idle.frames)
    if how.startswith("pause"):
        idle.stream.pause()
    waiting = HubClient(hub, visitor=MODEST)
    for _ in range(40):
        if how == "pauses again and again":
            idle.stream.resume()
            idle.stream.pause()
        if not how.startswith("pause"):
            idle.stream.frame_sent()
        if how == "reports old frames":
            idle.stream.frames_shown(0)
        if waiting.of("seated"):
            break
        time.sleep(0.1)
    waiting.wait_for("seated")
    assert "nobody was watching" in idle.wait_for("notice")["message"]


def test_a_stream_without_end_does_not_keep_its_seat_for_ever(open_hub):
    hub = open_hub(1, longest_turn=0.5)
    first = HubClient(hub, visitor=GREEDY)
    first.wait_for("chunk")
    second = HubClient(hub, visitor=MODEST)
    second.wait_for("seated")
    assert "Press Start to wait in line again" in first.of("notice")[0]["message"]


def test_turns_are_shared_between_visitors_not_streams(open_hub):
    """A visitor with one stream gets as much time as one with three."""
    hub = open_hub(4, SyntheticModel(seconds=0.02))
    fast = StreamSpec("numbers", 48, 48, fps=60)
    greedy = [HubClient(hub, fast, visitor=GREEDY) for _ in range(3)]
    modest = HubClient(hub, fast, visitor=MODEST)
    for client in (modest, *greedy):
        client.wait(lambda client=client: len(client.of("chunk")) >= 3)
    begun = len(modest.of("chunk")), sum(len(client.of("chunk")) for client in greedy)
    modest.wait(lambda: len(modest.of("chunk")) >= begun[0] + 12)
    others = sum(len(client.of("chunk")) for client in greedy) - begun[1]
    assert others <= 2 * 12


def test_who_comes_late_has_saved_nothing_up():
    turns = FairTurns()
    turns.order(["a", "b"])
    turns.used("a", 100.0)
    turns.used("b", 90.0)
    assert turns.order(["a", "b", "c"])["c"] == 90.0


def test_starts_are_limited_for_each_visitor(serve, monkeypatch):
    monkeypatch.setattr("pipeline.serving.server.LONGEST_START_WAIT", 0.0)
    site = serve(limits=Limits(starts=0.01, starts_at_once=3))
    greedy, modest = client_from(site, GREEDY), client_from(site, MODEST)
    for _ in range(4):
        greedy.send("start", prompt="numbers")
    assert "too many videos" in greedy.wait_for("error")["message"]
    modest.send("start", prompt="numbers")
    modest.frame()


def test_starts_of_others_are_no_news_to_those_who_wait(serve):
    """A waiting viewer gets messages about its own place, not about every start of others."""
    site = serve(max_viewers=1)
    watcher, waiting, restless = (client_from(site, address) for address in (MODEST, "127.0.0.4", GREEDY))
    watcher.send("start", prompt="numbers")
    watcher.frame()
    waiting.send("start", prompt="numbers")
    assert waiting.wait_for("waiting")["place"] == 1
    for _ in range(20):
        restless.send("start", prompt="numbers")
    time.sleep(0.8)
    heard = []
    while True:
        try:
            heard.append(json.loads(waiting.socket.recv(timeout=0.1)))
        except TimeoutError:
            break
    assert [message for message in heard if message["type"] == "waiting"] == []


def test_with_several_accounts_an_account_is_a_visitor(serve):
    site = serve(access=Access(LOOPBACK, accounts=("ann:1", "ben:2")), limits=Limits(starts=0.01, starts_at_once=1))
    for user, password in (("ann", "1"), ("ben", "2")):
        with site.browser("127.0.0.1") as browser:
            answer = browser.get("/healthz", auth=(user, password))
        cookie = answer.headers["set-cookie"].partition(";")[0]
        client = Client(site.connect(additional_headers={"cookie": cookie}))
        client.send("start", prompt="numbers")
        client.frame()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("fe80::1%eth0", "fe80::2", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("", "", True),
    ],
)
def test_a_household_is_one_visitor(one, other, same):
    assert (visitor_of(one) == visitor_of(other)) is same


def test_whatever_the_clock_shows_a_whole_budget_is_spent_without_waiting():
    """Differences of large clock readings are rounded, which must not look like a wait."""
    generator = random.Random(0)
    for _ in range(2000):
        now, per_second, burst = generator.uniform(0, 1e8), generator.uniform(0.05, 50), generator.randint(1, 9)
        rate = Rate(per_second, burst, clock=lambda now=now: now)
        assert [rate.try_spend("a") for _ in range(burst + 1)] == [0.0] * burst + [None]


def test_a_rate_lets_a_burst_through_and_then_its_rate():
    now = [0.0]
    rate = Rate(2.0, 4, clock=lambda: now[0])
    assert [rate.try_spend("a") for _ in range(5)] == [0.0, 0.0, 0.0, 0.0, None]
    assert rate.try_spend("b") == 0.0
    now[0] = 0.5
    assert [rate.try_spend("a"), rate.try_spend("a")] == [0.0, None]
    for key in range(10_000):  # nobody fills the memory with addresses
        rate.spend(key)
    assert len(rate._free_at) <= 4096
