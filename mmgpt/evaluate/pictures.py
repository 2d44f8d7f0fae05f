"""Pictures to evaluate on: read and decoded one after another, and encoded by an image tokenizer, one size together."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mmgpt.core.document import Image, Text, Video
from mmgpt.data.files import FileError, read_inside
from mmgpt.data.media import MediaError, decode_image, decode_video, fit, resize
from mmgpt.data.record import Dataset
from mmgpt.evaluate.annotations import Annotation
from mmgpt.evaluate.tasks import TaskError
from mmgpt.tokenize.vision import VisionTokenizer

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
CLIPS = (".mp4",)
MOST_SECONDS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture by key, with its caption if it has one; `frames()` gives uint8 `[T, H, W, 3]`, an image as T = 1."""

    key: str
    caption: str
    clip: bool
    frames: Callable[[], np.ndarray]


def of_dataset(dataset: Dataset) -> Iterator[Picture]:
    """All pictures and clips of a raw dataset; a document's first text is the caption of its first picture."""
    for number in range(len(dataset)):
        document = dataset[number]
        caption = next((s.text for s in document.segments if isinstance(s, Text) and s.text), "")
        for i, segment in enumerate(document.segments):
            if isinstance(segment, Image | Video):
                if segment.data is None:
                    raise TaskError(f"{dataset.directory} is tokenised; give the raw dataset that it was made from.")
                frames = _decoder(segment.data, isinstance(segment, Video), f"{document.key}, segment {i}")
                yield Picture(
                    key=f"{document.key}/{i}", caption=caption, clip=isinstance(segment, Video), frames=frames
                )
                caption = ""


def of_folder(folder: Path) -> Iterator[Picture]:
    """The picture files of a folder by name."""
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
        yield Picture(key=path.name, caption="", clip=False, frames=_decoder(path.read_bytes(), False, str(path)))


def of_path(path: Path) -> Iterator[Picture]:
    """A raw dataset, or a folder of picture files; TaskError where it is neither."""
    if (path / "manifest.json").is_file():
        return of_dataset(Dataset(path))
    if path.is_dir() and any(p.suffix.lower() in PICTURES for p in path.iterdir()):
        return of_folder(path)
    raise TaskError(f"{path}: neither a raw dataset nor a folder with {', '.join(PICTURES)} files.")


def of_annotations(annotations: Sequence[Annotation], folder: Path) -> Iterator[Picture]:
    """The pictures of annotations, with their first caption."""
    for annotation in annotations:
        yield Picture(
            key=annotation.key,
            caption=annotation.answers[0],
            clip=is_clip(annotation.media),
            frames=lambda annotation=annotation: read_media(folder, annotation.media),
        )


def is_clip(name: str) -> bool:
    """Whether a file is a clip by its name."""
    return Path(name).suffix.lower() in CLIPS


def require_media(annotations: Sequence[Annotation], folder: Path) -> None:
    """TaskError where files of annotations are missing in the folder."""
    if not folder.is_dir():
        raise TaskError(f"{folder}: no such folder of pictures or clips.")
    missing = [a.media for a in annotations if not (folder / a.media).is_file()]
    if missing:
        raise TaskError(
            f"{folder}: {len(missing)} of {len(annotations)} media files are missing, the first: {missing[0]}."
        )


def read_media(folder: Path, name: str, frames: int = 0) -> np.ndarray:
    """Frames uint8 `[T, H, W, 3]` of a file below a folder; TaskError where it cannot be decoded.

    Of a clip `frames` are taken, evenly over its first minutes; 0 takes what there is at one frame a second.
    """
    try:
        data = read_inside(folder, name)
        if not is_clip(name):
            return decode_image(data)[None]
        shown, _ = decode_video(data, fps=1.0, max_frames=MOST_SECONDS)
        if len(shown) < frames:
            shown, _ = decode_video(data)
    except (MediaError, FileError) as e:
        raise TaskError(f"{folder / name}: {e}.") from e
    if not frames:
        return shown
    return shown[np.linspace(0, len(shown) - 1, min(frames, len(shown))).round().astype(int)]


def _decoder(data: bytes, clip: bool, where: str) -> Callable[[], np.ndarray]:
    def decode() -> np.ndarray:
        try:
            return decode_video(data)[0] if clip else decode_image(data)[None]
        except MediaError as e:
            raise TaskError(f"{where}: {e}.") from e

    return decode


def fitted(frames: np.ndarray, area: int, multiple: int) -> np.ndarray:
    """Frames at the nearest size of at most `area` pixels with sides that are multiples of `multiple`."""
    height, width = fit(*frames.shape[1:3], area=area, multiple=multiple)
    return np.stack([resize(frame, height, width) for frame in frames])


def encoded(vision: VisionTokenizer, media: Sequence[np.ndarray], clips: Sequence[bool]) -> list[np.ndarray]:
    """Code grids `[T, h, w, C]` of media `[T, H, W, 3]` whose sides the tokenizer takes.

    What is no clip is a set of single pictures; those of one size are encoded together.
    """
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    found: dict[int, np.ndarray] = {}
    for number, (frames, clip) in enumerate(zip(media, clips, strict=True)):
        if clip:
            found[number] = vision.encode_clip(frames)
        else:
            by_size[frames.shape[1:]].append(number)
    for numbers in by_size.values():
        parts = [media[n] for n in numbers]
        codes = np.split(vision.encode(np.concatenate(parts)), np.cumsum([len(p) for p in parts])[:-1])
        found |= dict(zip(numbers, codes, strict=True))
    return [found[n] for n in range(len(media))]
