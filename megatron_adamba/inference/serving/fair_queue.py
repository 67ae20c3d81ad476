"""Who is next: clients take turns, each with its own requests in order."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Not safe for threads."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def waiting(self, client: str) -> int:
        return len(self._waiting.get(client, ()))

    def put(self, client: str, item: T) -> None:
        self._waiting.setdefault(client, deque()).append(item)

    def pop(self, may_run: Callable[[str], bool]) -> tuple[str, T] | None:
        """The next item of the next client that may have one run; it goes behind the others then."""
        client = next((client for client in self._waiting if may_run(client)), None)
        if client is None:
            return None
        item = self._waiting[client].popleft()
        self._waiting.move_to_end(client)
        if not self._waiting[client]:
            del self._waiting[client]
        return client, item

    def keep(self, wanted: Callable[[T], bool]) -> None:
        """Drop all others."""
        for client, items in list(self._waiting.items()):
            self._waiting[client] = deque(filter(wanted, items))
            if not self._waiting[client]:
                del self._waiting[client]

    def clear(self) -> list[T]:
        """Empty it; returns what was in it."""
        items = [item for items in self._waiting.values() for item in items]
        self._waiting.clear()
        return items


class Shares:
    """Places that clients hold, and how many each may: all but one, so that no other has to wait for its texts to
    end."""

    def __init__(self, places: int) -> None:
        self.most = max(places - 1, 1)
        self._held: Counter[str] = Counter()

    def may_take(self, client: str) -> bool:
        return self._held[client] < self.most

    def take(self, client: str) -> None:
        self._held[client] += 1

    def give_back(self, client: str) -> None:
        self._held[client] -= 1
        if self._held[client] <= 0:
            del self._held[client]
