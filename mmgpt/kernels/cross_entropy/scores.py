"""What cross-entropy tells of each position."""

from typing import NamedTuple

import jax


class Scores(NamedTuple):
    """Of each position: `cross_entropy`, `log_z` (both `[B, T]` float32), and whether the target is likeliest.

    They have no gradient.
    """

    cross_entropy: jax.Array
    log_z: jax.Array
    right: jax.Array
