"""PyTorch's CUDA caching allocator, simulated: what a sequence of requests reserves (no torch).

One device, one stream, default settings. Rules and names in parentheses are those of
`c10/cuda/CUDACachingAllocator.cpp`, the constants those of `c10/core/AllocatorConfig.h`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

MIN_BLOCK = 512  # kMinBlockSize: every request is rounded up to it
SMALL_SIZE = 2**20  # kSmallSize: the largest request that the small pool serves
SMALL_BUFFER = 2 * 2**20  # kSmallBuffer: a segment (or page) of the small pool
MIN_LARGE_ALLOC = 10 * 2**20  # kMinLargeAlloc: from here on a request gets its own segment
LARGE_BUFFER = 20 * 2**20  # large_segment_size: the segment (or page) of the large pool
ROUND_LARGE = 2 * 2**20  # kRoundLarge: own segments are rounded up to it


class OutOfMemory(Exception):
    """A request does not fit into `capacity`, even after the cached memory was released."""


class CachingAllocator:
    """Replay of the allocator: its bytes in use, its bytes taken from the device, and both peaks.

    New segments get rising addresses, which decide between free blocks of one size; the driver may
    order them otherwise.

    Args:
        capacity: bytes that the segments may take together; None has no limit.
        expandable_segments: one growing segment for each pool, as with
            `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.

    Attributes:
        allocated: bytes of the blocks in use, as `torch.cuda.memory_allocated` counts them.
        reserved: bytes of the segments, as `torch.cuda.memory_reserved` counts them.
        peak_allocated: the most that `allocated` has been.
        peak_reserved: the most that `reserved` has been.
        num_retries: how often the cached memory was released to make room.

    >>> allocator = CachingAllocator()
    >>> handle = allocator.malloc(1000)
    >>> allocator.allocated, allocator.reserved
    (1024, 2097152)
    >>> allocator.free(handle)
    >>> allocator.allocated, allocator.reserved
    (0, 2097152)
    """

    def __init__(self, *, capacity: int | None = None, expandable_segments: bool = False):
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.num_retries = 0
        self._capacity = capacity
        self._expandable = expandable_segments
        # should_split: more than kSmallSize must remain in the large pool, unless it can expand
        least = MIN_BLOCK if expandable_segments else SMALL_SIZE + 1
        self._small = _Pool(page=SMALL_BUFFER, least_remainder=MIN_BLOCK)
        self._large = _Pool(page=LARGE_BUFFER, least_remainder=least)
        if expandable_segments:
            for pool in (self._small, self._large):
                # address space without end: the allocator takes 9/8 of the device's memory
                pool.insert(_Block(0, pool.page * 2**40, mapped=False))
        self._blocks: dict[int, _Block | None] = {}
        self._num_handles = 0

    def malloc(self, num_bytes: int) -> int:
        """Take `num_bytes` and return a handle for `free`; 0 bytes cost nothing.

        Raises:
            OutOfMemory: no room in `capacity`. The blocks released from the cache stay released.
            ValueError: `num_bytes` is negative.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes={num_bytes} is negative. Use num_bytes >= 0.")
        block = self._take(_round_up(num_bytes, MIN_BLOCK)) if num_bytes else None
        self._num_handles += 1
        self._blocks[self._num_handles] = block
        return self._num_handles

    def free(self, handle: int) -> None:
        """Give a block back to its pool; its segment stays reserved.

        Raises:
            ValueError: no block in use has this handle.
        """
        if handle not in self._blocks:
            raise ValueError(
                f"handle={handle} is not in use. Use each handle of malloc in one call of free."
            )
        block = self._blocks.pop(handle)
        if block is not None:
            block.in_use = False
            self.allocated -= block.size
            self._pool(block.size).insert(block)

    def _pool(self, size: int) -> _Pool:
        # right for a block too: one above SMALL_SIZE in the small pool is always split
        return self._small if size <= SMALL_SIZE else self._large

    def _take(self, size: int) -> _Block:
        """A block in use, from the pool, a new segment, or one after a release (malloc)."""
        pool = self._pool(size)
        grow = self._expand if self._expandable else self._new_segment
        block = pool.pop_best_fit(size) or grow(pool, size)
        if block is None:
            self.num_retries += 1
            self._release_cached()
            block = grow(pool, size)
        if block is None:
            raise OutOfMemory(
                f"a request of {size} bytes does not fit into capacity={self._capacity}: "
                f"{self.reserved} bytes are reserved, {self.allocated} of them in use. "
                "Use a smaller micro_batch_size or a larger capacity."
            )
        block.in_use = True
        if block.size - size >= pool.least_remainder:
            pool.insert(block.cut(size))
        # after the split: an unsplit block counts whole
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def _reserve(self, num_bytes: int) -> bool:
        if self._capacity is not None and self.reserved + num_bytes > self._capacity:
            return False
        self.reserved += num_bytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return True

    def _new_segment(self, pool: _Pool, size: int) -> _Block | None:
        """One call of cudaMalloc (get_allocation_size); None without room."""
        num_bytes = pool.page if size < MIN_LARGE_ALLOC else _round_up(size, ROUND_LARGE)
        if not self._reserve(num_bytes):
            return None
        pool.end += num_bytes
        return _Block(pool.end - num_bytes, num_bytes)

    def _expand(self, pool: _Pool, size: int) -> _Block | None:
        """Map pages at the lowest address with room (try_allocate_expandable_block)."""
        block = pool.find_room(size)
        if not block.mapped and not self._map(pool, block, min(block.size, size)):
            return None
        while block.size < size:
            unmapped = block.after
            assert unmapped is not None and not unmapped.mapped
            if not self._map(pool, unmapped, min(unmapped.size, size - block.size)):
                return None
            block = unmapped  # it has absorbed the block before it
        pool.remove(block)
        return block

    def _map(self, pool: _Pool, block: _Block, size: int) -> bool:
        num_bytes = _round_up(size, pool.page)
        if not self._reserve(num_bytes):
            return False
        pool.remove(block)
        block.mapped = True
        if num_bytes < block.size:
            pool.insert(block.cut(num_bytes, mapped=False))
        pool.insert(block)
        return True

    def _release_cached(self) -> None:
        """Return wholly free segments, or wholly free pages (release_cached_blocks)."""
        for pool in (self._large, self._small):
            for size, _, block in list(pool.free):
                if self._expandable:
                    self.reserved -= pool.unmap(block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved -= size


def replay(
    events: Iterable[tuple[int, int]],
    *,
    capacity: int | None = None,
    expandable_segments: bool = False,
) -> CachingAllocator:
    """The allocator after `events`: (id, num_bytes) takes num_bytes >= 0, and (id, -1) frees them.

    The ids are the caller's own; one may be used again once it is freed.

    Raises:
        OutOfMemory: a request does not fit into `capacity`.
        ValueError: an id is taken while in use or freed while not, or a size is below -1.

    >>> replay([(7, 3 * 2**20), (8, 100), (7, -1), (7, 2 * 2**20)]).peak_reserved // 2**20
    22
    """
    allocator = CachingAllocator(capacity=capacity, expandable_segments=expandable_segments)
    handles: dict[int, int] = {}
    for name, num_bytes in events:
        taking = num_bytes != -1
        if taking == (name in handles):
            state, hint = ("already", "another id") if taking else ("not", "the id of a request")
            raise ValueError(f"event ({name}, {num_bytes}): {name} is {state} in use. Use {hint}.")
        if taking:
            handles[name] = allocator.malloc(num_bytes)
        else:
            allocator.free(handles.pop(name))
    return allocator


class _Block:
    """A run of bytes, linked to its neighbours in the same segment."""

    __slots__ = ("address", "after", "before", "in_use", "mapped", "size")

    def __init__(self, address: int, size: int, *, mapped: bool = True):
        self.address, self.size, self.mapped = address, size, mapped
        self.in_use = False
        self.before: _Block | None = None
        self.after: _Block | None = None

    def cut(self, size: int, *, mapped: bool = True) -> _Block:
        """Keep the first `size` bytes; the rest is a new block behind them."""
        rest = _Block(self.address + size, self.size - size, mapped=mapped)
        self.size = size
        rest.before, rest.after, self.after = self, self.after, rest
        if rest.after is not None:
            rest.after.before = rest
        return rest

    def absorb(self, other: _Block) -> None:
        """Take over the neighbour `other` (try_merge_blocks)."""
        self.size += other.size
        if other is self.before:
            self.address, self.before = other.address, other.before
            if self.before is not None:
                self.before.after = self
        else:
            self.after = other.after
            if self.after is not None:
                self.after.before = self

    def reach(self) -> int:
        """The size up to which the block can grow without moving (expandable_size)."""
        after = self.after
        return self.size + (after.size if after is not None and not after.mapped else 0)


class _Pool:
    """The blocks not in use, by size and then address; unmapped ones by address (BlockPool)."""

    def __init__(self, *, page: int, least_remainder: int):
        self.page, self.least_remainder = page, least_remainder
        self.end = 0  # address of the next segment
        self.free: list[tuple[int, int, _Block]] = []
        self.unmapped: list[tuple[int, _Block]] = []

    def insert(self, block: _Block) -> None:
        """Add a block, merged with neighbours of its kind (free_block, map_block)."""
        for other in (block.before, block.after):
            if other is not None and not other.in_use and other.mapped == block.mapped:
                self.remove(other)
                block.absorb(other)
        # two blocks never share an address, so that a comparison never reaches the block
        if block.mapped:
            insort(self.free, (block.size, block.address, block))
        else:
            insort(self.unmapped, (block.address, block))

    def remove(self, block: _Block) -> None:
        """Drop a block from its list."""
        if block.mapped:
            del self.free[bisect_left(self.free, (block.size, block.address))]
        else:
            del self.unmapped[bisect_left(self.unmapped, (block.address,))]

    def pop_best_fit(self, size: int) -> _Block | None:
        """The smallest block with room, the lowest among equals (get_free_block)."""
        free = self.free
        i = bisect_left(free, (size,))
        if i == len(free):
            return None
        # what can still grow counts as large as it can become, and is kept for larger requests
        while i + 1 < len(free) and free[i + 1][2].reach() < free[i][2].reach():
            i += 1
        return free.pop(i)[2]

    def find_room(self, size: int) -> _Block:
        """The lowest run of unmapped and free blocks that holds `size` (find_expandable_block)."""
        for _, start in self.unmapped:
            if start.before is not None and not start.before.in_use:
                start = start.before
            room, block = 0, start
            while room < size and block is not None and not block.in_use:
                room, block = room + block.size, block.after
            if room >= size:
                return start
        raise AssertionError("the last unmapped block has no end")

    def unmap(self, block: _Block) -> int:
        """Unmap the pages wholly inside a free block; the bytes given back (unmap_block)."""
        first = _round_up(block.address, self.page)
        last = (block.address + block.size) // self.page * self.page
        if first >= last:
            return 0
        self.remove(block)
        pieces = [block]
        for address in (first, last):
            if pieces[-1].address < address < pieces[-1].address + pieces[-1].size:
                pieces.append(pieces[-1].cut(address - pieces[-1].address))
        next(piece for piece in pieces if piece.address == first).mapped = False
        for piece in pieces:
            self.insert(piece)
        return last - first


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
