"""Grid puzzles against enumeration of every grid."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from vlm.scoring.boards import hashi, skyscraper, sudoku, visible, yin_yang

EMPTY = [[None] * 4 for _ in range(4)]


def _all_sudoku() -> list[list[list[int]]]:
    """The 4 x 4 grids, by filling rows and checking the definition alone."""
    rows = list(itertools.permutations(range(1, 5)))
    found = []
    for grid in itertools.product(rows, repeat=4):
        columns = all(len({row[c] for row in grid}) == 4 for c in range(4))
        if columns and all(len({*grid[r][c : c + 2], *grid[r + 1][c : c + 2]}) == 4 for r in (0, 2) for c in (0, 2)):
            found.append([list(row) for row in grid])
    return found


@pytest.fixture(scope="module")
def grids() -> list[list[list[int]]]:
    return _all_sudoku()


def test_sudoku_accepts_the_288_grids_and_no_corruption(grids: list[list[list[int]]]) -> None:
    assert len(grids) == 288
    for grid in grids:
        assert sudoku(grid, EMPTY, (2, 2))
        assert sudoku(grid, EMPTY, (2, 2), full=False)
    for grid in grids[::4]:
        for r, c, value in itertools.product(range(4), range(4), range(10)):
            if grid[r][c] != value:
                harmed = [list(row) for row in grid]
                harmed[r][c] = value
                assert not sudoku(harmed, EMPTY, (2, 2))
                # the original script only looks for repetitions: a number that belongs to no Sudoku passes
                assert sudoku(harmed, EMPTY, (2, 2), full=False) is (value not in (1, 2, 3, 4))


def test_sudoku_keeps_what_was_given(grids: list[list[list[int]]]) -> None:
    grid = grids[0]
    givens: list[list[int | None]] = [list(row) for row in EMPTY]
    givens[1][2] = grid[1][2]
    assert sudoku(grid, givens, (2, 2))
    givens[1][2] = grid[1][2] % 4 + 1
    assert not sudoku(grid, givens, (2, 2))


SIX = [
    [1, 2, 3, 4, 5, 6],
    [4, 5, 6, 1, 2, 3],
    [2, 3, 1, 5, 6, 4],
    [5, 6, 4, 2, 3, 1],
    [3, 1, 2, 6, 4, 5],
    [6, 4, 5, 3, 1, 2],
]


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "grid",
        [[1]],
        [[1, 2, 3, 4]] * 3,
        [[1, 2, 3, "4"]] * 4,
        [[True] * 4] * 4,
        [[1.0] * 4] * 4,
        [1, 2, 3, 4],
    ],
)
def test_wrong_shapes_are_wrong_answers(value: Any) -> None:
    assert not sudoku(value, EMPTY, (2, 2))
    assert not skyscraper(value, EMPTY, [[None] * 4] * 4)
    assert not yin_yang(value, EMPTY)
    assert not hashi(value, [{"cord": "a1", "requirement": 1}])


def test_sudoku_of_six() -> None:
    assert sudoku(SIX, [[None] * 6] * 6, (2, 3))
    assert not sudoku(SIX, [[None] * 6] * 6, (3, 2))


def test_skyscrapers_against_counting_by_hand() -> None:
    """All Latin squares of 3: clues made by looking along each line accept that square; other squares only if equal."""
    lines = list(itertools.permutations(range(1, 4)))
    squares = [g for g in itertools.product(lines, repeat=3) if all(len({r[c] for r in g}) == 3 for c in range(3))]
    assert len(squares) == 12

    def clues(grid: tuple[tuple[int, ...], ...]) -> list[list[int]]:
        def seen(line: list[int]) -> int:
            return sum(all(line[j] < line[i] for j in range(i)) for i in range(len(line)))

        columns = [[row[c] for row in grid] for c in range(3)]
        return [
            [seen(c) for c in columns], [seen(list(r)) for r in grid],
            [seen(list(r)[::-1]) for r in grid], [seen(c[::-1]) for c in columns],
        ]  # fmt: skip

    for wanted, given in itertools.product(squares, repeat=2):
        answer = [list(row) for row in given]
        assert skyscraper(answer, [[None] * 3] * 3, clues(wanted)) is (clues(wanted) == clues(given))
    assert visible([1, 3, 2, 4]) == 3


def _brute_yin_yang(grid: list[list[int]]) -> bool:
    size = len(grid)
    for r, c in itertools.product(range(size - 1), repeat=2):
        if grid[r][c] == grid[r][c + 1] == grid[r + 1][c] == grid[r + 1][c + 1]:
            return False
    for colour in (0, 1):
        labels = {(r, c): (r, c) for r in range(size) for c in range(size) if grid[r][c] == colour}
        for _ in range(size * size):  # spread the smallest label over each group
            for r, c in labels:
                near = [labels[p] for p in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)) if p in labels]
                labels[r, c] = min([labels[r, c], *near])
        if len(set(labels.values())) > 1:
            return False
    return True


def test_yin_yang_against_every_board_of_three() -> None:
    accepted = 0
    for cells in itertools.product((0, 1), repeat=9):
        grid = [list(cells[i : i + 3]) for i in (0, 3, 6)]
        assert yin_yang(grid, [[None] * 3] * 3) is _brute_yin_yang(grid)
        accepted += yin_yang(grid, [[None] * 3] * 3)
    assert accepted > 10
    assert not yin_yang([[0, 2], [1, 1]], [[None] * 2] * 2)


def test_hashi_against_every_set_of_bridges() -> None:
    """Four islands on a square and one in the middle of an edge: 0 to 2 bridges between each straight pair."""
    islands = {"a1": 3, "c1": 3, "a3": 2, "c3": 3, "a2": 1}
    pairs = [("a1", "c1"), ("a1", "a2"), ("a2", "a3"), ("a3", "c3"), ("c1", "c3"), ("a1", "a3")]
    listed = [{"cord": name, "requirement": need} for name, need in islands.items()]
    accepted = 0
    for counts in itertools.product(range(3), repeat=len(pairs)):
        chosen = [(a, b, n) for (a, b), n in zip(pairs, counts, strict=True) if n]
        degree = {name: sum(n for a, b, n in chosen if name in (a, b)) for name in islands}
        groups = {name: {name} for name in islands}
        for a, b, _ in chosen:
            merged = groups[a] | groups[b]
            for name in merged:
                groups[name] = merged
        over_an_island = any({a, b} == {"a1", "a3"} for a, b, _ in chosen)  # a2 lies between
        right = degree == islands and len(groups["a1"]) == len(islands) and not over_an_island
        value = [{"start": a, "end": b, "number": n} for a, b, n in chosen]
        assert hashi(value, listed) is right, value
        accepted += right
        # the original asks for neither connection nor free islands
        assert hashi(value, listed, full=False) is (degree == islands), value
    assert accepted >= 1


def test_hashi_refuses_crossings() -> None:
    islands = [{"cord": c, "requirement": 1} for c in ("a2", "c2", "b1", "b3")]
    cross = [{"start": "a2", "end": "c2", "number": 1}, {"start": "b1", "end": "b3", "number": 1}]
    assert not hashi(cross, islands, full=False)
    assert not hashi([*cross, {"start": "a2", "end": "b3", "number": 1}], islands)


@pytest.mark.parametrize(
    "bridge",
    [{"start": "a1"}, {"start": "a1", "end": "a1", "number": 1}, {"start": "a1", "end": "z9", "number": 1},
     {"start": "a1", "end": "a3", "number": "2"}, {"start": "a1", "end": "a3", "number": 3},
     {"start": "a1", "end": "a3", "number": -1}, {"start": "a1", "end": "a3", "number": True}, None, "a1-a3"],
)  # fmt: skip
def test_hashi_bad_bridges_are_wrong_answers(bridge: Any) -> None:
    assert not hashi([bridge], [{"cord": "a1", "requirement": 2}, {"cord": "a3", "requirement": 2}])
