"""How a process ended, in words, with the names of signals."""

import signal


def ended(returncode: int) -> str:
    """Return "ended with status 1", or "ended by signal SIGILL (Illegal instruction)".

    returncode is that of `subprocess`: the negative number of the signal if one ended the process.
    """
    if returncode >= 0:
        return f"ended with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:  # a real-time signal between the first and the last has no name
        name = str(-returncode)
    meaning = signal.strsignal(-returncode)
    return f"ended by signal {name}" + (f" ({meaning})" if meaning else "")
