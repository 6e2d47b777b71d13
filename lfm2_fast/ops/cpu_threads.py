"""Threads of a CPU that work beside a Python thread: OpenMP's, which torch starts."""

from __future__ import annotations

import ctypes
import sys
import threading

# OpenMP's name for a pause after which threads are started again when they are needed.
_SOFT = 1


def release_threads() -> None:
    """End the OpenMP threads that work for the calling thread. They start again when it needs them.

    OpenMP keeps threads for every Python thread that has run parallel work. If all threads together
    are more than the processors, GNU's OpenMP lets them sleep as soon as an operation ends. The
    next operation waits until they are awake: a server's step took 11.5 ms, and takes 9.1 without.
    So a thread whose work goes on in another one calls this.
    """
    if sys.platform != "linux":  # elsewhere torch has another OpenMP
        return
    # torch makes the functions of its OpenMP visible to all.
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause is not None:
        pause(_SOFT)


def release_other_threads() -> None:
    """Release the threads of the calling thread, unless it is the main one.

    Work mostly comes again there.
    """
    if threading.current_thread() is not threading.main_thread():
        release_threads()
