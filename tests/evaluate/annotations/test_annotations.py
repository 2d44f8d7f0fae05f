"""Annotation files in the forms in which they are published, and what is told of files that are not in them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmgpt.evaluate import annotations
from mmgpt.evaluate.annotations import Annotation, AnnotationError, read

COCO = {
    "info": {"year": 2014},
    "images": [
        {"license": 3, "file_name": "COCO_val2014_000000000042.jpg", "id": 42, "height": 478, "width": 640},
        {"license": 1, "file_name": "COCO_val2014_000000000073.jpg", "id": 73, "height": 640, "width": 565},
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 42, "id": 641613, "caption": "This wire metal rack holds several pairs of shoes \n"},
        {"image_id": 73, "id": 27, "caption": "A motorcycle with its brake extended."},
        {"image_id": 42, "id": 646878, "caption": "Multiple rows of metal shelves"},
    ],
}
KARPATHY = {
    "images": [
        {
            "filepath": "val2014",
            "sentids": [1],
            "filename": "COCO_val2014_000000391895.jpg",
            "imgid": 0,
            "split": "test",
            "sentences": [{"tokens": ["a", "man"], "raw": "A man on a bike.", "imgid": 0, "sentid": 1}],
            "cocoid": 391895,
        },
        {"filepath": "train2014", "filename": "b.jpg", "split": "train", "sentences": [{"raw": "No."}]},
    ],
    "dataset": "coco",
}
QUESTIONS = {
    "info": {},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "license": {},
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000},
        {"image_id": 262148, "question": "Is it day?", "question_id": 262148001},
    ],
}
ANSWERS = {
    "info": {},
    "data_subtype": "val2014",
    "annotations": [
        {
            "question_type": "is it",
            "multiple_choice_answer": "yes",
            "answers": [{"answer": "yes", "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)],
            "image_id": 262148,
            "answer_type": "yes/no",
            "question_id": 262148001,
        },
        {
            "question_type": "none of the above",
            "multiple_choice_answer": "down",
            "answers": [{"answer": a, "answer_confidence": "maybe", "answer_id": 1} for a in ("down", "at table")],
            "image_id": 262148,
            "answer_type": "other",
            "question_id": 262148000,
        },
    ],
}
VIZWIZ = [
    {
        "answerable": 0,
        "image": "VizWiz_val_00028000.jpg",
        "question": "Ok. There is another picture I hope it is a better one.",
        "answer_type": "unanswerable",
        "answers": [
            {"answer": "unanswerable", "answer_confidence": "yes"},
            {"answer": "no", "answer_confidence": "no"},
        ],
    }
]
MSRVTT = [{"answer": "couch", "category_id": 14, "id": 158581, "question": "what is it on?", "video_id": 6513}]
NEXT_OPEN = (
    "video,frame_count,width,height,question,answer,qid,type,additional_ref_answer\n"
    '4010069381,369,640,480,"how do the two man play, and sing",hit the instrument,6,CH,\n'
)
NEXT_CHOICE = (
    "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
    "4010069381,369,640,480,how do they play,0,6,CH,roll the handle,tap their feet,strum,hit,pat\n"
    "4010069381,369,640,480,why do they sit,3,7,CW,to rest,to eat,to look,to play,to fall\n"
)

FILES: dict[str, tuple[Any, ...]] = {
    "captions": (COCO,),
    "vqa": (QUESTIONS, ANSWERS),
    "okvqa": (QUESTIONS, ANSWERS),
    "vizwiz": (VIZWIZ,),
    "msrvtt_qa": (MSRVTT,),
    "nextqa": (NEXT_CHOICE,),
}


def written(folder: Path, *values: Any) -> list[Path]:
    paths = []
    for number, value in enumerate(values):
        paths.append(folder / f"{number}.{'csv' if isinstance(value, str) else 'json'}")
        paths[-1].write_text(value if isinstance(value, str) else json.dumps(value))
    return paths


def test_every_format_has_files_here():
    assert list(FILES) != [] and sorted(FILES) == annotations.names()
    assert all(annotations.described(name) for name in FILES)


def test_captions_of_a_picture_come_together(tmp_path: Path):
    assert read("captions", written(tmp_path, COCO)) == (
        Annotation(
            key="42",
            media="COCO_val2014_000000000042.jpg",
            answers=("This wire metal rack holds several pairs of shoes", "Multiple rows of metal shelves"),
        ),
        Annotation(key="73", media="COCO_val2014_000000000073.jpg", answers=("A motorcycle with its brake extended.",)),
    )


def test_karpathys_splits_give_their_test_part(tmp_path: Path):
    (found,) = read("captions", written(tmp_path, KARPATHY))
    assert found.media == "val2014/COCO_val2014_000000391895.jpg"
    assert found.answers == ("A man on a bike.",) and found.split == "test"


def test_vqa_joins_questions_and_answers(tmp_path: Path):
    first, second = read("vqa", written(tmp_path, QUESTIONS, ANSWERS))
    assert first == Annotation(
        key="262148000",
        media="COCO_val2014_000000262148.jpg",
        question="Where is he looking?",
        answers=("down", "at table"),
        kind="other",
        split="val2014",
    )
    assert second.answers == ("yes",) * 10 and second.kind == "yes/no"
    assert read("okvqa", written(tmp_path, QUESTIONS, ANSWERS)) == (first, second)


def test_the_other_formats_give_the_same_form(tmp_path: Path):
    (found,) = read("vizwiz", written(tmp_path, VIZWIZ))
    assert (found.media, found.kind, found.split) == ("VizWiz_val_00028000.jpg", "unanswerable", "val")
    assert found.answers == ("unanswerable", "no")
    (found,) = read("msrvtt_qa", written(tmp_path, MSRVTT))
    assert found == Annotation(
        key="158581", media="video6513.mp4", question="what is it on?", answers=("couch",), kind="what"
    )
    (found,) = read("nextqa", written(tmp_path, NEXT_OPEN))
    assert (found.key, found.media) == ("4010069381-6", "4010069381.mp4")
    assert found.question == "how do the two man play, and sing" and found.answers == ("hit the instrument",)
    assert found.choices == ()


def test_multiple_choice_names_the_right_option_and_the_map_the_file(tmp_path: Path):
    paths = written(tmp_path, NEXT_CHOICE)
    first, second = read("nextqa", paths)
    assert first.choices == ("roll the handle", "tap their feet", "strum", "hit", "pat")
    assert first.answers == ("roll the handle",) and second.answers == ("to play",) and second.kind == "CW"
    (tmp_path / "map_vid_vidorID.json").write_text(json.dumps({"4010069381": "1164/4010069381"}))
    assert read("nextqa", paths)[0].media == "1164/4010069381.mp4"


def without(value: Any, *path: Any) -> Any:
    """A copy of a JSON value that lacks one part."""
    copied = json.loads(json.dumps(value))
    part = copied
    for step in path[:-1]:
        part = part[step]
    del part[path[-1]]
    return copied


def put(value: Any, new: Any, *path: Any) -> Any:
    """A copy of a JSON value with one part replaced."""
    copied = json.loads(json.dumps(value))
    part = copied
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = new
    return copied


BROKEN: list[tuple[str, tuple[Any, ...], str]] = [
    ("captions", (without(COCO, "images"),), r"has no 'images'; it holds 'info', 'licenses', 'annotations'"),
    ("captions", (put(COCO, 7, "annotations", 1, "image_id"),), r"annotations\[1\]: image_id 7 is none of the 2"),
    ("captions", (put(COCO, " ", "annotations", 2, "caption"),), r"annotations\[2\]: caption is empty"),
    ("captions", (put(COCO, "../x.jpg", "images", 0, "file_name"),), r"images\[0\]: unsafe path"),
    ("captions", (put(COCO, "42", "images", 0, "id"),), r"id must be a whole number, found str '42'"),
    ("captions", ([],), "expected an object, found list"),
    ("captions", (put(KARPATHY, [], "images", 0, "sentences"),), r"images\[0\]: has no sentence"),
    ("captions", (put(COCO, [], "annotations"),), "holds no annotation"),
    ("vqa", (QUESTIONS, without(ANSWERS, "annotations", 0)), r"questions\[1\]: question_id 262148001 .* no answers"),
    ("vqa", (QUESTIONS, put(ANSWERS, 1, "annotations", 1, "image_id")), r"questions\[0\].*it is about image 1"),
    ("vqa", (QUESTIONS, put(ANSWERS, [], "annotations", 0, "answers")), r"annotations\[0\]: answers is empty"),
    ("vqa", (without(QUESTIONS, "data_subtype"), ANSWERS), "has no 'data_subtype'"),
    ("vqa", (put(QUESTIONS, QUESTIONS["questions"] * 2, "questions"), ANSWERS), "the key '262148000' stands twice"),
    ("vqa", (QUESTIONS,), "vqa takes QUESTIONS.json,ANNOTATIONS.json; 1 files given"),
    ("vizwiz", (without(VIZWIZ, 0, "answers"),), r"entry\[0\]: has no 'answers'"),
    ("vizwiz", (COCO,), "expected a list, found dict"),
    ("msrvtt_qa", (put(MSRVTT, True, 0, "video_id"),), r"video_id must be a whole number, found bool"),
    ("nextqa", (NEXT_CHOICE.replace(",a4", ""),), "heading has a0, a1, a2, a3 of a0 to a4"),
    ("nextqa", (NEXT_CHOICE.replace("qid", "q"),), "the heading has no qid"),
    ("nextqa", (NEXT_CHOICE.replace("how do they play,0", "how do they play,5"),), r":2: answer must be .* found '5'"),
    ("nextqa", (NEXT_CHOICE.replace(",hit,pat", ",hit"),), ":2: has another number of values"),
    ("nextqa", (NEXT_CHOICE.replace("strum,hit,pat", 'strum,hit,"pat'),), "nextqa|csv|values"),
    ("nextqa", ("",), "the heading has no video"),
]


@pytest.mark.parametrize(("name", "values", "told"), BROKEN, ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_wrong_is_told(name: str, values: tuple[Any, ...], told: str, tmp_path: Path):
    with pytest.raises(AnnotationError, match=told):
        read(name, written(tmp_path, *values))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_files_of_another_kind_are_errors(name: str, data: bytes, tmp_path: Path):
    paths = []
    for number, _ in enumerate(FILES[name]):
        paths.append(tmp_path / f"{number}")
        paths[-1].write_bytes(data)
    with pytest.raises(AnnotationError, match=str(tmp_path)):
        read(name, paths)
