"""MSR-VTT QA (MSVD-QA has the same form): [{"id", "video_id", "question", "answer"}], one word an answer.

Clips are video7010.mp4 for video_id 7010. The kind of a question is its first word, as the papers give it.
"""

from pathlib import Path

from mmgpt.evaluate.annotations import Annotation, entries, field, json_of, media_of, words_of

FILES = "QUESTIONS.json"
ANSWERED = "words"


def read(questions: Path) -> tuple[Annotation, ...]:
    """One annotation a question."""
    found = []
    for where, entry in entries(json_of(questions), "", questions):
        question = words_of(entry, "question", where)
        first = question.split()[0].lower()
        found.append(
            Annotation(
                key=str(field(entry, "id", int, where)),
                media=media_of(f"video{field(entry, 'video_id', int, where)}.mp4", where),
                question=question,
                answers=(words_of(entry, "answer", where),),
                kind=first if first in ("what", "who", "how", "when", "where") else "other",
            )
        )
    return tuple(found)
