"""Affinity against a dumb list of pairs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from arealtrio.affinity import Affinity

SERVERS = ["a", "b", "c"]
steps = st.lists(
    st.tuples(st.sampled_from(["settle", "leave", "return"]), st.integers(0, 5),
              st.sampled_from(SERVERS)),
    max_size=60,
)  # fmt: skip


class Model:
    """Sessions and their homes, the last used last; every look goes through all of them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pairs: list[tuple[str, str]] = []
        self.hits = self.spills = self.moves = 0

    def home(self, session: str) -> str | None:
        return next((home for name, home in self.pairs if name == session), None)

    def settle(self, session: str, server: str, serving: set[str]) -> None:
        before = self.home(session)
        self.hits += before == server
        self.moves += before not in (None, server)
        self.spills += before in serving - {server}
        self.pairs = [pair for pair in self.pairs if pair[0] != session] + [(session, server)]
        self.pairs = self.pairs[-self.size :] if self.size else []


@given(size=st.integers(0, 4), steps=steps)
def test_it_remembers_what_a_list_would(size: int, steps: list[tuple[str, int, str]]) -> None:
    serving = set(SERVERS)
    affinity, model = Affinity(size, serving.__contains__), Model(size)
    for what, number, server in steps:
        session = str(number)
        if what == "leave":
            serving.discard(server)
        elif what == "return":
            serving.add(server)
        elif size:
            affinity.settle(session, server)
            model.settle(session, server, serving)
        else:
            affinity.settle(session, server)
        for one in map(str, range(6)):
            home = model.home(one)
            assert affinity.home(one) == (home if home in serving else None)
        counts = (affinity.hits, affinity.spills, affinity.moves)
        assert counts == (model.hits, model.spills, model.moves)
        assert len(affinity) == len(model.pairs) <= size


def test_requests_without_a_session_have_no_home_and_count_for_nothing() -> None:
    affinity = Affinity(4, lambda _: True)
    affinity.settle(None, "a")
    assert (affinity.home(None), len(affinity), affinity.hits) == (None, 0, 0)
