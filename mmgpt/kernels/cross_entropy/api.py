"""Cross-entropy of a vocabulary projection that never holds the logits.

`xla.py` goes over chunks of positions, and forms both gradients of a chunk while its logits are there: three products
of positions x width x vocabulary in all, where a backward pass of its own would make the logits again and take four.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from mmgpt.kernels.cross_entropy import reference, xla
from mmgpt.kernels.cross_entropy.scores import Scores

Implementation = Literal["reference", "xla"]

CHUNK_BYTES = 400_000_000
"""Of a chunk's float32 logits, at most: 512 positions of a vocabulary of 184k."""


def cross_entropy(
    x_BTD: jax.Array,
    w: jax.Array,
    target_BT: jax.Array,
    weight_BT: jax.Array,
    *,
    used: int,
    z_loss: float = 0.0,
    rows: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    implementation: Implementation = "xla",
) -> tuple[jax.Array, Scores]:
    """`(total [] float32, scores)`: the sum over positions of weight x (cross-entropy + z_loss x log(Z)^2).

    `x [B, T, D]`; `w [D, V]` float32, or with `rows` `[V, D]` (an embedding's table), as it lies at rest on the mesh;
    `target, weight [B, T]`. Columns from `used` on take no part. Logits and sums are float32, products of `x`'s dtype.
    The gradients of `x` and `w` are those of `total` alone. z_loss: arXiv 2202.08906. Larger chunks take `chunk_bytes`
    of memory and read the sums of `w`'s gradient less often.

    Raises ValueError where shapes do not fit.
    """
    V, D = w.shape if rows else w.shape[::-1]
    B, T = x_BTD.shape[:2]
    if x_BTD.shape != (B, T, D) or target_BT.shape != (B, T) or weight_BT.shape != (B, T) or not 0 < used <= V:
        raise ValueError(
            f"cross_entropy: x {x_BTD.shape}, w {w.shape} ({'rows' if rows else 'columns'} are ids), target "
            f"{target_BT.shape}, weight {weight_BT.shape}, {used} ids in use; expected x [B, T, D], w of D and V, "
            "target and weight [B, T], and 1 to V ids."
        )
    if implementation == "reference":
        return reference.cross_entropy(
            x_BTD, jnp.swapaxes(w, 0, 1) if rows else w, target_BT, weight_BT, used=used, z_loss=z_loss
        )
    return xla.cross_entropy(
        x_BTD, w, target_BT, weight_BT, used=used, z_loss=z_loss, rows=rows, chunk_bytes=chunk_bytes
    )
