"""The shapes world: the main job from raw files to a model that reads and draws, on a laptop's CPU.

    mmgpt run quickstart     10 minutes on 2 cores: corpus, tokenizers, a decoder, scores and a report
    mmgpt run shapes         53 minutes: a larger decoder and more of everything

One decoder learns all tasks at once: text -> image, image -> caption, questions, clips, stories, edits.
"""

from mmgpt.data.images import ImageRows, Pictures
from mmgpt.data.loader import PackedRows
from mmgpt.data.mixture import Source
from mmgpt.dist.mesh import Mesh
from mmgpt.models.decoder import Decoder
from mmgpt.models.gain_shape_vq import GainShapeVQ
from mmgpt.objectives.autoencode import Autoencode
from mmgpt.objectives.next_token import NextToken
from mmgpt.recipe import Recipe, Step
from mmgpt.tokens.grammars.emu3 import Emu3
from mmgpt.train.optimizer import Muon
from mmgpt.train.run import Run, Tokens

SOURCES = {"pairs": "webdataset", "stories": "jsonl", "clips": "mp4", "questions": "jsonl", "edits": "jsonl"}
"""Sources of the corpus and the format each is imported from."""

CPU = Mesh.Config(cpu_devices=2)
"""Two devices of a CPU: matmuls this small keep one busy core each."""

TASKS = ("draw", "unseen", "attributes", "caption", "answer", "next_frame", "story", "edit")
"""Evaluation prompts of the corpus."""


def _vision(folder: str, steps: int) -> Run:
    return Run(
        model=GainShapeVQ.Config(masks=24, idle=0.6),
        objective=Autoencode.Config(),
        data=ImageRows.Config(
            sources=tuple(Pictures.Config(path=f"{folder}/data/{name}") for name in ("pairs", "clips")),
            height=48,
            width=48,
            batch_rows=32,
        ),
        mesh=CPU,
        steps=steps,
        evaluate_every=steps,
        save_every=steps,
        log_every=50,
        held_out_batches=2,
        samples=8,
    )


def _decoder(folder: str, steps: int, model: Decoder.Config, learning_rate: float) -> Run:
    def source(
        name: str, weight: float, swap: float = 0.0, drop_text: float = 0.0, first_loss: float = 1.0
    ) -> Source.Config:
        path = f"{folder}/tokens/{name}"
        return Source.Config(path=path, weight=weight, swap=swap, drop_text=drop_text, first_loss=first_loss)

    return Run(
        model=model,
        objective=NextToken.Config(z_loss=1e-5),
        tokens=Tokens(grammar=Emu3.Config(), text=f"{folder}/text.model", vision=f"{folder}/vision"),
        data=PackedRows.Config(
            sources=(
                source("pairs", 0.55, swap=0.7, drop_text=0.05, first_loss=0.1),
                source("questions", 0.13),
                source("clips", 0.09, swap=0.7),
                source("edits", 0.15),
                source("stories", 0.08, first_loss=0.1),
            ),
            row_length=136,
            batch_rows=8,
        ),
        optimizer=Muon(learning_rate=learning_rate, warmup=100, final=0.05, iterations=4),
        mesh=CPU,
        steps=steps,
        evaluate_every=max(1, steps // 4),
        save_every=max(1, steps // 4),
        log_every=20,
        held_out_batches=2,
    )


def quickstart_vision() -> Run:
    """The quickstart's image tokenizer: 24 masks in 12 colours, half a minute."""
    return _vision("runs/quickstart", steps=300)


def quickstart_model() -> Run:
    """The quickstart's decoder: 0.8 M parameters, 8 minutes on 2 cores."""
    model = Decoder.Config(
        layers=4, embed=128, mlp=256, heads=4, kv_heads=2, head_dim=32, rope_grid=4, places=4, scan=False
    )
    return _decoder("runs/quickstart", 5000, model, learning_rate=4e-3)


def shapes_vision() -> Run:
    """The larger run's image tokenizer: more steps."""
    return _vision("runs/shapes", steps=600)


def shapes_model() -> Run:
    """The larger run's decoder."""
    model = Decoder.Config(
        layers=4, embed=192, mlp=384, heads=4, kv_heads=2, head_dim=48, rope_grid=6, places=4, scan=False
    )
    return _decoder("runs/shapes", 16000, model, learning_rate=3e-3)


def _road(name: str, corpus: tuple[str, ...], text_size: int) -> Recipe:
    folder = f"runs/{name}"
    steps = [Step(command=("data", "shapes", "--out", "{dir}/raw", *corpus))]
    raws = {source: (format, f"{{dir}}/raw/{source}") for source, format in SOURCES.items()}
    raws |= {f"eval/{task}": ("jsonl", f"{{dir}}/raw/eval/{task}") for task in TASKS}
    for source, (format, path) in raws.items():
        out = f"data/{source}"
        command = ("data", "import", format, path, "--out", f"{{dir}}/{out}")
        steps.append(Step(command=command, makes=f"{out}/manifest.json"))
    data = [f"{{dir}}/data/{source}" for source in SOURCES]
    steps.append(
        Step(
            command=(
                "tokenize",
                "text",
                *data,
                "--size",
                str(text_size),
                "--superwords",
                "True",
                "--out",
                "{dir}/text.model",
            ),
            makes="text.model",
        )
    )
    steps.append(Step(command=("train", f"{name}_vision", "--run-dir", "{dir}/vision")))
    media = ("--text", "{dir}/text.model", "--vision", "{dir}/vision", "--area", "2304")
    sources = [f"{{dir}}/data/{source}" for source in raws]
    steps.append(Step(command=("tokenize", "data", *sources, *media, "--out", "{dir}/tokens")))
    steps.append(Step(command=("train", f"{name}_model", "--run-dir", "{dir}/model")))
    prompts = [f"{{dir}}/tokens/{task}" for task in TASKS]
    steps.append(Step(command=("eval", "{dir}/model", "--tasks", *prompts, "--json", "{dir}/scores.json")))
    steps.append(Step(command=("report", "{dir}")))
    return Recipe(directory=folder, steps=tuple(steps))


def quickstart() -> Recipe:
    """From nothing to `runs/quickstart/report.html` in 10 minutes on 2 cores."""
    sizes = {"pairs": 20000, "stories": 1800, "clips": 2400, "questions": 8000, "edits": 5000, "eval-each": 100}
    return _road("quickstart", tuple(f"--{k}={v}" for k, v in sizes.items()), text_size=512)


def shapes() -> Recipe:
    """The same road, longer and larger: `runs/shapes/report.html`."""
    sizes = {"pairs": 60000, "stories": 6000, "clips": 8000, "questions": 16000, "edits": 20000, "eval-each": 300}
    return _road("shapes", tuple(f"--{k}={v}" for k, v in sizes.items()), text_size=512)
