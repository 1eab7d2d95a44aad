"""Compare models with k-NN and a linear probe: report/<name>@<version>.

As a Ray job: `python jobs/evaluate.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
