"""`python -m tdlrt`: the `tdlrt` command, in the form that `torchrun -m` takes."""

import sys

from tdlrt.cli import main

sys.exit(main())
