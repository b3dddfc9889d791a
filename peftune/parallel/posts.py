"""What ranks say of themselves, and what is wrong with them by that."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from peftune.errors import EXIT_OUR_FAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """What a rank says of itself."""

    number: int
    host: str
    machine: str
    pid: int
    born: str | None
    """When its process began: with `pid` it names a process for ever."""
    doing: str
    marks: int
    still_s: float
    """Since it last came further."""
    waiting: bool
    place: str
    """Of the main thread, if it has stood still for a while."""
    left: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the run ends."""

    ranks: tuple[int, ...]
    """Whose fault it is; empty: nobody's in particular."""
    message: str
    code: int
    ended: bool = False
    """The rank named has ended of itself; the others may be about to, for the same reason."""


def standstill(
    posts: Mapping[int, Post], unheard_s: Mapping[int, float], limit_s: float, silent_s: float | None = None
) -> Verdict | None:
    """What is wrong with the ranks that have not ended, by what they say of themselves.

    Args:
        posts: by rank.
        unheard_s: seconds since the last post of each.
        limit_s: the time-out.
        silent_s: the one for ranks that post nothing, if it is another.
    """
    posts = {rank: post for rank, post in posts.items() if not post.left}
    silent = [rank for rank in posts if unheard_s[rank] > (silent_s or limit_s)]
    if silent:
        return Verdict(tuple(silent), "; ".join(
            f"{named(rank, posts[rank])} has not been heard of for {unheard_s[rank]:.0f} s: it is stopped, its "
            "machine is lost, or the link to it is cut" for rank in silent), EXIT_OUR_FAULT)
    if not posts or min(post.still_s + unheard_s[rank] for rank, post in posts.items()) <= limit_s:
        return None
    if max(unheard_s[rank] for rank in posts) > limit_s / 2:
        return None  # a silent one is behind it, and will be named
    late = [rank for rank, post in posts.items() if not post.waiting] or list(posts)
    fewest = min(posts[rank].marks for rank in late)
    late = [rank for rank in late if posts[rank].marks == fewest]
    said = "; ".join(f"{named(rank, posts[rank])} has stood still for {posts[rank].still_s:.0f} s"
                     f"{', at ' + posts[rank].place if posts[rank].place else ''}" for rank in late)
    if len(late) == len(posts):
        return Verdict((), f"no rank is behind the others: {said}", EXIT_OUR_FAULT)
    return Verdict(tuple(late), f"{said}; the others wait for it", EXIT_OUR_FAULT)


def named(rank: int, post: Post) -> str:
    """For the beginning of a sentence."""
    return f"rank {rank} on {post.host} (process {post.pid}), {post.doing},"


def this_machine() -> str:
    """Equal for processes that see each other's numbers: of one start of one machine, and one container."""
    if sys.platform != "linux":
        return f"{socket.gethostname()} {uuid.getnode()}"
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def born(pid: int) -> str | None:
    """When a process of this machine began, by the machine's own count; None if it is gone."""
    if sys.platform != "linux":
        return "" if psutil.pid_exists(pid) else None
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]  # proc_pid_stat(5): field 22, of which pid, name and state are off


def lives(post: Post) -> bool:
    """Whether its process, of this machine, is there."""
    return born(post.pid) == post.born
