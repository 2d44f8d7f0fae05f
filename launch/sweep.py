"""Expands `--sweep key=v1,v2` into the changes of each run: all combinations, the last key changing fastest."""

import itertools

from .spec import LaunchError

MOST = 1000
"""Runs of a sweep; more are a slip of the hand."""


def combinations(sweeps: tuple[str, ...]) -> list[tuple[str, ...]]:
    """`key=value` changes of each run; one run without changes where nothing is swept."""
    choices: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, values = sweep.partition("=")
        key = key.strip().replace("-", "_")
        found = _split(values)
        if not equals or not key or "" in found:
            raise LaunchError(
                f"--sweep {sweep!r}: write it as key=value,value, as in optimizer.learning_rate=1e-4,3e-4."
            )
        if key in choices:
            raise LaunchError(f"--sweep {key} is given twice: write all its values after one.")
        if len(set(found)) < len(found):
            raise LaunchError(f"--sweep {sweep!r} has a value twice, which would be the same run.")
        choices[key] = [f"{key}={value}" for value in found]
    runs = list(itertools.product(*choices.values()))
    if len(runs) > MOST:
        raise LaunchError(f"the sweep has {len(runs)} runs, more than {MOST}: sweep fewer values.")
    return runs


def _split(values: str) -> list[str]:
    """Values between commas; those inside brackets belong to one value, as in (1,2),(3,4)."""
    found, depth = [""], 0
    for c in values:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            found.append("")
        else:
            found[-1] += c
    return [value.strip() for value in found]
