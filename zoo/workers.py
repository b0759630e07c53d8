"""Workers that share out one job: processes of this machine, or actors of a Ray cluster.

A job is a function that each worker calls once, to load what it needs; it returns the function that is then called for
one item after another. Which worker did an item, and when, changes no result. A worker that ends before its item is
done, because it was killed or its machine is gone, is replaced, and only that item is done again.
"""

from __future__ import annotations

import copyreg
import logging
import multiprocessing
import os
import signal
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, Protocol

from zoo._names import checked
from zoo.logs import Progress, silent

Job = Callable[[], Callable[[Any], Any]]
_PATIENCE = 10.0  # seconds to wait for an actor that has nothing to do
_MOST_TRIES = 3  # workers that an item may end, or that may end before they begin
_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class Outcome:
    """What became of the last that a worker was given; the first outcome is that it has begun."""

    value: Any = None
    error: Exception | None = None
    died: str = ""  # why the worker is no more


class Workers(Protocol):
    """A way to have workers; what stands for a worker is its own affair."""

    afar: bool  #: whether they may be on other machines, which see no file of this one

    @property
    def count(self) -> int:
        """How many work at a time."""

    def begin(self, job: Job) -> Any:
        """Start a worker; it is given nothing before its first outcome."""

    def give(self, worker: Any, item: Any) -> None:
        """Let it do an item."""

    def wait(self, workers: Sequence[Any]) -> list[tuple[Any, Outcome]]:
        """Those of these workers that have an outcome, at least one."""

    def end(self, worker: Any) -> None:
        """Stop it, whatever it is doing."""


def carry_out(
    job: Job,
    items: Mapping[str, Callable[[], Any]],
    workers: Workers | None = None,
    *,
    title: str = "items",
    progress: Progress | None = None,
) -> Iterator[tuple[str, Any]]:
    """Have all items done, and yield their names and results as they come, in any order.

    Args:
        job: sent to every worker, so what it refers to must be importable there.
        items: name, for messages -> what makes the item when a worker is free for it.
        workers: who does it; None does one after another here.
        title: what items are called beside the `progress` bar.

    Raises:
        RuntimeError: an item ended three workers, or three ended before they began.
        Exception: the error of an item; the other workers are stopped then.
    """
    with (progress or silent)(title, total=len(items)) as advance:
        found = _one_by_one(job, items) if workers is None else _shared_out(job, items, workers)
        for name, result in found:
            advance(1)
            yield name, result


def _one_by_one(job: Job, items: Mapping[str, Callable[[], Any]]) -> Iterator[tuple[str, Any]]:
    function = job() if items else None
    for name, make in items.items():
        assert function is not None
        yield name, function(make())


def _shared_out(job: Job, items: Mapping[str, Callable[[], Any]], workers: Workers) -> Iterator[tuple[str, Any]]:
    todo, tries, ended = deque(items), Counter[str](), list[str]()
    crew: list[Any] = []  # workers that have begun, or are about to
    idle: list[Any] = []
    busy: dict[int, str] = {}  # id of a worker -> its item; of one that is about to begin, none
    try:
        while todo or busy:
            while len(crew) < min(workers.count, len(todo) + len(busy)):
                crew.append(workers.begin(job))
            while todo and idle:
                worker, name = idle.pop(), todo.popleft()
                busy[id(worker)] = name
                workers.give(worker, items[name]())
            for worker, outcome in workers.wait([each for each in crew if not any(each is one for one in idle)]):
                doing = busy.pop(id(worker), "")
                if outcome.error is not None:
                    raise outcome.error
                if outcome.died:
                    crew = [each for each in crew if each is not worker]
                    workers.end(worker)
                    tries[doing] += 1
                    ended.append(f"{outcome.died} at {doing or 'its beginning'}")
                    if tries[doing] == _MOST_TRIES:
                        msg = f"expected workers that live through {doing or 'their beginning'}"
                        raise RuntimeError(f"{msg}, got {'; '.join(ended)}; is there memory enough for each?")
                    todo.extendleft([doing] if doing else [])
                    continue
                idle.append(worker)
                if doing:
                    yield doing, outcome.value
                else:
                    tries[""] = 0
    finally:
        for worker in crew:
            workers.end(worker)
        if ended:
            _log.warning("work was done again where workers ended early: %s", "; ".join(ended))


def _outcome(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """The result of a call, or its error."""
    try:
        return Outcome(function(*arguments))
    except Exception as error:
        return Outcome(error=error)


def _limit_threads(threads: int) -> None:
    import torch  # commands that list names do not wait for it

    torch.set_num_threads(threads)


@dataclass(eq=False)
class _Process:
    process: Any
    pipe: Any
    number: int


class Processes:
    """Processes of this machine, among which torch's threads are divided.

    They are started anew, so a script that uses them has its work under `if __name__ == "__main__":`.

    Args:
        count: how many.

    Raises:
        ValueError: fewer than one.
    """

    @checked
    def __init__(self, count: int) -> None:
        if count < 1:
            msg = f"expected one process or more, got {count}"
            raise ValueError(msg)
        self.count, self.afar, self._begun = count, False, 0
        self._sent: tuple[Job | None, bytes] = None, b""
        self._context = multiprocessing.get_context("forkserver")

    def begin(self, job: Job) -> _Process:
        """A new process."""
        import torch

        if self._sent[0] is not job:
            self._sent = job, _by_value(job)
            own = getattr(job, "func", job).__module__  # processes begin with torch and with this
            self._context.set_forkserver_preload(["torch", own])
        here, there = self._context.Pipe()
        threads, self._begun = max(1, torch.get_num_threads() // self.count), self._begun + 1
        process = self._context.Process(target=_serve, args=(there, threads), daemon=True)
        process.start()
        there.close()
        worker = _Process(process, here, self._begun)
        self._send(worker, self._sent[1])
        return worker

    def give(self, worker: _Process, item: Any) -> None:
        """Send it an item."""
        self._send(worker, _by_value(item))

    def _send(self, worker: _Process, data: bytes) -> None:
        with suppress(OSError):  # one that is no more is noticed by `wait`
            worker.pipe.send_bytes(data)

    def wait(self, workers: Sequence[_Process]) -> list[tuple[_Process, Outcome]]:
        """Outcomes in the order of the workers."""
        ready = connection.wait([worker.pipe for worker in workers])
        return [(worker, self._received(worker)) for worker in workers if worker.pipe in ready]

    def _received(self, worker: _Process) -> Outcome:
        try:
            received: Outcome = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            code = worker.process.exitcode
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            return Outcome(died=f"process {worker.number} ({why})")
        return received

    def end(self, worker: _Process) -> None:
        """Kill it."""
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()


def _by_value(item: Any) -> bytes:
    """As a process receives it; without what torch does to send tensors, which moves them into shared memory for good.

    Raises:
        TypeError: it cannot be sent.
    """
    data = BytesIO()
    try:
        pickler = ForkingPickler(data)
        pickler.dispatch_table = copyreg.dispatch_table
        pickler.dump(item)
    except Exception as error:  # a foreign object may raise anything when it is taken apart
        msg = f"expected what another process can be sent, got: {error}; define it in a module, not in a function"
        raise TypeError(msg) from error
    return data.getvalue()


def _serve(pipe: Any, threads: int) -> None:
    """The life of a process: until it is ended, or whoever gives it items is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption ends the one that started it, which ends this one
    threading.Thread(target=_end_with_the_parent, daemon=True).start()  # even in the middle of an item
    _limit_threads(threads)
    try:
        begun = _outcome(lambda: pipe.recv()())
        _send(pipe, Outcome(error=begun.error))
        while begun.error is None:
            _send(pipe, _outcome(begun.value, pipe.recv()))
    except (EOFError, OSError):
        return


def _end_with_the_parent() -> None:
    """End this process once the one that started it is no more, though it was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _send(pipe: Any, outcome: Outcome) -> None:
    try:
        data = _by_value(outcome)
    except TypeError as error:  # such as an error that holds a lock
        data = _by_value(Outcome(error=RuntimeError(f"{outcome.error or error}")))
    pipe.send_bytes(data)


class _Actor:
    """What lives on a Ray cluster in place of a process."""

    def __init__(self, threads: int) -> None:
        _limit_threads(threads)
        self._function: Any = None

    def forget(self) -> None:
        self._function = None

    def begin(self, job: Job) -> Outcome:
        begun = _outcome(job)
        self._function = begun.value
        return Outcome(error=begun.error)

    def do(self, item: Any) -> Outcome:
        return _outcome(self._function, item)


@dataclass(eq=False)
class _Remote:
    actor: Any
    ticket: Any  # of what it is doing; None for nothing
    number: int


class Ray:
    """Actors of a Ray cluster (needs the extra `ray`): the one that $RAY_ADDRESS names, otherwise one on this machine.

    An actor that is lost with its machine is replaced as soon as the cluster has room for another one. Those that have
    done their work are kept for the next job, until this object is let go of or another one is made.

    Args:
        count: how many actors work at a time; as many as the cluster has room for if left out.
        cpus: cores of each, and torch's threads in it.
        gpus: CUDA devices of each.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at that address.
    """

    _latest: ClassVar[Callable[[], Ray | None]] = staticmethod(lambda: None)  # the one whose actors may be kept

    def __init__(self, count: int | None = None, *, cpus: int = 1, gpus: float = 0) -> None:
        try:
            import ray
        except ImportError as error:
            msg = "work on a cluster needs Ray: pip install 'zoo-ensemble[ray]'"
            raise ImportError(msg) from error
        self._ray: Any = ray
        self.afar, self._begun, self._sent = True, 0, dict[int, Any]()
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own reports to nobody
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        self.count = count or max(1, int(self._ray.cluster_resources().get("CPU", 1)) // cpus)
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_task_retries": 0}
        self._make = self._ray.remote(**options)(_Actor)
        self._threads, self._kept = cpus, list[Any]()
        if (former := Ray._latest()) is not None:  # whose actors would leave these no room
            former._kept.clear()
        Ray._latest = staticmethod(weakref.ref(self))

    def begin(self, job: Job) -> _Remote:
        """An actor that is kept, or a new one, which the cluster may let wait for room; a machine gets the job once."""
        if id(job) not in self._sent:
            self._sent = {id(job): (job, self._ray.put(job))}
        actor = self._free()
        self._begun += 1
        return _Remote(actor, actor.begin.remote(self._sent[id(job)][1]), self._begun)

    def _free(self) -> Any:
        """One of the actors that are kept and still live, otherwise a new one."""
        while self._kept:
            actor = self._kept.pop()
            with suppress(self._ray.exceptions.RayError):
                self._ray.get(actor.forget.remote(), timeout=_PATIENCE)
                return actor
        return self._make.remote(self._threads)

    def give(self, worker: _Remote, item: Any) -> None:
        """Send it an item."""
        worker.ticket = worker.actor.do.remote(item)

    def wait(self, workers: Sequence[_Remote]) -> list[tuple[_Remote, Outcome]]:
        """At least one outcome, of those that there are."""
        ready, _ = self._ray.wait([worker.ticket for worker in workers], num_returns=1)
        return [(worker, self._received(worker)) for worker in workers if worker.ticket in ready]

    def _received(self, worker: _Remote) -> Outcome:
        lost = self._ray.exceptions
        try:
            received: Outcome = self._ray.get(worker.ticket)
        except (lost.RayActorError, lost.WorkerCrashedError, lost.OutOfMemoryError, lost.ObjectLostError) as error:
            return Outcome(died=f"actor {worker.number} ({type(error).__name__})")
        except lost.RayTaskError as error:  # what could not be sent
            return Outcome(error=RuntimeError(str(error).strip().splitlines()[-1]))
        worker.ticket = None
        return received

    def end(self, worker: _Remote) -> None:
        """Kill it, unless it has nothing to do."""
        if worker.ticket is None and Ray._latest() is self:
            self._kept.append(worker.actor)
        else:
            self._ray.kill(worker.actor)
