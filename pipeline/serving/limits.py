"""Every limit of the server: how much one visitor and all visitors together may use.

A visitor is one IPv4 address or one /64 network of IPv6, which is what one household gets. If the server has several
accounts (``--auth`` given more than once), a visitor is an account.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

try:
    import resource
except ImportError:  # Windows
    resource = None

MOST_KEYS = 4096  # addresses whose rates are remembered; beyond that the one unused for the longest time is forgotten
IPV6_PREFIX = 64  # bits
CLOCK_ERROR = 1e-6  # seconds; differences between readings of a clock that runs for years are rounded by less

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Limits:
    """The limits of one server. Times are in seconds."""

    connections: int = 400
    """Open connections in total. It is lower if the process may open only few files."""
    connections_each: int = 64
    """Open connections of one address."""
    new_connections: float = 200.0
    """Connections that one address may open per second on average."""
    files_kept_free: int = 160
    """Open files that are reserved for weights, clips and child processes."""
    head: float = 10.0
    """Longest time from the start of a request to its end. A body gets more time, see ``body_rate``."""
    idle: float = 30.0
    """Longest time between two requests of a connection, and longest time without progress in sending an answer."""
    body_rate: float = 64 * 1024
    """Bytes per second at which a body must arrive on average, after the first ``head`` seconds."""
    requests: float = 40.0
    """Requests of one visitor per second on average."""
    health_checks: float = 200.0
    """Requests for /healthz of one address per second. They do not count as other requests."""
    requests_at_once: int = 8
    """Requests of one visitor that are answered at the same time. Others wait."""
    answer_bytes: int = 256 * 1024
    """This many bytes of an answer count as one more request."""
    longest_wait: float = 5.0
    """A request that would have to wait longer than this is refused."""
    messages: float = 200.0
    """WebSocket messages of one visitor per second on average."""
    message_bytes: float = 2**20
    """Bytes of WebSocket messages of one address per second on average, frames of a live source included."""
    text_bytes: float = 64 * 1024
    """Bytes of text messages of one visitor per second on average."""
    sources: int = 8
    """Streams that follow a live source at the same time; more are refused."""
    sources_each: int = 2
    """The same for one visitor."""
    starts: float = 2.0
    """Streams that one visitor may start per second on average."""
    starts_at_once: int = 60
    """Streams that one visitor may start one after the other before ``starts`` limits it."""
    precisions: float = 2 / 60
    """Changes of the precision by one visitor per second on average. Each change loads the model again."""
    sessions: int = 512
    """Sessions that are remembered in total."""
    sessions_each: int = 64
    """Sessions of one visitor that are remembered."""
    image_bytes: int = 256 * 2**20
    """Bytes of all uploaded first frames in memory together."""
    uploads: int = 8
    """Uploads that are received or decoded at the same time. More are refused."""
    uploads_each: int = 2
    """The same for one visitor."""
    decoders: int = 2
    """Images decoded at the same time, each in its own process."""
    clips: int = 200
    """Clips kept in the clips folder. Clips of earlier runs count too."""
    gifs_waiting: int = 8
    """Requested GIFs that are not made yet. One GIF is made at a time."""
    idle_seat: float = 600.0
    """A stream is stopped if its viewer shows no new frame for this long."""
    idle_seat_in_demand: float = 20.0
    """The same while another viewer waits for a seat."""
    longest_turn: float = 600.0
    """While another viewer waits for a seat, a stream that is older than this is stopped."""


def open_file_limit() -> int:
    """Return how many files this process may have open."""
    if resource is None:
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**16 if soft == resource.RLIM_INFINITY else soft


def connection_limit(limits: Limits) -> int:
    """Return how many connections may be open so that enough files stay free for everything else."""
    return max(min(limits.connections, open_file_limit() - limits.files_kept_free), 16)


def visitor_of(address: str) -> str:
    """Return the IPv4 address or the /64 network of IPv6 that limits are counted for."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, IPV6_PREFIX), strict=False))
    return str(ip)


class Rate:
    """A budget for each key that refills at a constant rate (a token bucket).

    Args:
        per_second: units that each key gets back per second.
        burst: units that a key may spend at once.
    """

    def __init__(self, per_second: float, burst: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._free_at: OrderedDict[Hashable, float] = OrderedDict()  # key -> when its whole budget is back

    def spend(self, key: Hashable, units: float = 1.0) -> float:
        """Spend units of the key's budget. Return the seconds to wait before acting."""
        now = self._clock()
        free_at = max(self._free_at.pop(key, now), now) + units / self._per_second
        self._free_at[key] = free_at
        while len(self._free_at) > MOST_KEYS:
            self._free_at.popitem(last=False)
        wait = free_at - now - self._burst / self._per_second
        return wait if wait > CLOCK_ERROR else 0.0

    def try_spend(self, key: Hashable, longest_wait: float = 0.0) -> float | None:
        """Spend one unit and return the seconds to wait. If the wait is too long, spend nothing and return None."""
        wait = self.spend(key)
        if wait <= longest_wait:
            return wait
        self._free_at[key] -= 1 / self._per_second
        return None


class Count:
    """Counts something for each key, with a limit for each key and one for all keys together."""

    def __init__(self, each: int, total: int | None = None) -> None:
        self._each, self._total = each, total
        self._counts: Counter[Hashable] = Counter()
        self._sum = 0

    @property
    def total(self) -> int:
        """The count of all keys together."""
        return self._sum

    def of(self, key: Hashable) -> int:
        """Return the count of one key."""
        return self._counts[key]

    def enter(self, key: Hashable) -> bool:
        """Count one more if both limits allow it. Return whether they allow it."""
        if self._counts[key] >= self._each or (self._total is not None and self._sum >= self._total):
            return False
        self._counts[key] += 1
        self._sum += 1
        return True

    def leave(self, key: Hashable) -> None:
        """Count one less."""
        self._counts[key] -= 1
        self._sum -= 1
        if not self._counts[key]:
            del self._counts[key]


def greediest(keys: Iterable[Key]) -> Key:
    """Return the key that occurs most often. If several do, return the first of them."""
    return Counter(keys).most_common(1)[0][0]
