"""The words that published models were trained to read around a question and its answer."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mmgpt.core.document import Document, Image, Segment, Text, Video

SPEAKERS = ("user", "assistant")
"""Roles that make turns; a segment of any other role belongs to the turn that it stands in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """Words of a chat: the opening, what stands before and after a user's turn, and before a picture after text.

    `task` is put into the opening at "{task}" with the task's name; `asks` is put before the question by task.
    With `marked` the answer begins and ends with the marks "answer" and "/answer".
    """

    opening: str = "You are a helpful assistant."
    task: str = ""
    user: str = " USER: "
    assistant: str = " ASSISTANT:"
    before_media: str = ""
    asks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    marked: bool = False


Part = str | Segment


def turns(document: Document) -> list[tuple[str, list[Segment]]]:
    """Segments by speaker, adjacent ones of one speaker together; a document begins with the user."""
    found: list[tuple[str, list[Segment]]] = []
    speaker = "user"
    for segment in document.segments:
        speaker = segment.role if segment.role in SPEAKERS else speaker
        if not found or found[-1][0] != speaker:
            found.append((speaker, []))
        found[-1][1].append(segment)
    return found


def filled(template: Template, document: Document, task: str = "") -> list[Part]:
    """The template's words and the document's segments in order, open for the assistant to go on."""
    opening = template.opening.replace("{task}", template.task.replace("{task}", task) if task else "")
    parts: list[Part] = [opening]
    found = turns(document)
    for number, (speaker, segments) in enumerate(found):
        if speaker == "assistant":
            parts += segments
            if template.marked and number + 1 < len(found):
                parts.append(mark("/answer"))
            continue
        parts.append(template.user + template.asks.get(task, ""))
        for before, segment in zip([None, *segments], segments, strict=False):
            if isinstance(before, Text) and isinstance(segment, Image | Video):
                parts.append(template.before_media)
            parts.append(segment)
        # In LWM's words a picture follows a space, an answer in text does not.
        parts.append(template.assistant + (" " if task in template.asks else ""))
        if template.marked:
            parts.append(mark("answer"))
    return parts


def mark(role: str) -> Text:
    """A mark without text."""
    return Text(role=role, ids=np.zeros(0, np.int32))
