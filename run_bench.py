"""Runs an experiment file and prints its table: `ris-bench run` from a checkout."""

import sys

from ris_bench.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
