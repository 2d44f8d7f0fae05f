"""Parts of a laid-out document, and media without their codes: what is the same for every medium of a size."""

import functools
from typing import NamedTuple

import numpy as np

from mmgpt.tokens.grammars.grammar import Tokens
from mmgpt.tokens.grammars.layout import Layout


class Laid(NamedTuple):
    """A part of a document: `ids int32 [N]`, `place int32 [N, 2]` or none, modality, and weight of all or of each."""

    ids: np.ndarray
    place: np.ndarray | None
    modality: int
    weight: float | np.ndarray


@functools.lru_cache(maxsize=1024)
def frame(layout: Layout, H: int, W: int, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Kind `[slots]` and place `[slots, 2]` of each slot of a frame."""
    slot = np.arange(layout.frame(H, W, C))
    return layout.kind(np, slot, 2, H, W, C), layout.place(np, slot, H, W, C)


class Around(NamedTuple):
    """What stands around the codes of a medium: the first id of each kind of slot, the ids before and after, the id in
    the last slot or -1, and the weights of codes and of layout."""

    first: tuple[int, ...]
    head: tuple[int, ...]
    tail: tuple[int, ...]
    last: int
    vision: float
    layout: float


@functools.lru_cache(maxsize=256)
def template(
    layout: Layout, around: Around, T: int, H: int, W: int, C: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A medium of T frames without its codes: ids, places, weights, and where the codes go (bool)."""
    kind, place = frame(layout, H, W, C)
    frames = np.tile(np.array(around.first)[kind], (T, 1))
    if around.last >= 0:
        frames[-1, -1] = around.last
    kept = frames >= 0
    sides = len(around.head), len(around.tail)
    ids = np.concatenate([around.head, frames[kept], around.tail]).astype(np.int32)
    places = np.pad(np.broadcast_to(place, (T, *place.shape))[kept], (sides, (0, 0))).astype(np.int32)
    visual = np.pad(np.broadcast_to(kind < C, frames.shape)[kept], sides)
    return ids, places, np.where(visual, around.vision, around.layout).astype(np.float32), visual


def joined(parts: list[Laid]) -> Tokens:
    """The document of some parts, in one array each."""
    ids = np.concatenate([part.ids for part in parts])
    place, modality = np.zeros((len(ids), 2), np.int32), np.empty(len(ids), np.int32)
    weight, at = np.empty(len(ids), np.float32), 0
    for part in parts:
        end = at + len(part.ids)
        if part.place is not None:
            place[at:end] = part.place
        modality[at:end], weight[at:end] = part.modality, part.weight
        at = end
    return Tokens(ids=ids, place=place, modality=modality, weight=weight)
