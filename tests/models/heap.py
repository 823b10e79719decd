"""LeastRequestHeap, done by looking at every server each time."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction


@dataclass
class Server:
    cap: int
    changed: int
    outstanding: int = 0
    present: bool = True

    @property
    def free(self) -> int:
        return max(self.cap - self.outstanding, 0)


class ScanModel:
    """Servers and leases are named by the caller's own keys, as a real slot may be used again."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}
        self.leases: dict[int, Server] = {}
        self.clock = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def add(self, name: str, cap: int) -> None:
        self.servers[name] = Server(cap, self.tick())

    def set_cap(self, name: str, cap: int) -> None:
        server = self.servers[name]
        server.cap = cap
        server.changed = self.tick()

    def remove(self, name: str) -> None:
        self.servers.pop(name).present = False

    def choose(self, excluded: Iterable[str] = ()) -> str | None:
        passed_over = set(excluded)
        ready = [n for n, s in self.servers.items() if s.free and n not in passed_over]
        return min(ready, key=self._key, default=None)

    def _key(self, name: str) -> tuple[Fraction, int]:
        server = self.servers[name]
        return Fraction(server.outstanding, server.cap), server.changed

    def take(self, name: str, lease: int) -> None:
        server = self.servers[name]
        server.outstanding += 1
        server.changed = self.tick()
        assert lease not in self.leases
        self.leases[lease] = server

    def release(self, lease: int) -> bool:
        server = self.leases.pop(lease)
        server.outstanding -= 1
        server.changed = self.tick()
        return server.present

    @property
    def total_outstanding(self) -> int:
        return sum(server.outstanding for server in self.servers.values())

    @property
    def free(self) -> int:
        return sum(server.free for server in self.servers.values())
