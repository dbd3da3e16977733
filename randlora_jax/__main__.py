"""`python -m randlora_jax`: the command line of `cli`."""

import sys

from randlora_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
