"""Rule checks for grid puzzles. A wrong shape or a value of the wrong kind is a wrong answer, never an exception.

`full=False` accepts what MME-Reasoning's own script accepts; `full=True` asks for every rule of the puzzle (that script
lets a Sudoku hold numbers outside 1 to n, and islands of Hashi stay unconnected or be crossed).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

Grid = Sequence[Sequence[int]]


def whole_grid(value: Any, size: int) -> Grid | None:
    """`value` if it is a size x size list of whole numbers."""
    if not isinstance(value, list) or len(value) != size:
        return None
    rows = [row for row in value if isinstance(row, list) and len(row) == size]
    right = len(rows) == size and all(isinstance(cell, int) and not isinstance(cell, bool) for r in rows for cell in r)
    return value if right else None


def keeps_givens(grid: Grid, givens: Any) -> bool:
    """Every given cell (not None) is unchanged."""
    if not isinstance(givens, list) or len(givens) != len(grid):
        return False
    pairs = ((given, cell) for g, row in zip(givens, grid, strict=True) for given, cell in zip(g, row, strict=False))
    return all(given is None or given == cell for given, cell in pairs)


def sudoku(value: Any, givens: Any, box: tuple[int, int], full: bool = True) -> bool:
    """Rows, columns and boxes of `box` (rows, columns) hold different numbers; the givens are kept."""
    size = box[0] * box[1]
    grid = whole_grid(value, size)
    if grid is None or not keeps_givens(grid, givens):
        return False
    lines = [*grid, *(list(column) for column in zip(*grid, strict=True)), *_boxes(grid, box)]
    if full:
        return all(sorted(line) == list(range(1, size + 1)) for line in lines)
    return all(len(set(line)) == size for line in lines)


def _boxes(grid: Grid, box: tuple[int, int]) -> Iterator[list[int]]:
    size = len(grid)
    for top in range(0, size, box[0]):
        for left in range(0, size, box[1]):
            yield [grid[r][c] for r in range(top, top + box[0]) for c in range(left, left + box[1])]


def visible(heights: Sequence[int]) -> int:
    """Towers seen from the front of a row: those higher than all before."""
    seen, highest = 0, None
    for height in heights:
        if highest is None or height > highest:
            seen, highest = seen + 1, height
    return seen


def skyscraper(value: Any, givens: Any, clues: Any, full: bool = True) -> bool:
    """A Latin square whose visible towers match the clues: [top, left, right, bottom], None where there is none."""
    if not isinstance(givens, list) or not isinstance(clues, list) or len(clues) != 4:
        return False
    size = len(givens)
    grid = whole_grid(value, size)
    if grid is None or not keeps_givens(grid, givens):
        return False
    rows, columns = [list(row) for row in grid], [list(column) for column in zip(*grid, strict=True)]
    if any(len(set(line)) != size for line in (*rows, *columns)):
        return False
    if full and any(sorted(row) != list(range(1, size + 1)) for row in rows):
        return False
    views = (columns, rows, [row[::-1] for row in rows], [column[::-1] for column in columns])
    pairs = (
        (clue, line) for side, lines in zip(clues, views, strict=True) for clue, line in zip(side, lines, strict=False)
    )
    return all(clue is None or visible(line) == clue for clue, line in pairs)


def yin_yang(value: Any, givens: Any) -> bool:
    """Both colours (0 and 1) are connected, no 2 x 2 block has one colour, the givens are kept."""
    if not isinstance(givens, list):
        return False
    grid = whole_grid(value, len(givens))
    if grid is None or not keeps_givens(grid, givens) or {cell for row in grid for cell in row} - {0, 1}:
        return False
    cells = range(len(grid) - 1)
    blocks = ({grid[r][c], grid[r][c + 1], grid[r + 1][c], grid[r + 1][c + 1]} for r in cells for c in cells)
    return all(len(block) == 2 for block in blocks) and all(_connected(grid, colour) for colour in (0, 1))


def _connected(grid: Grid, colour: int) -> bool:
    places = {(r, c) for r, row in enumerate(grid) for c, cell in enumerate(row) if cell == colour}
    if not places:
        return True
    open_, seen = [next(iter(places))], set()
    while open_:
        r, c = open_.pop()
        seen.add((r, c))
        near = {(r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)}
        open_ += near & places - seen
    return seen == places


def hashi(value: Any, islands: Any, full: bool = True) -> bool:
    """Bridges [{start, end, number}] between islands [{cord, requirement}], coordinates like `b12`.

    Straight, at most two between a pair, none crossing, every island with as many as it asks for; with `full` also no
    bridge over an island, and everything connected.
    """
    try:
        needed = {str(island["cord"]): int(island["requirement"]) for island in islands}
        bridges = [(str(b["start"]), str(b["end"]), b["number"]) for b in value]
        if not bridges or any(a == b or {a, b} - set(needed) for a, b, _ in bridges):
            return False
        ends = [(_place(a), _place(b)) for a, b, _ in bridges]
    except (TypeError, KeyError, ValueError):
        return False
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for _, _, n in bridges):
        return False
    between: Counter[frozenset[str]] = Counter()
    have: Counter[str] = Counter()
    for a, b, number in bridges:
        between[frozenset((a, b))] += number
        have[a] += number
        have[b] += number
    if max(between.values()) > 2 or any(have[island] != need for island, need in needed.items()):
        return False
    if any(a[0] != b[0] and a[1] != b[1] for a, b in ends):
        return False
    # two bridges written as two entries of one pair share their cells; written once they count once
    lines = [_under(a, b) for a, b in (set(ends) if full else ends)]
    apart = list({frozenset(line) for line in lines}) if full else [frozenset(line) for line in lines]
    covered = [cell for line in apart for cell in line]
    if len(covered) != len(set(covered)):
        return False
    return not full or (not set(covered) & {_place(i) for i in needed} and _joined(needed, between))


def _place(cord: str) -> tuple[int, int]:
    return ord(cord[0]), int(cord[1:])


def _under(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    low, high = sorted((a, b))
    if low[0] == high[0]:
        return [(low[0], y) for y in range(low[1] + 1, high[1])]
    return [(x, low[1]) for x in range(low[0] + 1, high[0])]


def _joined(islands: dict[str, int], between: Counter[frozenset[str]]) -> bool:
    open_, seen = [next(iter(islands))], set()
    while open_:
        island = open_.pop()
        seen.add(island)
        open_ += [other for pair in between if island in pair for other in pair - seen]
    return seen == set(islands)
