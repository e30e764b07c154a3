"""Which cell a free worker takes next: of the subject it holds, the longest work first."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable

from repro.plan import PlannedCell


class Queue:
    """The cells that no worker has taken yet.

    Cells that differ in length alone are one chain, from short to long: what runs out of memory
    implies the longer ones, so that a chain is on one worker as long as there is other work.

    Args:
        cells: In running order.
        chain_of: Cell -> name of its chain.
        longest_first: Take the chain with the most work left, so that no long one starts last;
            else keep the order.
    """

    def __init__(
        self,
        cells: Iterable[PlannedCell],
        *,
        chain_of: Callable[[PlannedCell], str],
        longest_first: bool,
    ) -> None:
        self._chain_of = chain_of
        self._longest_first = longest_first
        self._chains: dict[str, deque[PlannedCell]] = {}
        self._place: dict[str, int] = {}  # key -> place in the running order
        self._work: dict[str, float] = {}
        # Subject -> heap of (order, place, chain) of the chains that no worker is at.
        self._free: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
        self._offered: set[str] = set()
        self._held: Counter[str] = Counter()  # chain -> workers that are at it
        self._left: dict[str, float] = defaultdict(float)  # subject -> seconds
        self._count = 0
        for cell in cells:
            self._add(cell)
        for chain in self._chains:
            self._offer(chain)

    def __len__(self) -> int:
        return self._count

    def take(self, subject: str | None) -> PlannedCell | None:
        """Return the next cell for a worker that holds a subject (None: none yet).

        Another subject is taken only when nothing of this one is left; then that with the most work
        left, as the load of a model is paid for best there. Where the order is kept, it comes first.
        """
        if not self._longest_first:
            chain = self._first_chain()
            return None if chain is None else self._pop(chain)
        for wanted in self._subjects(subject):
            chain = self._next_chain(wanted)
            if chain is not None:
                return self._pop(chain)
        return None

    def put_back(self, cell: PlannedCell) -> None:
        """Give back a cell that was taken and has no outcome; it is the next of its chain."""
        chain, subject = self._chain_of(cell), _subject(cell)
        self._chains[chain].appendleft(cell)
        self._work[chain] += cell.estimate_seconds
        self._left[subject] += cell.estimate_seconds
        self._count += 1
        self.release(cell)

    def release(self, cell: PlannedCell) -> None:
        """Say that a cell that was taken has its outcome (or was put back)."""
        chain = self._chain_of(cell)
        self._held[chain] -= 1
        self._offer(chain)

    def _add(self, cell: PlannedCell) -> None:
        chain, subject = self._chain_of(cell), _subject(cell)
        self._place.setdefault(cell.key, len(self._place))
        self._chains.setdefault(chain, deque()).append(cell)
        self._work[chain] = self._work.get(chain, 0.0) + cell.estimate_seconds
        self._left[subject] += cell.estimate_seconds
        self._count += 1

    def _offer(self, chain: str) -> None:
        cells = self._chains[chain]
        if cells and not self._held[chain] and chain not in self._offered:
            order = -self._work[chain] if self._longest_first else 0.0
            place = self._place[cells[0].key]
            heapq.heappush(self._free[_subject(cells[0])], (order, place, chain))
            self._offered.add(chain)

    def _first_chain(self) -> str | None:
        """Return the free chain whose next cell comes first; else one that another worker is at."""
        ready = [(heap[0][1], subject) for subject, heap in self._free.items() if heap]
        subjects = [min(ready)[1]] if ready else list(self._left)
        return next(filter(None, map(self._next_chain, subjects)), None)

    def _subjects(self, held: str | None) -> list[str]:
        others = [subject for subject in self._left if subject != held]
        others.sort(key=lambda subject: -self._left[subject])
        return ([held] if held is not None else []) + others

    def _next_chain(self, subject: str) -> str | None:
        heap = self._free[subject]
        if heap:
            chain = heapq.heappop(heap)[2]
            self._offered.remove(chain)
            return chain
        # Nothing else is left: better a longer cell that may be implied than an idle worker.
        waiting = [
            chain
            for chain, workers in self._held.items()
            if workers and self._chains[chain] and _subject(self._chains[chain][0]) == subject
        ]
        return max(waiting, key=lambda chain: self._work[chain], default=None)

    def _pop(self, chain: str) -> PlannedCell:
        cell = self._chains[chain].popleft()
        self._work[chain] -= cell.estimate_seconds
        self._left[_subject(cell)] -= cell.estimate_seconds
        self._count -= 1
        self._held[chain] += 1
        return cell


def _subject(cell: PlannedCell) -> str:
    return str(cell.cell["subject"])
