"""What is evaluated: a run folder or a Hugging Face folder, whose parts open when they are first asked for."""

import dataclasses
import functools
from pathlib import Path

from mmgpt.core.config import ConfigError
from mmgpt.data.loader import PackedRows
from mmgpt.generate.decode import Sampling
from mmgpt.generate.model import Model, media_sizes, token_run
from mmgpt.models import VisionConfig
from mmgpt.tokenize.vision import VisionTokenizer
from mmgpt.tokens.grammars.grammar import Grammar
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.run import Opened, Tokens, load_run, open_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to evaluate; `mmgpt eval --help` says each."""

    limit: int | None = None
    batch: int = 50
    seed: int = 0
    shots: int = 0
    shot_media: bool = True
    template: str | None = None
    stop: str = ""
    chat: bool = False
    area: int = 512 * 512
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def check(self) -> None:
        """ConfigError on numbers that make no evaluation."""
        for name, value, least in (
            ("limit", self.limit, 1),
            ("batch", self.batch, 1),
            ("shots", self.shots, 0),
            ("area", self.area, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{name} is {value}; give {least} or more.")


class Subject:
    """The model at `path`. Nothing of it is loaded before it is needed."""

    def __init__(self, path: Path, batch: int = 50):
        self.path, self.batch = path, batch
        self._config = load_run(path)

    def require_tokens(self, what: str) -> None:
        """ConfigError where this is known to be no model over tokens, before anything is loaded."""
        if self._config.tokens is None:
            raise ConfigError(f"{what} needs a model over tokens; {self.path} is a {_kind(self)}.")

    @functools.cached_property
    def opened(self) -> Opened:
        """The model with its parameters."""
        return open_run(self.path)

    @property
    def tokens(self) -> tuple[Tokens, PackedRows.Config]:
        """What only a run over tokens has."""
        return token_run(self.opened.built.run)

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
        return self.opened if self.is_tokenizer else open_run(Path(self.tokens[0].vision))

    @functools.cached_property
    def vision(self) -> VisionTokenizer:
        """The image tokenizer."""
        return VisionTokenizer(self.vision_opened)

    @functools.cached_property
    def reads_clips(self) -> bool:
        """Whether the model was trained on clips."""
        return any(size[0] for size in media_sizes(self.tokens[1]))

    @functools.cached_property
    def model(self) -> Model:
        """The model ready to generate; it may open images only."""
        sizes = [size for size in media_sizes(self.tokens[1]) if size[0] == 0]
        return Model(self.opened, self.text, self.vision, sizes, self.batch)


def _kind(subject: Subject) -> str:
    return "tokenizer of images" if subject.is_tokenizer else "run of another kind"
