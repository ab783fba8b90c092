"""What a process on a CPU holds for the blocks it asks glibc's malloc for, with the holes between them.

After `malloc/malloc.c` of glibc 2.36, which has done so since 2.26. Blocks of a size from the mmap threshold on have
pages of their own, which go back when the block is freed. Smaller ones lie in one heap, which gives back nothing but
its end. Left out: heaps of other threads.
"""

from bisect import bisect_left, insort
from collections import defaultdict


PAGE, HEADER, SMALLEST = 4096, 16, 32
THRESHOLD, HIGHEST_THRESHOLD = 128 * 1024, 32 * 1024**2
# What the heap grows by beyond a request, and keeps at its end when it shrinks.
PAD = 128 * 1024
# A freed block below this size, those beside it counted, does not make the heap shrink.
SHRINKS = 64 * 1024
# A thread keeps that many freed blocks of every size up to this for requests of just that size, and the heap any number
# of smaller ones, until a request for a large block comes.
CACHED, CACHED_SIZE, FAST_SIZE, LARGE = 7, 1040, 128, 1024
# torch's, for tensors (`c10::gAlignment`).
ALIGNMENT = 64


class GlibcHeap:
    """Replays requests and frees.

    Args:
        threshold: bytes from which a block has its own pages, MALLOC_MMAP_THRESHOLD_; None (default) is glibc's way,
            128 KiB to begin with and then the size of the largest such block freed, to 32 MiB.

    Attributes:
        peak: highest bytes resident so far.
    """

    def __init__(self, threshold: int | None = None):
        self.peak = 0
        self._moves = threshold is None
        self._threshold, self._trim = threshold or THRESHOLD, PAD
        # The heap's end, where its unused part starts, and how far it is written.
        self._end = self._top = self._written = 0
        self._used: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        self._mapped_bytes = 0
        # Holes by start and by end. A new one waits until a request has looked at it, then it is listed by size, the
        # latest of equal ones first.
        self._holes: dict[int, tuple[int, int]] = {}
        self._starts: dict[int, int] = {}
        self._waiting: dict[int, None] = {}
        self._by_size: list[tuple[int, int, int]] = []
        # What a small request left of a hole: the next small one takes from it.
        self._rest = 0
        self._cached: dict[int, list[int]] = defaultdict(list)
        self._fast: dict[int, list[int]] = defaultdict(list)
        self._count = 0

    @property
    def resident(self) -> int:
        """Bytes of pages that are written and not given back."""
        return self._written + self._mapped_bytes

    def malloc(self, size: int) -> int:
        """Place a block; its address, for `free`."""
        need = _block(size)
        return self._write(cached.pop() if (cached := self._cached[need]) else self._place(need))

    def memalign(self, size: int) -> int:
        """Place a block at a multiple of ALIGNMENT as `posix_memalign` does: ask for 96 bytes more, cut the block out
        of that, and free what is left on both sides.
        """
        need = _block(size)
        start = self._place(need + ALIGNMENT + SMALLEST)
        if start in self._used:
            length = self._used.pop(start)
            before = -(start + HEADER) % ALIGNMENT
            before += ALIGNMENT if 0 < before < SMALLEST else 0
            after = length - before - need
            after = after if after >= SMALLEST else 0
            self._used[start + before] = length - before - after
            if before:
                self._release(start, before)
            start += before
            if after:
                self._release(start + self._used[start], after)
        return self._write(start)

    def free(self, start: int) -> None:
        """Take a block away."""
        if start in self._used:
            self._release(start, self._used.pop(start))
            return
        size = self._mapped.pop(start)
        self._mapped_bytes -= size
        if self._moves and self._threshold < size <= HIGHEST_THRESHOLD:
            self._threshold, self._trim = size, 2 * size

    def _write(self, start: int) -> int:
        if start in self._used:
            self._written = max(self._written, start + self._used[start])
        self.peak = max(self.peak, self.resident)
        return start

    def _place(self, need: int) -> int:
        """The smallest hole that is large enough, cut to size; else the heap's end; else pages, or a larger heap."""
        if fast := self._fast[need]:
            start = fast.pop()
            while fast and len(self._cached[need]) < CACHED:
                self._cached[need].append(fast.pop())
            return start
        if need >= LARGE:
            self._join_fast()
        else:
            found = bisect_left(self._by_size, (need + 1,))
            if found and self._by_size[found - 1][0] == need:
                return self._cut(self._by_size[found - 1][2], need)
        while True:
            if (start := self._look_at_waiting(need)) is not None:
                return self._cut(start, need)
            found = bisect_left(self._by_size, (need,))
            if found < len(self._by_size):
                return self._cut(self._by_size[found][2], need)
            if self._end - self._top >= need + SMALLEST or not self._join_fast():
                break
        if self._end - self._top < need + SMALLEST:
            if need >= self._threshold:
                # An address below zero, each once.
                self._count += 1
                self._mapped[-self._count] = _up(need + 8, PAGE)
                self._mapped_bytes += _up(need + 8, PAGE)
                return -self._count
            self._end = _up(self._top + need + PAD + SMALLEST, PAGE)
        start, self._top = self._top, self._top + need
        self._used[start] = need
        return start

    def _look_at_waiting(self, need: int) -> int | None:
        """The first new hole of just that size, or the last small request's rest; list by size what comes before."""
        while self._waiting:
            start = next(iter(self._waiting))
            size, number = self._holes[start]
            rest = need < LARGE and len(self._waiting) == 1 and start == self._rest and size > need + SMALLEST
            if rest or size == need:
                return start
            del self._waiting[start]
            insort(self._by_size, (size, -number, start))
        return None

    def _cut(self, start: int, need: int) -> int:
        size = self._take(start)
        if size - need >= SMALLEST:
            self._add(start + need, size - need)
            self._rest = start + need if need < LARGE else self._rest
            size = need
        self._used[start] = size
        return start

    def _release(self, start: int, size: int) -> None:
        """Keep a small block at hand; join others with what is free beside them, and let the heap shrink."""
        kept = self._cached[size] if size <= CACHED_SIZE else None
        if kept is None or len(kept) == CACHED:
            kept = self._fast[size] if size <= FAST_SIZE else None
        if kept is not None:
            kept.append(start)
            self._used[start] = size
        elif self._join(start, size) >= SHRINKS:
            self._join_fast()
            unused = self._end - self._top
            if unused >= self._trim and unused > PAD + SMALLEST:
                self._end -= (unused - SMALLEST - 1 - PAD) // PAGE * PAGE
                self._written = min(self._written, self._end)

    def _join_fast(self) -> bool:
        """Join all that is kept in the heap, none of it in the thread; whether there was any."""
        blocks = [block for kept in self._fast.values() for block in kept]
        self._fast.clear()
        for block in blocks:
            self._join(block, self._used.pop(block))
        return bool(blocks)

    def _join(self, start: int, size: int) -> int:
        """Make a hole, one with those beside it, or part of the heap's end; its size."""
        if start in self._starts:
            start = self._starts[start]
            size += self._take(start)
        if start + size == self._top:
            self._top = start
            return self._end - start
        if start + size in self._holes:
            size += self._take(start + size)
        self._add(start, size)
        return size

    def _add(self, start: int, size: int) -> None:
        self._count += 1
        self._holes[start], self._starts[start + size] = (size, self._count), start
        self._waiting[start] = None

    def _take(self, start: int) -> int:
        size, number = self._holes.pop(start)
        del self._starts[start + size]
        if start in self._waiting:
            del self._waiting[start]
        else:
            del self._by_size[bisect_left(self._by_size, (size, -number, start))]
        return size


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _block(size: int) -> int:
    """What a request takes with its header."""
    return max(SMALLEST, _up(size + 8, 16))
