"""Who runs the pieces of an experiment: this process, several local ones, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pathlift.errors import InputError
from pathlift.storage.packages import package

Work = Callable[..., None]
"""A function of a module, whose arguments can be pickled and which leaves its result on disk."""


class Backend(ABC):
    """Runs one function for many arguments."""

    @abstractmethod
    def run(self, work: Work, jobs: Sequence[tuple[Any, ...]]) -> Iterator[int]:
        """Run all jobs; after the first error no new ones begin.

        Args:
            work: The function.
            jobs: Arguments of each call.

        Yields:
            How many are done, after each.
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to let go
        """Let go what was held for the jobs."""


class Here(Backend):
    """One after the other in this process; needed when several devices train one network."""

    def run(self, work: Work, jobs: Sequence[tuple[Any, ...]]) -> Iterator[int]:
        """See `Backend.run`."""
        for done, job in enumerate(jobs, 1):
            work(*job)
            yield done


class Processes(Backend):
    """Several processes on this machine, which live until the last job; they end with the process that started them."""

    def __init__(self, count: int) -> None:
        """Choose how many.

        Args:
            count: Number of processes.
        """
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Work, jobs: Sequence[tuple[Any, ...]]) -> Iterator[int]:
        """See `Backend.run`."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.count, mp_context=context, initializer=_end_with_parent)
        futures = [self._pool.submit(work, *job) for job in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                yield done
        except BrokenProcessPool as error:
            raise InputError(
                "A process was ended from outside while it computed, for lack of memory perhaps. What is done is kept: run it "
                "again, with fewer --jobs."
            ) from error
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        """See `Backend.close`."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _end_with_parent() -> None:
    """Let this process end when the one that started it is gone, even if that was killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Ray(Backend):
    """A Ray cluster, local or of many machines that share the folder of results."""

    def __init__(self, address: str | None = None, cpus: int = 1, gpus: float = 0) -> None:
        """Connect.

        Args:
            address: Of the cluster, ``auto`` for the one of this machine; None starts one here.
            cpus: CPUs that a job takes.
            gpus: GPUs that a job takes.

        Raises:
            InputError: Ray is not installed, or there is no such cluster.
        """
        self.ray = package("ray", "ray")
        self.options = {"num_cpus": cpus, "num_gpus": gpus}
        if not self.ray.is_initialized():
            try:
                self.ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
            except (ConnectionError, ValueError) as error:
                raise InputError(f"There is no Ray cluster at '{address}': {error}") from error

    def run(self, work: Work, jobs: Sequence[tuple[Any, ...]]) -> Iterator[int]:
        """See `Backend.run`."""
        remote = self.ray.remote(work).options(**self.options)
        waiting = [remote.remote(*job) for job in jobs]
        done = 0
        while waiting:
            ready, waiting = self.ray.wait(waiting)
            try:
                self.ray.get(ready)
            except self.ray.exceptions.RayTaskError as error:
                for other in waiting:
                    self.ray.cancel(other)
                raise error.cause from error
            done += len(ready)
            yield done


def backend_of(name: str, jobs: int, *, address: str | None = None, gpus: float = 0, cpus: int = 1) -> Backend:
    """Return a backend by name.

    Args:
        name: ``processes`` or ``ray``.
        jobs: Number of local processes; 1 is this one.
        address: Of a Ray cluster.
        gpus: GPUs that a job on Ray takes.
        cpus: CPUs that a job on Ray takes.

    Returns:
        The backend.

    Raises:
        InputError: There is no such name, or ``jobs`` is not positive.
    """
    if jobs < 1:
        raise InputError(f"jobs must be at least 1, found {jobs}.")
    if name == "ray":
        return Ray(address, cpus, gpus)
    if name != "processes":
        raise InputError(f"There is no backend '{name}'. There are: processes, ray.")
    return Here() if jobs == 1 else Processes(jobs)
