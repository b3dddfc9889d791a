"""Which rank and micro-batch an example of a step goes to. Pure: every rank computes the same answer alone."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence


def deal(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """Positions 0..n-1 dealt to `ranks` hands of nearly equal token counts.

    Longest first, each to the lightest hand (Graham, 1969: at most 4/3 of the best possible maximum).
    Ties go to the lower position and the lower rank, so the answer is unique.

    Returns:
        One list a rank, longest examples first. Together they hold each position once.
    """
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, rank = heapq.heappop(loads)
        hands[rank].append(position)
        heapq.heappush(loads, (load + lengths[position], rank))
    return hands


def padded_groups(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Positions 0..n-1 cut into groups whose padded size, rows times longest row, fits the budget.

    Longest first, so that a group holds rows of like length. An example longer than the budget
    gets a group of its own: a memory knob never drops an example.
    """
    groups: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * longest > budget_tokens:
            groups.append([])
            longest = lengths[position]
        groups[-1].append(position)
    return groups


def equal_groups(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Positions 0..n-1 in groups of equal length whose sum fits the budget: rows without any padding. Longest first."""
    alike: dict[int, list[int]] = {}
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        alike.setdefault(lengths[position], []).append(position)
    return [members[begin : begin + most] for length, members in alike.items()
            for most in [max(1, budget_tokens // max(1, length))] for begin in range(0, len(members), most)]


def packed_groups(lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Positions 0..n-1 in groups whose lengths add up to the budget at most; an example over it stands alone.

    First fit decreasing (Johnson, 1973: at most 11/9 of the fewest groups possible, plus 6/9). Members of a group
    are in order of falling length, so that equal ones are neighbours.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for number, left in enumerate(room):
            if lengths[position] <= left:
                groups[number].append(position)
                room[number] -= lengths[position]
                break
        else:
            groups.append([position])
            room.append(budget_tokens - lengths[position])
    return groups


Grouping = Callable[[Sequence[int], int], list[list[int]]]
"""Lengths and a token budget -> the positions of each micro-batch: one of the above."""


def rank_groups(
    lengths: Sequence[int], ranks: int, budget_tokens: int, grouping: Grouping = padded_groups
) -> list[list[list[int]]]:
    """Micro-batches of every rank for one step: as many for each rank, short ranks filled with empty ones.

    Collectives must match, so a rank with less work still takes part with an empty micro-batch.
    """
    dealt = []
    for hand in deal(lengths, ranks):
        groups = grouping([lengths[i] for i in hand], budget_tokens)
        dealt.append([[hand[j] for j in group] for group in groups])
    most = max(1, max(len(groups) for groups in dealt))
    return [groups + [[] for _ in range(most - len(groups))] for groups in dealt]
