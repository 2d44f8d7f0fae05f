"""Questions and answers of VQA v2: two files, ten people's answers to each question, pictures of COCO.

    questions    {"data_subtype": "val2014", "questions": [{"image_id", "question", "question_id"}]}
    annotations  {"annotations": [{"question_id", "image_id", "answer_type", "answers": [{"answer"}]}]}

The picture of image 42 is COCO_val2014_000000000042.jpg. Questions without answers (the test splits) cannot be scored.
"""

from pathlib import Path

from mmgpt.evaluate.annotations import Annotation, AnnotationError, entries, field, json_of, media_of, words_of

FILES = "QUESTIONS.json,ANNOTATIONS.json"
ANSWERED = "vqa"


def read(questions: Path, annotations: Path) -> tuple[Annotation, ...]:
    """One annotation a question, in the order of the questions."""
    value = json_of(questions)
    subtype = field(value, "data_subtype", str, str(questions))
    answers: dict[int, tuple[int, str, tuple[str, ...]]] = {}
    for where, entry in entries(json_of(annotations), "annotations", annotations):
        said = [field(a, "answer", str, f"{where}, an answer") for a in field(entry, "answers", list, where)]
        if not said:
            raise AnnotationError(f"{where}: answers is empty.")
        number = field(entry, "question_id", int, where)
        answers[number] = field(entry, "image_id", int, where), field(entry, "answer_type", str, where), tuple(said)
    found = []
    for where, entry in entries(value, "questions", questions):
        number, image = field(entry, "question_id", int, where), field(entry, "image_id", int, where)
        if number not in answers or answers[number][0] != image:
            held = "no answers to it" if number not in answers else f"it is about image {answers[number][0]}"
            raise AnnotationError(
                f"{where}: question_id {number} about image {image}: in {annotations} there are {held}. Give the "
                "annotations of the same split."
            )
        _, kind, said = answers[number]
        found.append(
            Annotation(
                key=str(number),
                media=media_of(f"COCO_{subtype}_{image:012d}.jpg", where),
                question=words_of(entry, "question", where),
                answers=said,
                kind=kind,
                split=subtype,
            )
        )
    return tuple(found)
