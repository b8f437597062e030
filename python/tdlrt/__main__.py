"""`python -m tdlrt`: the `tdlrt` command, in the form that `torchrun -m` takes."""

import os
import sys

from tdlrt import processes
from tdlrt.cli import main

status = main()
if processes.started_together():
    # gloo's threads outlive the group, and abort the process now and then while the interpreter is taken down
    # (pytorch/pytorch#179291); all files are written and closed by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
