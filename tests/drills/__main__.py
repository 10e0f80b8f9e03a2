"""``python -m tests.drills embed --kills 30 --seed 0``"""

from __future__ import annotations

import argparse
import tempfile
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__)
    parser.add_argument("command", choices=("embed", "evaluate", "compress", "index", "train"))
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args()
    settings = {"kills": options.kills, "seed": options.seed}
    if options.processes > 1:
        if options.command in ("compress", "index"):
            parser.error(f"{options.command} runs in one process")
        settings["processes"] = options.processes
    with tempfile.TemporaryDirectory() as folder:
        run = import_module(f"tests.drills.{options.command}").run
        done = run(Path(folder), **settings)
    print(f"{options.command}: {done.total()} kills, every run ended with the same files")
    for name, times in sorted(done.items()):
        print(f"  {times:3d} {name}")
