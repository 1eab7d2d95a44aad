"""Train a backbone without labels: model/<name>@<version>.

As a Ray job: `python jobs/pretrain.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
