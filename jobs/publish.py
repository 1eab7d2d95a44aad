"""Write safetensors and model card, checked: release/<name>@<version>.

As a Ray job: `python jobs/publish.py RECIPE [key=value ...]`; see jobs/README.md.
"""

import sys

from heliostat.cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
