"""The `tdlrt` command: what it prints when something is wrong, and its exit status; the commands are in `commands.py`.

Exit status: 0 done; 1 a file or the training failed; 2 a bad option; 130 interrupted. An error is one sentence on
standard error. With several processes, what all of them find wrong is said by the first.
"""

import os
import sys


def main(arguments=None):
    """Entry point of the console script. Returns the exit status."""
    try:
        from tdlrt import commands
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        return _fail("the command line needs typer, which is not installed: pip install 'tucker-kernels[train]'", 1)
    try:
        return commands.app(arguments, prog_name="tdlrt", standalone_mode=False) or 0
    except commands.FAILURES as error:
        return _fail(error, 1, everywhere=isinstance(error, commands.train.DivergenceError))
    except OSError as error:  # a full disk, a folder that is not there or may not be written
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        # typer's usage errors: their class is private to some of its versions, their methods are not.
        if not hasattr(error, "format_message"):
            raise
        return _fail(_one_sentence(error), error.exit_code, everywhere=True)


def _one_sentence(error):
    message = error.format_message().strip().rstrip(".")
    return message[:1].lower() + message[1:]


def _fail(message, status, everywhere=False):
    process = os.environ.get("RANK", "0")
    if process == "0":
        print(f"tdlrt: {message}", file=sys.stderr)
    elif not everywhere:
        print(f"tdlrt: process {process}: {message}", file=sys.stderr)
    return status
