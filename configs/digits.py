"""Real data in a few minutes: the handwritten digits that scikit-learn ships.

    mmgpt run digits     2 cores, some minutes: `runs/digits/report.html`

The decoder draws digits from captions and captions unseen scans; `scores.json` has its accuracy, `raw/svm.json` that
of scikit-learn's support vector machine on the same scans (96.9 %).
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
from mmgpt.train.optimizer import Muon
from mmgpt.train.run import Run, Tokens


def digits_vision() -> Run:
    """Image tokenizer of the scans: 4 x 4 patches of their 16 x 16 pixels."""
    return Run(
        model=GainShapeVQ.Config(patch=4, side=4, stride=4, masks=64, colours=6, worth=0.2, rounds=1),
        objective=Autoencode.Config(),
        data=ImageRows.Config(
            sources=(Pictures.Config(path="runs/digits/data/train"),), height=16, width=16, batch_rows=64
        ),
        steps=1000,
        evaluate_every=1000,
        save_every=1000,
        log_every=50,
        held_out_batches=2,
        samples=8,
    )


def digits_model() -> Run:
    """Decoder of captions and scans."""
    source = Source.Config(path="runs/digits/tokens/train", swap=0.7, drop_text=0.05, first_loss=0.2)
    return Run(
        model=Decoder.Config(
            layers=4,
            embed=128,
            mlp=384,
            heads=4,
            kv_heads=2,
            head_dim=32,
            rope_grid=5,
            places=8,
            dropout=0.1,
            scan=False,
        ),
        objective=NextToken.Config(),
        tokens=Tokens(text="runs/digits/text.model", vision="runs/digits/vision"),
        data=PackedRows.Config(sources=(source,), row_length=104, batch_rows=20),
        optimizer=Muon(learning_rate=3e-3, warmup=100, final=0.02),
        mesh=Mesh.Config(cpu_devices=2),
        steps=2400,
        evaluate_every=800,
        save_every=800,
        log_every=20,
        held_out_batches=2,
    )


def digits() -> Recipe:
    """The scans as files -> tokenizers -> decoder -> captions of unseen scans beside scikit-learn's own SVM."""
    folder = "{dir}"
    media = ("--text", f"{folder}/text.model", "--vision", f"{folder}/vision", "--area", "256")
    commands: list[tuple[tuple[str, ...], str]] = [
        (("data", "digits", "--copies", "40", "--out", f"{folder}/raw"), ""),
        (
            ("data", "import", "folder", f"{folder}/raw/train", "--out", f"{folder}/data/train"),
            "data/train/manifest.json",
        ),
        (
            ("data", "import", "jsonl", f"{folder}/raw/eval", "--out", f"{folder}/data/label"),
            "data/label/manifest.json",
        ),
        (("tokenize", "text", f"{folder}/data/train", "--size", "320", "--out", f"{folder}/text.model"), "text.model"),
        (("train", "digits_vision", "--run-dir", f"{folder}/vision"), ""),
        (("tokenize", "data", f"{folder}/data/train", f"{folder}/data/label", *media, "--out", f"{folder}/tokens"), ""),
        (("train", "digits_model", "--run-dir", f"{folder}/model"), ""),
        (("eval", f"{folder}/model", "--tasks", f"{folder}/tokens/label", "--json", f"{folder}/scores.json"), ""),
        (("report", folder), ""),
    ]
    return Recipe(directory="runs/digits", steps=tuple(Step(command=c, makes=m) for c, m in commands))
