"""Stand-in for optimum-intel's exporter: keeps its arguments, and the logits of a table.

The table is in the folder ``TABLES``, by the type of weights. Without it the exporter fails.
"""

import json
import os
import shutil
import sys
from pathlib import Path

arguments = sys.argv[1:]
folder = Path(arguments[-1])
given = dict(zip(arguments, arguments[1:], strict=False))
table = Path(os.environ["TABLES"]) / f"{given['--weight-format']}.npz"
if not table.is_file():
    sys.exit("No such model\nunsupported architecture")
folder.mkdir()
shutil.copy(table, folder / "table.npz")
(folder / "arguments.json").write_text(json.dumps(arguments))
(folder / "openvino_model.xml").touch()
