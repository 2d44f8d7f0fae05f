"""Pictures of a given size from captions: the model is made to draw at once, whatever it would have written."""

from collections.abc import Sequence

import numpy as np

from mmgpt.core.document import Document, Image
from mmgpt.generate.decode import Prompt, Sampling
from mmgpt.generate.model import Continuation, Model


def drawn_from(
    model: Model, documents: Sequence[Document], size: tuple[int, int], sampling: Sampling
) -> list[Continuation]:
    """One picture of H x W places for each prompt."""
    grammar = model.grammar
    opening = grammar.open_image(*size)
    heads = [grammar.prompt(document) for document in documents]
    prompts = [
        Prompt(ids=np.concatenate([head, opening]), negative=np.concatenate([grammar.negative(document), opening]))
        for head, document in zip(heads, documents, strict=True)
    ]
    room = model.longest_medium - len(opening) + 1  # the grammar ends the picture within it, and the document
    made = model.generator.generate(prompts, sampling.replace(room=room, stop=-1))
    start = grammar.encode(Document(key="", segments=()), end=False).ids
    images = []
    for head, ids in zip(heads, made, strict=True):
        parsed = grammar.parse(np.concatenate([start, ids[len(head) :]]))
        images.append(next(segment for segment in parsed.segments if isinstance(segment, Image)))
    shown = model.shown([part for d, image in zip(documents, images, strict=True) for part in (d.segments, (image,))])
    return [
        Continuation(prompt=prompt, made=drawing, finished=True)
        for prompt, drawing in zip(shown[0::2], shown[1::2], strict=True)
    ]
