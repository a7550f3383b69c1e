"""``python -m sweep``: try every architecture that has no result yet, or those that are named, and make the page."""

import argparse
import os
import tempfile
import time
from pathlib import Path

from sweep import table
from sweep.apart import ENVIRONMENT, try_apart
from sweep.architectures import architectures
from sweep.results import RESULTS, read, write


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m sweep")
    options.add_argument("names", nargs="*", help="architectures to try again; none: all without a result")
    options.add_argument("--results", type=Path, default=RESULTS, help="where the results are kept")
    options.add_argument("--logs", type=Path, help="keep each process's log in this folder")
    options.add_argument("--seconds", type=float, default=400, help="the limit for one architecture")
    asked = options.parse_args()
    found = {architecture.name: architecture for architecture in architectures()}
    names = asked.names or [name for name in found if name not in read(asked.results)]
    with tempfile.TemporaryDirectory() as scratch:
        logs = asked.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names, 1):
            began = time.monotonic()
            result = try_apart(found[name], logs / f"{name}.log", asked.seconds)
            results = read(asked.results) | {name: result}
            write(asked.results, [results[known] for known in found if known in results])
            spent = time.monotonic() - began
            print(
                f"{number}/{len(names)} {name}: {result['verdict']} {result['why']} ({spent:.0f} s)",
                flush=True,
            )
    if asked.results == RESULTS:
        table.write_page()


if __name__ == "__main__":
    os.environ |= ENVIRONMENT
    main()
