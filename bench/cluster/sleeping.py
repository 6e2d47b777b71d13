"""Applications whose engine has steps of a fixed time, to run many replicas on few cores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

TINY = Path(__file__).resolve().parents[2] / "lfm2_fast" / "tiny"
OPTIONS = {"device": "cpu", "dtype": "float32", "memory": "64MB"}


def make_app(step: float, **options: Any) -> Any:
    """Return the application of the small checkpoint, each of whose steps takes ``step`` seconds.

    The model runs in the first milliseconds of a step, so the texts are its own.
    """
    from lfm2_fast.server.run import create_app

    app = create_app(TINY, **{**OPTIONS, **options})
    engine = app.state.service.engine.engine
    real = engine.step

    def slow() -> Any:
        end = time.monotonic() + step
        events = real()
        time.sleep(max(end - time.monotonic(), 0))
        return events

    engine.step = slow
    return app
