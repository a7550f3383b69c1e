"""Show why a server failed: the first error's own sentence, and where the whole log is."""

from rich.console import Console

from vllm_power.tools.common.first_error import first_error
from vllm_power.tools.common.vllm_server import ServerFailed, last_lines


def show(console: Console, failure: ServerFailed) -> None:
    """Print the failure. If no error is found in its log, print the end of the log."""

    def say(line: str, style: str | None = None) -> None:
        console.print(line, style=style, markup=False, soft_wrap=True)

    say(f"Failed: {failure}.", "red")
    if cause := first_error(failure.log):
        say(f"  {cause}")
        say(f"The whole log: {failure.log}")
    else:
        say(f"The end of {failure.log}:")
        for line in last_lines(failure.log, 25):
            say("  " + line, "dim")
