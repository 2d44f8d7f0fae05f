"""Published image tokenizers with small random weights, and ours with the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmgpt.interop.names import Entry
from mmgpt.train.state import Structure


def randomised(module: Any, seed: int) -> Any:
    """A torch module whose weights keep a signal's size through many layers, with norms and statistics off their start.

    Every number comes from numpy, so that a version of torch changes nothing.
    """
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            kind = name.rsplit(".", 1)[-1]
            if kind == "num_batches_tracked":
                value: Any = np.asarray(7)
            elif tensor.ndim > 1:
                value = rng.standard_normal(tensor.shape) / np.sqrt(np.prod(tensor.shape[1:]))
            elif kind == "running_var":
                value = rng.uniform(0.5, 2.0, tensor.shape)
            else:
                value = (kind == "weight") + 0.1 * rng.standard_normal(tensor.shape)
            tensor.copy_(torch.as_tensor(value))
    return module.eval()


def spread_codes(module: Any, latents_ND: np.ndarray, seed: int) -> None:
    """Draws a torch module's codebook from the normal distribution that some latents have: many codes are then used."""
    import torch

    book = module.quantize.embedding.weight
    draws = np.random.default_rng(seed).multivariate_normal(latents_ND.mean(0), np.cov(latents_ND.T), len(book))
    with torch.no_grad():
        book.copy_(torch.as_tensor(draws))


def adopted(entries: list[Entry], module: Any, structure: Structure) -> tuple[Any, Any]:
    """`(params, variables)` with the numbers of a torch module."""
    tensors = module.state_dict()
    # Copied: JAX may read a host array in place and later, and torch moves its statistics in place.
    named = {entry.path: entry.to_ours(tensors[entry.hf_name].numpy().copy()) for entry in entries}

    def leaf(path: Any, shape: jax.ShapeDtypeStruct, part: str) -> jax.Array:
        value = named[f"{part}/{jax.tree_util.keystr(path, simple=True, separator='/')}"]
        assert value.shape == shape.shape
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), shape.sharding.spec)
        return jax.device_put(jnp.asarray(value, shape.dtype), sharding)

    params, variables = structure.abstract()
    return (
        jax.tree.map_with_path(lambda path, shape: leaf(path, shape, "params"), params),
        jax.tree.map_with_path(lambda path, shape: leaf(path, shape, "variables"), variables),
    )
