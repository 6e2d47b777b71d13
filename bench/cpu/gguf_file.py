"""Checkpoint as a GGUF file, for llama.cpp's programs.

The package writes BF16. Files of other kinds are made by llama.cpp's own quantiser from that.
Checkpoints of random weights have no vocabulary, so one is made up: callers pass token ids.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from lfm2_fast.config import Config
from lfm2_fast.weights.gguf_export import export_gguf
from lfm2_fast.weights.gguf_vocabulary import Vocabulary

KINDS = ("BF16", "Q8_0", "Q4_0", "Q4_K_M")
LONGEST = 900


class GGUFError(RuntimeError):
    """Error of a GGUF file that cannot be made: the reason, and the remedy."""


def made_up(size: int) -> Vocabulary:
    """Return a token ``t<id>`` for every id, since the server aborts without texts."""
    return Vocabulary([f"t{i}" for i in range(size)], [1] * size, ["t 0"])


def gguf_file(folder: Path, kind: str, quantiser: Path) -> Path:
    """Return a checkpoint's GGUF file of a kind of ``KINDS``, and make it if it is missing.

    ``quantiser`` is the program ``llama-quantize``. Without it the package ``gguf`` writes BF16 and
    Q8_0. Raises GGUFError if the file cannot be made.
    """
    path = folder / f"{folder.name}-{kind}.gguf"
    if path.is_file():
        return path
    partial = path.with_suffix(".partial")
    try:
        if kind != "BF16" and quantiser.is_file():
            command = [quantiser, gguf_file(folder, "BF16", quantiser), partial, kind]
            subprocess.run(
                [str(word) for word in command],
                capture_output=True,
                text=True,
                check=True,
                timeout=LONGEST,
            )
        elif kind not in ("BF16", "Q8_0"):
            raise GGUFError(f"no {path.name}: there is no {quantiser}: run `make peers`")
        else:
            size = Config.from_file(folder / "config.json").vocab_size
            export_gguf(folder, partial, kind.lower(), vocabulary=made_up(size))
    except ValueError as error:
        raise GGUFError(f"no {path.name}: {error}") from error
    except subprocess.CalledProcessError as error:
        said = (error.stderr.strip() or error.stdout.strip() or "nothing").splitlines()[-1]
        raise GGUFError(f"no {path.name}: {quantiser.name} failed and said: {said}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise GGUFError(f"no {path.name}: {error}") from error
    partial.replace(path)
    return path
