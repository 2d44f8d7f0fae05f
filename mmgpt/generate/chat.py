"""A conversation: turns from a file and from standard input, each answered with all that was said before it."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmgpt.core.document import Document, Segment
from mmgpt.core.log import console
from mmgpt.generate import outputs
from mmgpt.generate.decode import PromptError
from mmgpt.generate.model import Continuation, Model, Order
from mmgpt.generate.prompts import Piece, document_of, read_image, read_text, read_video
from mmgpt.generate.sampler import Sampling

STDIN = Path("-")


class Chat:
    """What was said so far. Turns have roles where the grammar has a template for them; else the layout is plain."""

    def __init__(self, model: Model, sampling: Sampling, order: Order):
        self.model, self.sampling, self.order = model, sampling, order
        self.segments: tuple[Segment, ...] = ()

    def say(self, pieces: Sequence[Piece]) -> None:
        """Adds what stands fixed: a turn of the user, or an answer that was given."""
        self.segments += document_of(self.model, *pieces).segments

    def answer(self) -> Continuation:
        """The model's answer, which is part of the conversation then; PromptError when the conversation is too long."""
        document = Document(key="chat", segments=self.segments)
        room = self.model.outline.room(document, self.order, self.sampling.room)
        (made,) = self.model.go_on([document], self.sampling.replace(room=room), order=self.order)
        said = (_spoken(segment) for segment in made.segments)
        self.segments += tuple(said)
        return made


def _spoken(segment: Segment) -> Segment:
    return dataclasses.replace(segment, role="assistant") if segment.role == "" else segment


def turns(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces by speaker: adjacent ones of one speaker are one turn; a user's turn ends with its text."""
    found: list[list[Piece]] = []
    for part in pieces:
        last = found[-1][-1] if found else None
        ended = last is not None and last.role == "user" and last.frames is None
        if last is None or last.role != part.role or ended:
            found.append([])
        found[-1].append(part)
    return found


def converse(chat: Chat, said: Sequence[Piece], out: Path, fps: float, *, live: bool) -> None:
    """Answers each turn of the user that no answer follows in `said`, then, if `live`, each line of standard input."""
    made: list[Continuation] = []

    def reply() -> None:
        made.append(chat.answer())
        files = outputs.save(out, made, "mmgpt chat", fps=fps)
        for i, part in enumerate(made[-1].made):
            outputs.tell(part, [f for f in files if f.name.startswith(f"{len(made) - 1:03d}-{i}.")])

    given = turns(said)
    for number, turn in enumerate(given):
        chat.say(turn)
        asked = turn[-1].role != "assistant"
        answered = number + 1 < len(given) and given[number + 1][-1].role == "assistant"
        if asked and not answered:
            reply()
    for turn in _lines() if live else ():
        chat.say(turn)
        reply()
    if not made:
        raise PromptError("--chat: nobody waits for an answer; end with a turn of the user.")
    console.print(f"wrote {out / 'index.html'}")


def _lines() -> Iterator[list[Piece]]:
    """Turns from standard input, one a line; `/image FILE` and `/video FILE` lines add to the turn that follows."""
    media: list[Piece] = []
    if sys.stdin.isatty():
        console.print("Say something; /image FILE or /video FILE shows a file; an empty line ends.")
    for line in sys.stdin:
        text = line.strip()
        if not text:
            return
        command, _, name = text.partition(" ")
        try:
            if command in ("/image", "/video"):
                read = read_image if command == "/image" else read_video
                media.append(read(Path(name.strip()), "user"))
                continue
            turn = [*media, read_text(text, "user", "standard input")]
        except PromptError as e:
            if not sys.stdin.isatty():
                raise
            console.print(f"{e}")
            continue
        media = []
        yield turn
