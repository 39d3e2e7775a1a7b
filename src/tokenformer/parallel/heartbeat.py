"""A process that hangs is noticed by another one, long before a collective gives up waiting for it.

Each process of a run counts up a number in torchrun's store, from a thread of its own, and watches that of the next
one. Where the number stands still the watcher says so and ends; torchrun then ends the others.
"""

import atexit
import os
import socket
import sys
import threading
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from tokenformer.errors import UserError

# Without a sign of life for as long, a process counts as hanging. Beats need Python's lock for a moment only: what
# computes, reads or compiles gives it up in between.
LIMIT_SECONDS = 45.0
_BEATS_IN_LIMIT = 9
_FINISHED = "finished"


def start_heartbeat() -> None:
    """Begin to beat, and to watch the next process, until this one ends; TOKENFORMER_HEARTBEAT=0 leaves it out.

    To be called by all processes, once the default group of torch.distributed is there.

    Raises:
        UserError: TOKENFORMER_HEARTBEAT is no number of seconds.
    """
    limit = _limit()
    # A restart has the store of the attempt before.
    name = [uuid.uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    if limit and dist.get_world_size() > 1:
        # A connection of its own: that of the group may wait in a call of another thread.
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=limit),
        )
        beating = _Heartbeat(dist.PrefixStore(f"heartbeat-{name[0]}", store), limit)
        atexit.register(beating.finish)
        threading.Thread(target=beating.run, name="heartbeat", daemon=True).start()


def _limit() -> float:
    given = os.environ.get("TOKENFORMER_HEARTBEAT", str(LIMIT_SECONDS))
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise UserError(f"TOKENFORMER_HEARTBEAT must be a number of seconds, or 0 for none, got '{given}'")
    return limit


class _Heartbeat:
    """The beats of this process, and what it knows of the next one's."""

    def __init__(self, store: dist.Store, limit: float) -> None:
        self._store, self._limit = store, limit
        self._own = dist.get_rank()
        self._watched = (self._own + 1) % dist.get_world_size()
        self._over = threading.Event()

    def run(self) -> None:
        """Beat and watch until `finish`; ends this process where the other one hangs."""
        seen, since, count = "", time.monotonic(), 0
        try:
            self._store.set(f"host-{self._own}", socket.gethostname())
            while not self._over.wait(self._limit / _BEATS_IN_LIMIT):
                count += 1
                self._store.set(f"beat-{self._own}", str(count))
                last = self._last()
                if last != seen:
                    seen, since = last, time.monotonic()
                silent = time.monotonic() - since
                if silent > self._limit and seen != _FINISHED:
                    self._give_up(silent)
        except RuntimeError:
            # The store is gone, and with it torchrun: waiting for each other ends by its own limit.
            return

    def finish(self) -> None:
        """Say that this process ends by itself."""
        self._over.set()
        try:
            self._store.set(f"beat-{self._own}", _FINISHED)
        except RuntimeError:
            return  # the store is gone already, and so is whoever would read it

    def _last(self) -> str:
        key = f"beat-{self._watched}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _give_up(self, silent: float) -> None:
        key = f"host-{self._watched}"
        host = f" on {self._store.get(key).decode()}" if self._store.check([key]) else ""
        sys.stderr.write(
            f"tokenformer: error: process {self._watched}{host} gives no sign of life for {silent:.0f} s, so the "
            "run ends: the same command goes on from the last checkpoint\n"
        )
        sys.stderr.flush()
        os._exit(2)  # the main thread waits in a collective, where no exception reaches it
