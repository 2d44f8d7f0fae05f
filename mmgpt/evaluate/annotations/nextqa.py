"""NExT-QA, csv with a heading: video, question, answer, qid, type; with a0 to a4 it is multiple choice.

`video` is the number of a VidOR clip: the file is VIDEO.mp4 below the folder, or the path that the published map
(`map_vid_vidorID.json`, put beside the csv) gives. In multiple choice `answer` is the number of the right option. The
open-ended figure of the paper, WUPS, needs WordNet; here an answer is right if the words are the same.
"""

import csv
import io
from pathlib import Path

from mmgpt.evaluate.annotations import Annotation, AnnotationError, field, json_of, media_of, table, text_of, words_of

FILES = "QUESTIONS.csv"
ANSWERED = "choice"
MAP = "map_vid_vidorID.json"
_COLUMNS = ("video", "question", "answer", "qid", "type")
_CHOICES = ("a0", "a1", "a2", "a3", "a4")


def read(questions: Path) -> tuple[Annotation, ...]:
    """One annotation a line; `choices` are empty where the file is open-ended."""
    rows = csv.DictReader(io.StringIO(text_of(questions), newline=""), strict=True)
    missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise AnnotationError(
            f"{questions}: the heading has no {', '.join(missing)}; found {rows.fieldnames or 'none'}."
        )
    options = [name for name in _CHOICES if name in (rows.fieldnames or ())]
    if options and len(options) < len(_CHOICES):
        raise AnnotationError(f"{questions}: the heading has {', '.join(options)} of a0 to a4; all or none are needed.")
    map_path = questions.with_name(MAP)
    paths = table(json_of(map_path), str(map_path)) if map_path.is_file() else {}
    found = []
    try:
        for row in rows:
            found.append(_annotation(row, options, paths, f"{questions}:{rows.line_num}"))
    except csv.Error as e:
        raise AnnotationError(f"{questions}:{rows.line_num}: not csv ({e}).") from e
    return tuple(found)


def _annotation(row: dict[str, str], options: list[str], paths: dict[str, str], where: str) -> Annotation:
    if None in row or None in row.values():
        raise AnnotationError(f"{where}: has another number of values than the heading.")
    video = words_of(row, "video", where)
    path = field(paths, video, str, f"{where}, {MAP}") if paths else video
    choices, answer = tuple(words_of(row, name, where) for name in options), words_of(row, "answer", where)
    if choices:
        if answer not in ("0", "1", "2", "3", "4"):
            raise AnnotationError(f"{where}: answer must be the number of an option, 0 to 4, found {answer!r}.")
        answer = choices[int(answer)]
    return Annotation(
        key=f"{video}-{words_of(row, 'qid', where)}",
        media=media_of(f"{path}.mp4", where),
        question=words_of(row, "question", where),
        answers=(answer,),
        choices=choices,
        kind=words_of(row, "type", where),
    )
