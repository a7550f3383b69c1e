"""``python -m soak --minutes 30``: prints the figures as JSON; status 1 if something does not hold."""

import argparse
import json
import signal
import sys
from pathlib import Path

from soak import report, run, served

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--minutes", type=float, default=30.0)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument(
    "--folder", type=Path, default=Path("build/soak"), help="for the model and the server's log"
)
arguments = parser.parse_args()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the server too
model = served.model(arguments.folder / "model")
with served.start(model, arguments.folder / "log") as server:
    soaked = run.main(server, arguments.minutes, arguments.seed)
print(json.dumps(report.figures(soaked), indent=2))
for failure in (failed := report.failures(soaked)):
    print(failure, file=sys.stderr)
sys.exit(bool(failed))
