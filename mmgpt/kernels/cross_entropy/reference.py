"""The specification of cross-entropy over a vocabulary, in float32 and with all logits in memory."""

import jax
import jax.numpy as jnp

from mmgpt.kernels.cross_entropy.scores import Scores


def cross_entropy(
    x_BTD: jax.Array, w_DV: jax.Array, target_BT: jax.Array, weight_BT: jax.Array, *, used: int, z_loss: float
) -> tuple[jax.Array, Scores]:
    """`(sum of weight x (cross-entropy + z_loss x log(Z)^2), scores)`; columns from `used` on take no part."""
    logits = jnp.einsum("btd,dv->btv", x_BTD.astype(jnp.float32), w_DV.astype(jnp.float32), precision="highest")
    column = jnp.arange(logits.shape[-1])[None, None, :]
    logits = jnp.where(column < used, logits, -jnp.inf)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.sum(jnp.where(column == target_BT[..., None], logits, 0.0), axis=-1)
    scores = Scores(log_z - picked, log_z, picked >= jnp.max(logits, axis=-1))
    total = jnp.sum(weight_BT * (scores.cross_entropy + z_loss * jnp.square(log_z)))
    return total, jax.lax.stop_gradient(scores)
