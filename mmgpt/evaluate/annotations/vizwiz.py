"""VizWiz VQA, questions of blind people: [{"image", "question", "answers": [{"answer"}], "answer_type"}].

"unanswerable" is an answer like others. A test file, which has no answers, cannot be scored.
"""

from pathlib import Path

from mmgpt.evaluate.annotations import Annotation, AnnotationError, entries, field, json_of, media_of, words_of

FILES = "ANNOTATIONS.json"
ANSWERED = "vqa"


def read(annotations: Path) -> tuple[Annotation, ...]:
    """One annotation a picture."""
    found = []
    for where, entry in entries(json_of(annotations), "", annotations):
        image = media_of(field(entry, "image", str, where), where)
        said = [field(a, "answer", str, f"{where}, an answer") for a in field(entry, "answers", list, where)]
        if not said:
            raise AnnotationError(f"{where}: answers is empty.")
        found.append(
            Annotation(
                key=Path(image).stem,
                media=image,
                question=words_of(entry, "question", where),
                answers=tuple(said),
                kind=field(entry, "answer_type", str, where),
                split=image.split("_")[1] if image.count("_") > 1 else "",
            )
        )
    return tuple(found)
