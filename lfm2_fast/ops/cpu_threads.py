"""Threads of a CPU that work beside a Python thread: OpenMP's, which torch starts."""

from __future__ import annotations

import ctypes
import sys
import threading

# OpenMP's name for a pause after which threads are started again when they are needed.
_SOFT = 1


def release_threads() -> None:
    """End the OpenMP threads that work for the calling thread. They start again when it needs them.

    OpenMP keeps threads for every Python thread that has run parallel work. If there are more than
    processors, GNU's OpenMP lets them sleep as soon as an operation ends. The next operation waits
    until they are awake: steps of 8.7 ms took 11.5. So a thread whose work goes on in another one
    calls this.
    """
    if sys.platform != "linux":  # elsewhere torch has another OpenMP
        return
    # torch makes the functions of its OpenMP visible to all.
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)


def release_other_threads() -> None:
    """``release_threads`` in every thread but the main one, where work mostly comes again."""
    if threading.current_thread() is not threading.main_thread():
        release_threads()
