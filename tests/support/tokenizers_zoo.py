"""Small tokenizers of each decoder family, made in memory: every one can express any text."""

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "A scheduler writes the plan and the workers play it. Tokens stream one by one.",
    "Käse, naïve café, Straße – 10 € für zwölf Brötchen; Ελλάδα; Привет мир",
    "漢字とかな混じりの文。 🎼🎻 👩‍👩‍👧 emoji 🇩🇪 and \t tabs \n lines",
]
SPECIAL = "<|end|>"


def byte_level() -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have; trained little, so that characters are split."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_added(tokenizer)


def sentencepiece() -> Tokenizer:
    """BPE over ▁-words with byte fallback, as Llama 2, Mistral and Gemma have."""
    chars = sorted({c for text in CORPUS[:1] for c in text.replace(" ", "▁")})
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [
        "<unk>",
        *byte_tokens,
        *chars,
        "▁a",
        "▁w",
        "▁p",
        "th",
        "▁th",
        "▁the",
        "\N{REPLACEMENT CHARACTER}",
        "▁▁",
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "a"), ("▁", "w"), ("▁", "p"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(tokenizer)


def metaspace() -> Tokenizer:
    """Metaspace decoding without byte fallback, as T5 has."""
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def wordpiece() -> Tokenizer:
    """WordPiece, as BERT has: a token's text depends on whether it is the first."""
    words = ["[UNK]", *"abcdefghij.,'", *(f"##{c}" for c in "abcdefghij"), "the", "plan", "##s", "n't", "do"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _with_added(tokenizer)


def byte_level_in_sequence() -> Tokenizer:
    """A byte-level decoder that is not alone, so that it is not recognised as one."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return tokenizer


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("dash – é", normalized=False)])
    return tokenizer


ZOO: dict[str, Callable[[], Tokenizer]] = {
    each.__name__: each for each in (byte_level, sentencepiece, metaspace, wordpiece, byte_level_in_sequence)
}
