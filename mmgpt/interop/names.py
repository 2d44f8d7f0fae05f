"""How a tensor of a Hugging Face checkpoint and a part of our state are called, and which order their numbers have."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a Hugging Face checkpoint and where its numbers are with us.

    `path` is a leaf of the state, as "params/stack/stacked/mlp/up" or "variables/...", and `layer` its index along the
    leaf's leading axis where the leaf is a stack of layers. Without a path the tensor is nothing that we compute with;
    it is kept as it is and written back.

    The numbers are ours after `hf.reshape(split).transpose(order)`; both default to no change.
    """

    hf_name: str
    hf_shape: tuple[int, ...]
    path: str | None
    layer: int | None = None
    split: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """The tensor in our layout: a view, never a copy."""
        array = array.reshape(self.hf_shape if self.split is None else self.split)
        return array if self.order is None else array.transpose(self.order)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Our part of the leaf in the checkpoint's layout."""
        if self.order is not None:
            array = array.transpose(tuple(np.argsort(self.order)))
        return array.reshape(self.hf_shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with us, of one layer; the leaf may have more rows of its first axes, as padding."""
        return self.to_ours(np.broadcast_to(np.float32(0), self.hf_shape)).shape
