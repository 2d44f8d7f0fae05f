"""Captions of COCO (also NoCaps): {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}.

The splits of Karpathy, {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, are read as well, which Flickr30K
has too: pictures of the split "test", in `filepath` below the folder where they name one.
"""

from pathlib import Path
from typing import Any

from mmgpt.evaluate.annotations import Annotation, AnnotationError, entries, field, json_of, media_of, words_of

FILES = "ANNOTATIONS.json"
ANSWERED = "captions"


def read(annotations: Path) -> tuple[Annotation, ...]:
    """One annotation a picture, all its captions as answers."""
    value = json_of(annotations)
    images = list(entries(value, "images", annotations))
    if images and isinstance(images[0][1], dict) and "sentences" in images[0][1]:
        return tuple(_split(entry, where) for where, entry in images if field(entry, "split", str, where) == "test")
    files: dict[int, str] = {}
    for where, entry in images:
        files[field(entry, "id", int, where)] = media_of(field(entry, "file_name", str, where), where)
    captions: dict[int, list[str]] = {}
    for where, entry in entries(value, "annotations", annotations):
        image = field(entry, "image_id", int, where)
        if image not in files:
            raise AnnotationError(f"{where}: image_id {image} is none of the {len(files)} images of the file.")
        captions.setdefault(image, []).append(words_of(entry, "caption", where))
    return tuple(Annotation(key=str(i), media=files[i], answers=tuple(said)) for i, said in captions.items())


def _split(entry: Any, where: str) -> Annotation:
    name = field(entry, "filename", str, where)
    folder = entry.get("filepath", "")
    if not isinstance(folder, str):
        raise AnnotationError(f"{where}: filepath must be a string, found {folder!r}.")
    said = [words_of(s, "raw", f"{where}, a sentence") for s in field(entry, "sentences", list, where)]
    if not said:
        raise AnnotationError(f"{where}: has no sentence.")
    media = media_of(f"{folder}/{name}" if folder else name, where)
    return Annotation(key=name, media=media, answers=tuple(said), split="test")
