"""What is evaluated: a run folder or a Hugging Face folder, whose parts open when they are first asked for."""

import dataclasses
import functools
from pathlib import Path

from mmgpt.core.config import ConfigError
from mmgpt.data.loader import PackedRows
from mmgpt.generate.model import Model
from mmgpt.generate.outline import AREA, Outline, token_run
from mmgpt.generate.sampler import Sampler, Sampling
from mmgpt.interop.hf_config import is_hugging_face
from mmgpt.interop.open import Source, open_folder
from mmgpt.models import VisionConfig
from mmgpt.tokenize.vision import VisionTokenizer
from mmgpt.tokens.grammars.grammar import Grammar
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.run import Opened, Run, Tokens, load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to evaluate: the flags of `mmgpt eval`."""

    limit: int | None = None
    """Prompts of each task at most."""
    batch: int = 50
    """Prompts that are worked on at once."""
    seed: int = 0
    """Of sampling, and of the choice of examples."""
    guidance: float = 1.0
    """Classifier-free guidance where the task allows it; 1 turns it off."""
    temperature: float = 0.0
    """Of visual codes; 0 takes the likeliest."""
    top_p: float = 1.0
    """Smallest set of visual codes with this probability that is sampled from."""
    shots: int = 0
    """Examples with their answers before each question, caption or text of lm-eval."""
    shot_media: bool = True
    """Show the examples' pictures; False leaves only their words."""
    frames: int = 8
    """Of a clip that are shown with a question, evenly over it."""
    template: str | None = None
    """How a question is asked, with {question} in it; for captions, words after the picture."""
    stop: str = ""
    """Answers are cut at this text."""
    chat: bool = False
    """Ask in the grammar's chat template, as a model tuned for instructions expects."""
    area: int = AREA
    """Pixels of a picture at most in `reconstruction`; of a drawn one, where the model was trained elsewhere."""

    @property
    def sampling(self) -> Sampling:
        """How the model samples; tasks set the room."""
        image = Sampler(temperature=self.temperature, top_p=self.top_p)
        return Sampling(guidance=self.guidance, image=image, seed=self.seed)

    def check(self) -> None:
        """ConfigError on numbers that make no evaluation."""
        for name, value, least in (
            ("limit", self.limit, 1),
            ("batch", self.batch, 1),
            ("shots", self.shots, 0),
            ("frames", self.frames, 1),
            ("area", self.area, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{name} is {value}; give {least} or more.")
        if not 0 <= self.seed < 2**31:
            raise ConfigError(f"--seed is {self.seed}; it goes from 0 to {2**31 - 1}.")
        _ = self.sampling  # tells a wrong temperature or top_p


class Subject:
    """The model at `path`, whose config is read. Nothing else of it is loaded before it is needed.

    `area` is that of pictures in pixels where the model tells no size: it was trained elsewhere.
    """

    def __init__(self, path: Path, batch: int = 50, area: int = AREA):
        self.path, self.batch, self.area = path, batch, area
        self._config = _config(path)

    def require_tokens(self, what: str) -> None:
        """ConfigError where this is known to be no model over tokens, before anything is loaded."""
        if self._config.tokens is None:
            raise ConfigError(f"{what} needs a model over tokens; {self.path} is a {_kind(self)}.")

    @functools.cached_property
    def opened(self) -> Opened:
        """The model with its parameters."""
        return open_folder(self.path)

    @property
    def tokens(self) -> tuple[Tokens, PackedRows.Config]:
        """What only a run over tokens has."""
        return token_run(self._config)

    @property
    def grammar(self) -> Grammar:
        """The model's grammar."""
        if self.opened.built.grammar is None:
            raise ConfigError(f"{self.path} does not model tokens.")
        return self.opened.built.grammar

    @functools.cached_property
    def text(self) -> TextTokenizer:
        """The text tokenizer."""
        return TextTokenizer.load(Path(self.tokens[0].text))

    @property
    def is_tokenizer(self) -> bool:
        """Whether this is an image tokenizer."""
        return isinstance(self._config.model, VisionConfig)

    @functools.cached_property
    def vision_opened(self) -> Opened:
        """The image tokenizer with its parameters: this one, or the one that the model reads and draws with."""
        return self.opened if self.is_tokenizer else open_folder(Path(self.tokens[0].vision), part="vision")

    @functools.cached_property
    def vision(self) -> VisionTokenizer:
        """The image tokenizer."""
        return VisionTokenizer(self.vision_opened)

    @functools.cached_property
    def outline(self) -> Outline:
        """What the model reads and draws, by its configs."""
        return Outline.read(self.path, area=self.area)

    @property
    def reads_clips(self) -> bool:
        """Whether the model was trained on clips, as far as is known."""
        return any(T for T, _, _ in self.outline.sizes)

    @property
    def image_size(self) -> tuple[int, int]:
        """The largest images that the model was trained on, in places; ConfigError without any."""
        images = [size for size in self.outline.sizes if size[0] == 0]
        if not images:
            raise ConfigError(f"{self.path} was trained without images.")
        return max(images, key=lambda size: size[1] * size[2])[1:]

    @functools.cached_property
    def model(self) -> Model:
        """The model ready to generate; of itself it opens images only."""
        sizes = [size for size in self.outline.sizes if size[0] == 0]
        return Model(self.opened, self.text, self.vision, sizes, self.batch)


def _config(path: Path) -> Run:
    """The config of a run folder, or the one that a Hugging Face folder stands for."""
    if not is_hugging_face(path):
        return load_run(path)
    source = Source(path)
    return source.run("text" if source.holds("text") else "vision")


def _kind(subject: Subject) -> str:
    return "tokenizer of images" if subject.is_tokenizer else "run of another kind"
