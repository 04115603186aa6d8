"""Token ids and text equal those of transformers' tokenizer classes, saved as checkpoints hold them."""

import asyncio
import json
import threading

import pytest

from scheduler_svc import checkpoint
from scheduler_svc.frontend import tokenizer
from tests.support.tokenizers_zoo import ZOO

CLASSES = {
    "Qwen2Tokenizer": ("byte_level", ["<|endoftext|>"]),
    "GPT2Tokenizer": ("byte_level", ["<|endoftext|>"]),
    "LlamaTokenizer": ("sentencepiece", ["<s>", "</s>"]),
    "GemmaTokenizer": ("sentencepiece", ["<pad>", "<eos>", "<bos>"]),
}
TEXTS = [
    "hello the plan 123",
    " lead  two\n\nNaïve é\t",
    "漢字 🎻 <s> </s> <|endoftext|>x",
    "a\N{COMBINING ACUTE ACCENT}",
    "<bos>hi<eos>",
    "",
    "long " * 900,  # takes the way beside the event loop
]


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tmp_path_factory):
    """(transformers' tokenizer, ours) of one checkpoint."""
    transformers = pytest.importorskip("transformers")
    name, special = CLASSES[request.param]
    model = json.loads(ZOO[name]().to_str())["model"]
    vocabulary = dict(model["vocab"])
    for token in special:
        vocabulary.setdefault(token, len(vocabulary))
    made = getattr(transformers, request.param)(vocab=vocabulary, merges=list(map(tuple, model["merges"])))
    path = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(path)
    (path / "config.json").write_text("{}")
    return transformers.AutoTokenizer.from_pretrained(path), tokenizer.load(checkpoint.load(path))


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text(pair, text, add_special_tokens):
    theirs, ours = pair
    ids = theirs(text, add_special_tokens=add_special_tokens)["input_ids"]
    assert asyncio.run(ours.encode(text, add_special_tokens=add_special_tokens)) == ids
    detokenizer = ours.detokenization.new()
    whole = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish() == whole


def test_long_text_does_not_stop_the_event_loop(pair):
    """While a megabyte is tokenized the loop goes round, on a thread that does not do it."""
    _, ours = pair

    async def run():
        task = asyncio.create_task(ours.encode("word naïve " * 100_000, add_special_tokens=False))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert len(await task) > 100_000
        return turns

    assert asyncio.run(run()) > 20
    assert any(thread.name.startswith("tokenizer") for thread in threading.enumerate())
