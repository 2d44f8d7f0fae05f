"""`mmgpt bench generate`: speed beside transformers, bytes read on a TPU, passes saved by speculative decoding."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from mmgpt.core.config import ConfigError
from mmgpt.core.errors import UsageError
from mmgpt.core.log import check_writable, console, show, table, write_json
from mmgpt.data.loader import PackedRows
from mmgpt.dist.mesh import Mesh
from mmgpt.evaluate.bench_generate_peer import Peer
from mmgpt.generate.decode import Generator, Prompt
from mmgpt.generate.model import Model
from mmgpt.generate.sampler import Sampler, Sampling
from mmgpt.models.decoder import Decoder
from mmgpt.objectives.next_token import NextToken
from mmgpt.tokens import grammars
from mmgpt.tokens.grammars.grammar import Grammar
from mmgpt.tokens.text import TextTokenizer
from mmgpt.train.optimizer import Optimizer
from mmgpt.train.run import Built, Opened, Run
from mmgpt.train.state import Structure

WORDS = ["a red circle left of a blue square", "two green stars below a small cross", "0123456789*"]


def bench_generate(
    run: tyro.conf.Positional[Path | None] = None,
    target: str = "",
    side: int = 16,
    layers: int = 12,
    embed: int = 768,
    batches: tuple[int, ...] = (1, 8),
    turns: int = 3,
    windows: tuple[int, ...] = (4, 8, 16),
    prompts: int = 32,
    devices: int = 1,
    json: Path | None = None,
) -> None:
    """Without arguments, times drawing a picture beside transformers, with the same weights, taking turns.

    Args:
        run: run folder of a decoder: counts its passes with and without speculative Jacobi decoding instead.
        target: a TPU, as v5p: counts the bytes that Emu3 8B, compiled for it, reads for a token instead.
        side: of the picture, in places.
        layers: of the model that is timed, whose weights are random.
        embed: its width; by default it has about 100 million parameters.
        batches: pictures drawn at once.
        turns: of ours and the peer's; the figures are medians.
        windows: of Jacobi decoding.
        prompts: held-out texts that the run draws from.
        devices: chips of the target over which the model is split.
        json: write the figures.
    """
    if not (batches and windows):
        raise UsageError("--batches and --windows need a number at least, or leave them out.")
    if min(side, layers, turns, prompts, devices, *batches, *windows) < 1 or embed % 768:
        raise ConfigError("numbers must be at least 1, and --embed a multiple of 768.")
    check_writable(json)
    if run is not None:
        figures = passes(run, windows, prompts)
    elif target:
        from mmgpt.evaluate.bench_generate_tpu import bytes_per_token

        figures = bytes_per_token(target, devices, batches)
    else:
        Mesh.Config(cpu_devices=os.cpu_count() or 1).split_cpu()
        figures = speed(side, layers, embed, batches, turns)
    show(table("mmgpt bench generate", {name: {"value": value} for name, value in figures.items()}))
    if json is not None:
        write_json(json, figures)


def passes(folder: Path, windows: tuple[int, ...], count: int) -> dict[str, float]:
    """Tokens for each pass of a trained model that draws from held-out texts, greedy, sampled and guided."""
    from mmgpt.evaluate.samples import held_out_texts

    model = Model.open(folder, batch=16)
    documents = held_out_texts(model.generator.opened.built.run, count)
    if not documents:
        raise ConfigError(f"{folder}: no held-out text before a picture to draw from.")
    prompts = [Prompt(ids=model.grammar.prompt(d), negative=model.grammar.negative(d)) for d in documents]
    base = Sampling(room=model.longest_medium + 8)
    ways = {
        "greedy": base.replace(image=Sampler(temperature=0.0)),
        "sampled": base,
        "guided": base.replace(guidance=2.0),
    }
    figures: dict[str, float] = {}
    for way, sampling in ways.items():
        plain = sum(made.passes for made in model.generator.run(prompts, sampling))
        figures[f"{way}/passes"] = round(plain / len(prompts), 2)
        for window in windows:
            fewer = sum(made.passes for made in model.generator.run(prompts, sampling.replace(jacobi=window)))
            figures[f"{way}/window {window}/passes"] = round(fewer / len(prompts), 2)
            figures[f"{way}/window {window}/times fewer"] = round(plain / fewer, 2)
    return figures


def untrained(c: Decoder.Config, grammar: Grammar, context: int, mesh: jax.sharding.Mesh) -> Opened:
    """A decoder of random weights, as Emu3 draws them."""
    run = Run(
        model=c.fit(grammar.vocabulary),
        objective=NextToken.Config(vocab=grammar.vocabulary.used),
        data=PackedRows.Config(sources=(), row_length=context, batch_rows=1),
    )
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        structure = Structure(run.model.build, 0)

        def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            gain = path[-1].key == "scale"
            value = np.ones(leaf.shape, np.float32) if gain else rng.standard_normal(leaf.shape, np.float32) * 0.02
            return jax.device_put(value, jax.NamedSharding(mesh, leaf.sharding.spec))

        params = jax.tree.map_with_path(draw, structure.abstract()[0])
    optimizer = Optimizer.Config().build(1000)
    return Opened(Built(run, mesh, grammar, structure, run.objective.build(), optimizer), 0, params, {})


def speed(side: int, layers: int, embed: int, batches: tuple[int, ...], turns: int) -> dict[str, float]:
    """Tokens a second of both, greedy, plain and guided, and the ratio of the medians."""
    grammar = grammars.config("emu3").build(TextTokenizer.train(WORDS * 4, 300), (8192,))
    c = Decoder.Config(
        layers=layers,
        embed=embed,
        mlp=embed * 7 // 2,  # Emu3's: 3.5 times the width
        heads=embed // 64,
        kv_heads=embed // 192,
        head_dim=64,
        rope_theta=1e6,
        qk_norm="none",
    )
    room = side * (side + 1) + 3
    # Each processor computes a part of every layer: a matmul of few rows does not occupy two of them.
    devices = min(jax.device_count(), 4)
    mesh = Mesh.Config(fsdp=1, tensor=devices).build(jax.devices()[:devices])
    opened = untrained(c, grammar, 128 + room, mesh)
    count = sum(leaf.size for leaf in jax.tree.leaves(opened.params))
    figures: dict[str, float] = {"million parameters": round(count / 1e6, 1), "our devices": devices}
    peer = Peer(opened.built.run.model, opened.params, grammar, 128 + room)  # pyright: ignore[reportArgumentType]
    opening = grammar.open_image(side, side)
    texts = [np.array(grammar_text(grammar, f"{WORDS[i % 2]} {i}"), np.int32)[:16] for i in range(max(batches))]
    prompts = np.stack([np.concatenate([[grammar.vocabulary.control("BOS")], t, opening]) for t in texts])
    bare = np.tile(np.concatenate([[grammar.vocabulary.control("BOS")], opening]), (len(prompts), 1))
    for batch in batches:
        generator = Generator(opened, [(0, side, side)], batch)
        for guidance in (1.0, 3.0):
            name = f"batch {batch}{'' if guidance == 1.0 else ', guided'}"
            asked = [Prompt(ids=p, negative=n) for p, n in zip(prompts[:batch], bare, strict=False)]
            sampling = Sampling(room=room, guidance=guidance, image=Sampler(temperature=0.0))
            negative = None if guidance == 1.0 else bare[:batch]
            ours = _caller(generator.generate, asked, sampling)
            theirs = _caller(peer.generate, prompts[:batch], negative, (side, side), room, guidance)
            few = _caller(peer.generate, prompts[:batch], negative, (side, side), 8, guidance)
            figures[f"{name}/torch threads"] = peer.use_best_threads(few)
            figures |= {f"{name}/{key}": v for key, v in _taking_turns(ours, theirs, turns, batch * room).items()}
    return figures


def _caller(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def grammar_text(grammar: Any, text: str) -> list[int]:
    """Ids of a text with the grammar's tokenizer."""
    return grammar.text.encode(text)


def _taking_turns(ours: Callable[[], Any], theirs: Callable[[], Any], turns: int, tokens: int) -> dict[str, float]:
    made, expected = ours(), theirs()
    same = float(np.mean([np.mean(row[: len(m)] == m) for row, m in zip(expected, made, strict=True)]))
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(turns):
        console.print(f"turn {turn + 1} of {turns}")
        for who, call in (("ours", ours), ("theirs", theirs)):
            begin = time.perf_counter()
            call()
            seconds[who].append(time.perf_counter() - begin)
    medians = {who: float(np.median(values)) for who, values in seconds.items()}
    return {
        "tokens a second": round(tokens / medians["ours"], 1),
        "transformers'": round(tokens / medians["theirs"], 1),
        "times faster": round(medians["theirs"] / medians["ours"], 2),
        "ids equal": round(same, 4),
    }
