"""Small vocabularies of byte pairs, trained on sentences in several scripts."""

import functools

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmgpt.tokens.text.byte_pairs import SPLIT, BytePairs

SENTENCES = (
    "A red circle is above the blue square, isn't it? It's 128*96 pixels.",
    "Zwölf Größen übertreffen die schönsten Straßen in Köln nicht.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "色は匂へど 散りぬるを 我が世誰ぞ 常ならむ。漢字とカタカナ",
    "العربية لغة جميلة تكتب من اليمين إلى اليسار",
    "हिन्दी में एक छोटा वाक्य लिखा गया है।",
    "def f(x):\n    return {x: 'y'}\n\n\n\tif True:  pass\r\n",
    "🙂 👩‍👩‍👧 🇫🇷 e\u0301 가각 ½ ①②③ ٣٤٥",
)


@functools.cache
def trained() -> Tokenizer:
    """Qwen's normaliser and split, with merges of `SENTENCES`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


@functools.cache
def byte_pairs() -> BytePairs:
    """The same vocabulary as ranks of bytes."""
    names = trained().get_vocab()
    # A byte-level name writes each byte as one printable character; decoding single bytes gives the table.
    shown = [chr(b) if _printable(b) else None for b in range(256)]
    spare = iter(range(256, 512))
    table = {(s if s is not None else chr(next(spare))): b for b, s in enumerate(shown)}
    return BytePairs({bytes(table[c] for c in name): rank for name, rank in sorted(names.items(), key=lambda n: n[1])})


def _printable(byte: int) -> bool:
    """Bytes that GPT-2's table writes as themselves."""
    return 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
