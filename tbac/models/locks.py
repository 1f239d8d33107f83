"""A lock for objects that several threads, processes and copies may use."""

import os
from collections.abc import Callable
from functools import wraps
from threading import RLock
from types import TracebackType
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


class CallLock:
    """Lets one thread at a time into a block; the same thread may enter again.

    A copy of it, by `copy.deepcopy` or by a pickle, is a lock of its own. So is what a forked process gets, in which a
    thread that held it at that moment doesn't exist. Nor do the threads that torch computes with: waiting for them
    would never end, so a forked process computes with one thread.
    """

    def __init__(self) -> None:
        self._lock, self._process = RLock(), os.getpid()

    def __enter__(self) -> None:
        if self._process != os.getpid():
            self._lock, self._process = RLock(), os.getpid()
            torch.set_num_threads(1)
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["CallLock"], tuple[()]]:
        return CallLock, ()


def one_at_a_time(method: Function) -> Function:
    """Decorate a method: one thread at a time may run it and the others of its object's `lock`."""

    @wraps(method)
    def locked(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *arguments, **options)

    return locked  # type: ignore[return-value]
