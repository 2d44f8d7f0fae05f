"""A table of a config.json, read key by key: what nobody asked for and what we cannot compute is told, all at once."""

import sys
from typing import Any, TypeVar

from mmgpt.core.config import ConfigError
from mmgpt.core.log import printable

T = TypeVar("T", int, float, bool, str)

_SILENT = """
architectures model_type transformers_version dtype torch_dtype use_cache initializer_range _name_or_path auto_map
return_dict output_attentions output_hidden_states pretraining_tp max_window_layers image_area _attn_implementation
attn_implementation _commit_hash id2label label2id problem_type task_specific_params max_length min_length do_sample
early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
length_penalty no_repeat_ngram_size num_return_sequences return_dict_in_generate chunk_size_feed_forward
is_encoder_decoder is_decoder torchscript pruned_heads tokenizer_class
"""
LARGEST = 2**31 - 1
SILENT = frozenset(_SILENT.split())
"""Keys that say nothing of what the model computes: how it was made, is sampled from, or is run elsewhere."""


class Table:
    """The keys of a table that were not read yet; `faults` gathers what is wrong, for `finish` to raise.

    `tensors` is how many the checkpoint has, where that is known.
    """

    def __init__(self, body: Any, where: str, faults: list[str] | None = None, tensors: int = 0):
        self.where = where
        self._tensors = tensors
        self.faults: list[str] = [] if faults is None else faults
        if not isinstance(body, dict):
            raise ConfigError(f"{where}: expected a table, found {str(body)[:60]!r}.")
        self._left: dict[str, Any] = {k: v for k, v in body.items() if k not in SILENT}

    def take(self, key: str, default: T) -> T:
        """The value of a key; of the default's type, which it has where the key is absent or null."""
        value = self._left.pop(key, None)
        if value is None:
            return default
        if isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
            if 0 <= value <= sys.float_info.max:  # Python's JSON has NaN and infinities too
                return type(default)(value)
            self.faults.append(f"{self.where}.{key} is {value!r}, expected a number from 0 up")
            return default
        if not isinstance(value, type(default)) or (isinstance(value, bool) and not isinstance(default, bool)):
            self.faults.append(f"{self.where}.{key} is {value!r}, expected {type(default).__name__}")
            return default
        return value  # pyright: ignore[reportReturnType]

    def size(self, key: str, default: int = 0) -> int:
        """A number from 1 up."""
        told = self.has(key)
        value = self.take(key, default)
        if not 1 <= value <= LARGEST:
            found = f"is {value}" if told else "is missing"
            self.faults.append(f"{self.where}.{key} {found}, expected a number from 1 to {LARGEST}")
        return min(max(value, 1), LARGEST)

    def depth(self, key: str, default: int = 0) -> int:
        """A number of layers: each has at least a tensor of its own, so nothing is built of more than there are."""
        value = self.size(key, default)
        if not self._tensors or value <= self._tensors:
            return value
        self.faults.append(f"{self.where}.{key} is {value}, but the checkpoint has {self._tensors} tensors alone")
        return 1

    def sizes(self, key: str, default: tuple[int, ...], least: int = 0) -> tuple[int, ...]:
        """A list of numbers from `least` up, and of at least so many."""
        value = self._left.pop(key, None)
        if value is None:
            return default
        fits = isinstance(value, list) and len(value) >= least
        if not fits or not all(type(v) is int and least <= v <= LARGEST for v in value):
            self.faults.append(f"{self.where}.{key} is {value!r}, expected a list of numbers from {least} up")
            return default
        return tuple(value)

    def has(self, key: str) -> bool:
        """Whether the key is there and was not read yet."""
        return self._left.get(key) is not None

    def any(self, key: str) -> Any:
        """The value of a key, whatever it is; None where it is absent."""
        return self._left.pop(key, None)

    def must(self, key: str, *allowed: Any) -> None:
        """Null, absent, or one of these: another value is something that we do not compute."""
        value = self._left.pop(key, None)
        if value is not None and value not in allowed:
            wanted = " or ".join(map(repr, allowed))
            self.faults.append(f"{self.where}.{key} is {value!r}; mmgpt computes {wanted} only")

    def table(self, key: str) -> "Table | None":
        """A table inside this one; its faults are told with this one's."""
        value = self._left.pop(key, None)
        return None if value is None else Table(value, f"{self.where}.{key}", self.faults, self._tensors)

    def rest(self) -> None:
        """Notes every key that is left and says something: it may change what the model computes."""
        for key, value in self._left.items():
            if value is not None and value is not False:
                self.faults.append(
                    f"{self.where}.{printable(key)} is {str(value)[:60]!r}; mmgpt does not know what it does"
                )

    def finish(self) -> None:
        """ConfigError that lists every fault."""
        if self.faults:
            raise ConfigError(
                "this checkpoint is of a model that mmgpt does not compute:\n  "
                + "\n  ".join(self.faults)
                + "\nUse another checkpoint; a key that changes nothing can be removed from its config.json."
            )
