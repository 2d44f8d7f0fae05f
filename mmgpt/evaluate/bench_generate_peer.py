"""The peer of `mmgpt bench generate`: transformers on the same weights, with the published logits processors."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mmgpt.core.config import ConfigError
from mmgpt.interop.hf_config import Described, write
from mmgpt.interop.names import decoder_entries
from mmgpt.models.decoder import Decoder
from mmgpt.tokens.grammars.grammar import Grammar


class Peer:
    """`Emu3ForCausalLM` with the parameters of one of our decoders. ConfigError where torch is not installed."""

    def __init__(self, c: Decoder.Config, params: Any, grammar: Grammar, context: int):
        try:
            import torch
            import transformers
        except ImportError as e:
            raise ConfigError(f"the peer is missing ({e}); install torch and transformers, or use Python 3.11.") from e
        transformers.logging.set_verbosity_error()
        self.torch: Any = torch
        self.transformers: Any = transformers
        self.grammar, self.rows = grammar, grammar.vocabulary.used
        ids = dict(grammar.vocabulary.controls)
        body = write(Described(family="emu3", model=c, rows=self.rows, context=context, ids=ids), "float32")
        self.model: Any = transformers.Emu3ForCausalLM(transformers.Emu3TextConfig(**body)).eval()
        state = {}
        for entry in decoder_entries(c, self.rows):
            assert entry.path is not None
            leaf: Any = params
            for name in entry.path.split("/")[1:]:
                leaf = leaf[name]
            array = np.asarray(leaf if entry.layer is None else leaf[entry.layer])
            array = entry.to_hf(array[tuple(slice(n) for n in entry.shape)])
            state[entry.hf_name] = torch.tensor(np.ascontiguousarray(array))
        self.model.load_state_dict(state)

    def generate(
        self, prompts: np.ndarray, negative: np.ndarray | None, size: tuple[int, int], room: int, guidance: float
    ) -> np.ndarray:
        """Greedy ids `[B, P + room]` of a picture of `size` places that the prompts `[B, P]` open."""
        generation, torch = self.transformers.generation, self.torch
        control = self.grammar.vocabulary.control
        processors = [generation.PrefixConstrainedLogitsProcessor(self._allowed(size, prompts.shape[1]), num_beams=1)]
        if negative is not None:
            ids = torch.tensor(negative, dtype=torch.long)
            processors.insert(
                0,
                generation.UnbatchedClassifierFreeGuidanceLogitsProcessor(guidance, self.model, unconditional_ids=ids),
            )
        settings = generation.GenerationConfig(
            max_new_tokens=room, do_sample=False, eos_token_id=control("EOS"), pad_token_id=control("PAD")
        )
        ids = torch.tensor(prompts, dtype=torch.long)
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                settings,
                attention_mask=torch.ones_like(ids),
                logits_processor=self.transformers.LogitsProcessorList(processors),
            )
        return out.numpy()

    def _allowed(self, size: tuple[int, int], opened: int) -> Callable[[int, Any], Any]:
        """The rule of the published processor: EOL after each row, then EOF, EOI, EOS, and padding; else visual ids."""
        vocabulary, (H, W) = self.grammar.vocabulary, size
        ends = [vocabulary.control(name) for name in ("EOF", "EOI", "EOS", "PAD")]
        visual = self.torch.arange(vocabulary.visual_start, vocabulary.used)

        def allowed(row: int, ids: Any) -> Any:
            offset = ids.shape[0] - opened + 1  # 1 at the first visual id
            if offset <= (W + 1) * H:
                return (vocabulary.control("EOL"),) if offset % (W + 1) == 0 else visual
            return (ends[min(offset - (W + 1) * H, 4) - 1],)

        return allowed

    def use_best_threads(self, call: Callable[[], Any]) -> int:
        """Leaves torch with the number of threads, one or all processors, with which the call is faster."""
        seconds = {}
        for threads in {1, os.cpu_count() or 1}:
            self.torch.set_num_threads(threads)
            call()
            begin = time.perf_counter()
            call()
            seconds[threads] = time.perf_counter() - begin
        best = min(seconds, key=seconds.__getitem__)
        self.torch.set_num_threads(best)
        return best
