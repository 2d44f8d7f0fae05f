"""`mmgpt eval` on a Hugging Face folder: the same as on run folders, and likelihoods as transformers gives them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmgpt.core.document import Document, Image, Text
from mmgpt.core.errors import UserError
from mmgpt.data.media import encode_png
from mmgpt.data.record import Dataset
from mmgpt.evaluate.command import evaluate
from mmgpt.evaluate.subject import Options, Subject
from mmgpt.tokens.text.byte_pairs import SPECIALS, BytePairs
from tests import tiny
from tests.interop import reference
from tests.interop.reference import torch, transformers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:transformers")

TEXT = BytePairs({bytes([i]): i for i in range(256)})
START = 256 + len(SPECIALS)
CODES = 64


def special(number: int) -> int:
    return 256 + SPECIALS.index(f"<|extra_{number}|>")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emu3 as a whole, tiny, with its text tokenizer."""
    folder = tmp_path_factory.mktemp("emu3") / "hf"
    sizes: dict[str, Any] = {"vocab_size": START + CODES, "num_hidden_layers": 2, "pad_token_id": 256}
    sizes |= {"bos_token_id": special(203), "eos_token_id": special(204), "attention_dropout": 0.0}
    reference.save(reference.drawn(reference.emu3_whole(**sizes)), folder)
    (folder / "tiny.tiktoken").write_text(TEXT.text())
    body = json.loads((folder / "config.json").read_text())
    body["vocabulary_map"] = {"<image>": 4, "<|extra_200|>": special(200), "<|visual token 000000|>": START}
    (folder / "config.json").write_text(json.dumps(body))
    return folder


def datasets(folder: Path) -> tuple[str, str]:
    """Pictures as codes with captions, and as pixels with captions."""
    rng = np.random.default_rng(0)
    codes, pixels = [], []
    for i in range(6):
        words = f"number {i}"
        grid = rng.integers(0, CODES, (2, 3, 1)).astype(np.int32)
        caption = Text(ids=np.array(TEXT.encode(words), np.int32))
        codes.append(Document(key=str(i), segments=(caption, Image(codes=grid))))
        picture = encode_png(rng.integers(0, 255, (16, 24, 3)).astype(np.uint8))
        pixels.append(Document(key=str(i), segments=(Text(text=words), Image(data=picture))))
    return tiny.write(folder / "codes", codes), tiny.write(folder / "pixels", pixels)


def test_perplexity_is_that_of_transformers(published: Path, tmp_path: Path):
    codes, _ = datasets(tmp_path)
    evaluate(published, (f"perplexity={codes}",), json=tmp_path / "scores.json", options=Options(batch=2))
    scores = json.loads((tmp_path / "scores.json").read_text())["perplexity-codes"]
    model = transformers.Emu3ForConditionalGeneration.from_pretrained(published, dtype=torch.float32).eval()
    grammar = Subject(published).grammar
    losses: dict[str, list[float]] = {"text": [], "image": [], "codes": []}
    dataset = Dataset(Path(codes))
    for i in range(len(dataset)):
        tokens = grammar.encode(dataset[i])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(tokens.ids[None].astype(np.int64))).logits[0].double()
        after = torch.log_softmax(logits, dim=-1).numpy()
        for t in range(1, len(tokens.ids)):
            loss = -after[t - 1, tokens.ids[t]]
            losses["text" if tokens.modality[t] == 0 else "image"].append(loss)
            if tokens.ids[t] >= START:
                losses["codes"].append(loss)
    for name, values in losses.items():
        assert scores[f"tokens/{name}"] == len(values)
        assert scores[f"loss/{name}"] == pytest.approx(np.mean(values), rel=1e-4)


@pytest.mark.slow
def test_every_sort_of_task_runs_on_it(published: Path, tmp_path: Path):
    _, pixels = datasets(tmp_path)
    (tmp_path / "media").mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).astype(np.uint8)
    for n in (1, 2):
        (tmp_path / "media" / f"{n}.png").write_bytes(encode_png(picture))
    images = [{"id": n, "file_name": f"{n}.png"} for n in (1, 2)]
    captions = {"images": images, "annotations": [{"image_id": n, "caption": "a number"} for n in (1, 2)]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    specs = (
        f"fid={pixels},tokenizer",
        f"reconstruction={pixels}",
        f"captions={tmp_path / 'captions.json'},{tmp_path / 'media'}",
    )
    options = Options(batch=2, area=16 * 16, temperature=1.0, chat=True, template="What is it?")
    evaluate(published, specs, json=tmp_path / "scores.json", options=options)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["fid-pixels"]["count"] == scores["reconstruction-pixels"]["count"] == 6
    assert scores["captions-captions"]["count"] == 2 and np.isfinite(scores["fid-pixels"]["frechet"])


def test_a_folder_of_the_image_tokenizer_alone_is_measured(tmp_path: Path):
    folder = reference.save(reference.drawn(reference.emu3_vision()), tmp_path / "vq")
    _, pixels = datasets(tmp_path)
    evaluate(folder, (f"reconstruction={pixels},tokenizer",), json=tmp_path / "scores.json", options=Options(limit=2))
    assert json.loads((tmp_path / "scores.json").read_text())["reconstruction-pixels"]["count"] == 2
    with pytest.raises(UserError, match="needs a model over tokens"):
        evaluate(folder, (f"perplexity={pixels}",))
