"""`python -m ant_lightning` is the command `ant-lightning`."""

import sys

from ant_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
