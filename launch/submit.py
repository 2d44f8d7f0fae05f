"""`python launch/submit.py PRESET --backend NAME ...` in a checkout: the same as `mmgpt launch` once installed."""

import sys
from pathlib import Path


def main() -> int:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from mmgpt import cli

    return cli.main(["launch", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
