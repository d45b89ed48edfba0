"""Which row of a Decoder each reply has: rows stand in blocks, and a block holds replies of one group alone.

A group is what has a beginning in common. Replies end in any sequence, so blocks get holes; those in use are then moved
together, into as few blocks as hold them, and these to the front, where smaller steps reach them.
"""

from __future__ import annotations

from collections import defaultdict


class Seats:
    """Rows in use, and by which group.

    Args:
        rows: all of them, a multiple of `block`.
    """

    def __init__(self, rows: int, block: int) -> None:
        self.rows, self.block = rows, block
        self.taken: dict[int, int] = {}  # row -> group

    def free(self, group: int) -> list[int]:
        """Rows that the group may take: holes in its own blocks first, then whole blocks that are empty."""
        groups = {row // self.block: group for row, group in self.taken.items()}
        own = [row for row in range(self.rows) if groups.get(row // self.block) == group and row not in self.taken]
        return own + [row for row in range(self.rows) if row // self.block not in groups]

    def needed(self) -> int:
        """The first so many rows are enough, after moves; of a block that is alone only what is in use."""
        counts = self._counts()
        if len(counts) == 1 and (count := sum(counts.values())) <= self.block:
            return count
        return sum(-(-count // self.block) for count in counts.values()) * self.block

    def together(self, within: int) -> dict[int, int]:
        """Moves, source -> target, after which as few blocks are in use as can be, all within the first rows.

        All of them happen at once; `taken` is as it is after them.

        Args:
            within: at least `needed()`.
        """
        members: dict[int, list[int]] = defaultdict(list)  # of each block
        for row in sorted(self.taken):
            members[row // self.block].append(row)
        blocks: dict[int, list[int]] = defaultdict(list)  # of each group
        for block, rows in members.items():
            blocks[self.taken[rows[0]]].append(block)
        kept: dict[int, list[int]] = {}
        for group, count in self._counts().items():
            fullest = sorted(blocks[group], key=lambda block: (-len(members[block]), block))
            kept[group] = fullest[: -(-count // self.block)]
        inside = max(1, within // self.block)
        used = {block for each in kept.values() for block in each}
        empty = iter([block for block in range(inside) if block not in used])
        moves: dict[int, int] = {}
        for group, stay in kept.items():
            home = {block: block if block < inside else next(empty) for block in stay}
            end = min(self.block, within)  # of a block
            sitting = [row for block in stay for row in members[block] if row % self.block < end]
            targets = [home[row // self.block] * self.block + row % self.block for row in sitting]
            holes = sorted({home[block] * self.block + at for block in stay for at in range(end)} - set(targets))
            others = [row for block in blocks[group] for row in members[block] if row not in set(sitting)]
            pairs = [*zip(sitting, targets, strict=True), *zip(others, holes, strict=False)]
            moves |= {source: target for source, target in pairs if source != target}
        self.taken = {moves.get(row, row): group for row, group in self.taken.items()}
        return moves

    def _counts(self) -> dict[int, int]:
        counts: dict[int, int] = defaultdict(int)
        for group in self.taken.values():
            counts[group] += 1
        return counts
