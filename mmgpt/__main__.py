"""`python -m mmgpt`: the same as the console script."""

import sys

from mmgpt.core.ending import requeue_on_sigterm


def main() -> int:
    """Runs one command and returns its exit code. A SIGTERM while a training run is still being imported is heard."""
    if sys.argv[1:2] == ["train"]:
        requeue_on_sigterm()
    from mmgpt import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
