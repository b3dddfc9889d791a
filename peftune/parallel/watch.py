"""Ranks watch each other: one that dies, hangs or ends alone ends the run on all of them, by name, in bounded time.

Two threads of each rank do it, on a connection of their own to the store at which the ranks have met; so it works
under every strategy, and while the main thread waits in an exchange that will never end. One thread posts where this
rank stands and reads where the others do; the other judges, and waits for nobody.

Slow is not hung. A rank that is in a step, an evaluation or generation has come further when it begins another
micro-batch, batch or token; in anything else, when it computes or uses the disk. The run hangs when no rank at all has
come further for the time-out: so ranks may wait for one that prepares data or writes a checkpoint as long as that
takes. Late are those that do not wait in an exchange.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NoReturn

import torch.distributed as dist

from peftune.errors import EXIT_OUR_FAULT, PeftuneError, Preempted, report_exit_code
from peftune.parallel.posts import Post, Verdict, born, lives, named, standstill, this_machine
from peftune.parallel.progress import Activity, place_of_main_thread
from peftune.parallel.stop import Stop
from peftune.parallel.world import EXCHANGE_LIMIT, World, opened_world

BEAT_S = 1.0
"""Between two posts of a rank; an eighth of the time-out where that is less."""
GRACE_S = 3.0
"""For ranks that end of themselves for the same reason, and for the one that speaks, before the others end."""
LOST_S = 10.0
"""Without a post, once an exchange with another rank is broken."""
GO_ON = "start the same command again: it goes on from the newest checkpoint"


class Watch:
    """The two threads of one rank."""

    def __init__(self, world: World, limit_s: float) -> None:
        """Start them. All ranks do."""
        self._world, self._progress, self._limit_s = world, world.progress, limit_s
        self._pause_s = min(BEAT_S, limit_s / 8)
        self._posts: dict[int, Post] = {}
        self._heard: dict[int, float] = {}
        self._answered = time.monotonic()
        """When the store was asked, the last time that it did."""
        self._dead_since: dict[int, float] = {}
        self._verdict: Verdict | None = None
        self._verdict_since = 0.0
        self._broken = self._leaving = False
        self._number = 0
        self._left, self._hurry = threading.Event(), threading.Event()
        self._identity: dict[str, Any] = {"host": socket.gethostname(), "machine": this_machine(), "pid": os.getpid(),
                                          "born": born(os.getpid())}
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              wait_for_workers=False, timeout=datetime.timedelta(seconds=max(GRACE_S, limit_s)))
        self._store = dist.PrefixStore(f"watch-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._keys = [f"rank-{rank}" for rank in range(world.ranks)]
        self._active_s = time.monotonic()
        self._post()
        self._store.wait(self._keys, EXCHANGE_LIMIT)  # for the others' first posts; not in an exchange, which may hang
        for target, name in ((self._tell, "posts"), (self._judge, "watches")):
            threading.Thread(target=target, daemon=True, name=name).start()

    def leave(self, error: BaseException | None) -> None:
        """Say that this rank ends, and why. If another rank's end is the reason, this does not return."""
        if error is not None and _broken_exchange(error):
            self._broken, self._progress.ending = True, False
            self._left.wait(LOST_S + 2 * GRACE_S)  # the other thread finds out who it is
        doing = self._progress.doing
        self._progress.ending = True
        if isinstance(error, Preempted):
            pass  # all ranks have agreed
        elif isinstance(error, PeftuneError):
            self._post_verdict(f"rank {self._world.rank} on {self._identity['host']}, {doing}: {error}",
                               error.exit_code)
        elif error is not None:
            self._post_verdict(f"rank {self._world.rank} on {self._identity['host']}, {doing}, ended by "
                               f"{type(error).__name__}: its own output has the rest", EXIT_OUR_FAULT)
        self._leaving = True
        self._hurry.set()
        self._left.wait(GRACE_S)
        self._left.set()

    def before_stopping(self) -> None:
        """Called when this rank is told to stop. If the launcher does that because another ended: wait for ours."""
        until = time.monotonic() + GRACE_S + 3 * self._pause_s
        while (self._verdict is not None or self._dead(certain=False)) and time.monotonic() < until:
            time.sleep(self._pause_s / 4)

    def _post_verdict(self, message: str, code: int) -> None:
        self._verdict = self._verdict or Verdict((self._world.rank,), message, code, ended=True)

    def _tell(self) -> None:
        activity = Activity()
        while True:
            if not (self._progress.steady or self._progress.waiting) and activity.since_asked():
                self._active_s = time.monotonic()
            with contextlib.suppress(dist.DistError):  # the other thread sees for how long there was no answer
                self._post()
                self._read()
                if self._leaving:
                    self._left.set()
                    return
            self._hurry.wait(self._pause_s)

    def _post(self) -> None:
        self._number += 1
        now, progress = time.monotonic(), self._progress
        still_s = now - max(progress.moved_s, self._active_s)
        place, exchanging = place_of_main_thread() if still_s > self._limit_s / 4 else ("", False)
        post = Post(number=self._number, doing=progress.doing, marks=progress.marks, still_s=still_s, place=place,
                    waiting=progress.waiting or exchanging, left=self._leaving, **self._identity)
        self._store.set(self._keys[self._world.rank], json.dumps(asdict(post)))

    def _read(self) -> None:
        asked = time.monotonic()  # what others say later is not in the answer, however late that comes
        for rank, said in enumerate(self._store.multi_get(self._keys)):
            post = Post(**json.loads(said))
            if rank not in self._posts or post.number != self._posts[rank].number:
                self._heard[rank] = time.monotonic()
            self._posts[rank] = post
        if self._verdict is not None:
            self._store.compare_set("verdict", "", json.dumps(asdict(self._verdict)))
        elif self._store.check(["verdict"]):
            said = json.loads(self._store.get("verdict"))
            self._verdict = Verdict(**{**said, "ranks": tuple(said["ranks"])})
        self._answered = asked

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(self._pause_s):
            looked, last = time.monotonic(), looked
            if looked - last > 5 * self._pause_s:  # this process was stopped itself, perhaps with all the others
                self._answered = self._active_s = looked
                self._heard = dict.fromkeys(self._heard, looked)
            found = None if self._verdict is not None else self._found()
            self._verdict = self._verdict or found
            grace_s = GRACE_S if self._verdict is not None and self._verdict.ended else 0.0
            if self._verdict is None or self._progress.ending:
                self._verdict_since = time.monotonic()
            elif time.monotonic() >= self._verdict_since + grace_s:
                self._end(self._verdict)

    def _found(self) -> Verdict | None:
        now = time.monotonic()
        dead = self._dead(certain=True)
        if dead:
            return Verdict(tuple(dead), "; ".join(
                f"{named(rank, self._posts[rank])} has died. If its own output says nothing, somebody has killed it, "
                "or the kernel for want of memory" for rank in dead), EXIT_OUR_FAULT)
        silent_s = min(self._limit_s, LOST_S) if self._broken else self._limit_s
        if now - self._answered > silent_s:
            return Verdict((), f"{os.environ['MASTER_ADDR']}, where the ranks have met, has not answered for "
                           f"{now - self._answered:.0f} s: the machine is lost, or the link to it is cut",
                           EXIT_OUR_FAULT)
        unheard_s = {rank: now - heard for rank, heard in self._heard.items()}
        return standstill(self._posts, unheard_s, self._limit_s, silent_s)

    def _dead(self, *, certain: bool) -> list[int]:
        """Ranks of this machine whose process is gone. `certain`: and that had not said before that they end."""
        for rank, post in list(self._posts.items()):
            if post.machine == self._identity["machine"] and not post.left and not lives(post):
                self._dead_since.setdefault(rank, time.monotonic())
        return [rank for rank, since in self._dead_since.items()
                if not self._posts[rank].left and (not certain or self._answered > since + self._pause_s)]

    def _end(self, verdict: Verdict) -> NoReturn:
        """End this process, and late ones of this machine: nobody else may, where one is stopped.

        One rank speaks; one on each machine, if they may not hear each other any more.
        """
        others = [rank for rank, post in self._posts.items() if rank not in verdict.ranks and not post.left]
        if self._world.rank in verdict.ranks:
            _show_main_thread()
        alone = not verdict.ranks and self._world.local_rank == 0
        if alone or self._world.rank == min(others, default=self._world.rank):
            sys.stderr.write(f"error: {verdict.message}\n" + ("" if verdict.ended else f"  mend: {GO_ON}\n"))
            sys.stderr.flush()
            time.sleep(2 * self._pause_s)  # until the others have heard it too
        else:
            time.sleep(GRACE_S)
        for rank in () if verdict.ended else verdict.ranks:
            post = self._posts[rank]
            if rank != self._world.rank and post.machine == self._identity["machine"] and lives(post):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(post.pid, signal.SIGKILL)
        for child in multiprocessing.active_children():
            child.kill()
        # a launcher ends the ranks that still wait only where one fails
        os._exit(verdict.code if verdict.code == EXIT_OUR_FAULT else report_exit_code(verdict.code))


@contextlib.contextmanager
def watched_world(limit_s: int | None, stop: Stop) -> Iterator[World]:
    """The processes' group, in which each watches the others, until the block ends.

    Args:
        limit_s: the time-out; None watches nobody, and a rank that fails alone says so itself.
        stop: asked to wait where a signal is the consequence of another rank's end.
    """
    with opened_world() as world:
        if world.ranks == 1:
            yield world
            return
        if limit_s is None:
            with _saying_what_others_do_not(world):
                yield world
            return
        watch = Watch(world, limit_s)
        stop.before = watch.before_stopping
        try:
            yield world
        except BaseException as error:
            watch.leave(error)
            raise
        watch.leave(None)


@contextlib.contextmanager
def _saying_what_others_do_not(world: World) -> Iterator[None]:
    """Where nobody watches: what the user can mend is for the main process to say; a rank that fails without it says it
    itself, and ends so that launchers end the others."""
    try:
        yield
    except Preempted:
        raise  # all ranks have agreed
    except PeftuneError as error:
        with contextlib.suppress(dist.DistNetworkError):  # the store's process is gone, and has said why
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                  wait_for_workers=False)
            key = f"failed-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
            try:
                if world.is_main:
                    store.set(key, "")
                store.wait([key], datetime.timedelta(seconds=GRACE_S))
            except dist.DistStoreError:
                who = f"rank {world.rank} on {socket.gethostname()}"
                sys.stderr.write(f"error: {who}, {world.progress.doing}: {error}\n")
                sys.stderr.flush()
                os._exit(report_exit_code(error.exit_code, alone=True))
        raise


def _broken_exchange(error: BaseException) -> bool:
    """Whether an exchange has failed: torch has a type for NCCL's failures, and gloo's say who they are."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _show_main_thread() -> None:
    """Where it hangs, for the one who must find out why."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    sys.stderr.write("the main thread stands here:\n" + "".join(traceback.format_stack(frame)))
    sys.stderr.flush()
