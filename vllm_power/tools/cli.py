"""The command line `vllm-power`.

The options of each command are in its tool's ``command.py``, and this file registers them. A command imports its
dependencies when it runs, so that `--help` is fast.
"""

import signal
import sys

import typer

from vllm_power.tools.adapt.command import adapt_command
from vllm_power.tools.bench.command import bench
from vllm_power.tools.calibrate.command import calibrate_command
from vllm_power.tools.common.commands import pattern_command, version_command
from vllm_power.tools.demo.command import demo_command
from vllm_power.tools.doctor.command import doctor_command
from vllm_power.tools.evals.command import eval_command
from vllm_power.tools.passkey.command import passkey
from vllm_power.tools.probe.command import probe_command
from vllm_power.tools.recall.command import recall_command
from vllm_power.tools.web.command import explore_command

app = typer.Typer(help="PowerAttention for vLLM: tools around the attention backend.", no_args_is_help=True)
app.command("pattern")(pattern_command)
app.command("doctor")(doctor_command)
app.command("demo")(demo_command)
app.command("explore")(explore_command)
app.add_typer(bench, name="bench")
# Arguments after `--` go to the server that the command starts.
app.command("eval", context_settings={"allow_extra_args": True})(eval_command)
app.command("recall")(recall_command)
app.command("calibrate")(calibrate_command)
app.command("probe")(probe_command)
app.command("adapt")(adapt_command)
app.add_typer(passkey, name="passkey")
app.command("version")(version_command)


def main() -> None:
    """Run the command line."""
    # Unwinds the stack, so that the servers and engines of a command stop with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    app()


if __name__ == "__main__":
    main()
