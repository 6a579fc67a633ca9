"""`python -m pipeline`: the scoring job, the same as `beam-vae run`."""

import sys

from pipeline.command import main

if __name__ == "__main__":
    sys.exit(main())
