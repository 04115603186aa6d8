"""The demo model keeps its promises: small, loadable offline, every trained answer verbatim at temperature 0.

Set BATON_DEMO_MODEL to a directory to hold a retrained checkpoint to the same promises as the committed one.
"""

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from demo.corpus import CorpusError, Pair, load_pairs
from demo.evaluate import MIN_MARGIN, MODEL_DIR, Case, Checkpoint, evaluate, generate, measure

DIRECTORY = Path(os.environ.get("BATON_DEMO_MODEL", MODEL_DIR))
MAX_BYTES = 3_000_000


@pytest.fixture(scope="module")
def pairs() -> tuple[Pair, ...]:
    return load_pairs()


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(DIRECTORY)


def chat_cases(checkpoint: Checkpoint, pairs: tuple[Pair, ...]) -> list[Case]:
    return [checkpoint.chat_case(question, pair.answer) for pair in pairs for question in pair.questions]


def test_corpus_has_enough_different_questions(pairs: tuple[Pair, ...]) -> None:
    assert len(pairs) >= 60
    assert len({pair.answer for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert 20 <= len(pair.answer.split()) <= 60, pair
        assert pair.answer[-1] == ".", pair


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("# T\n\n### Why?\n\nSo.\n\n### Why?\n\nBecause.\n", "asked more than once: Why\\?"),
        ("# T\n\n### Why?\n- Why not?\n", "empty question or answer under 'Why\\?'"),
        ("# T\n\n### Why?\n- \n\nSo.\n", "empty question or answer under 'Why\\?'"),
    ],
)
def test_corpus_faults_are_named(tmp_path: Path, page: str, message: str) -> None:
    path = tmp_path / "corpus.md"
    path.write_text(page, encoding="utf-8")
    with pytest.raises(CorpusError, match=message):
        load_pairs(path)


def test_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in DIRECTORY.iterdir()) <= MAX_BYTES


def test_checkpoint_is_complete_qwen3_in_bf16(checkpoint: Checkpoint) -> None:
    config = checkpoint.model.config
    assert config.model_type == "qwen3" and config.tie_word_embeddings
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.vocab_size == len(checkpoint.tokenizer)
    stored = Checkpoint(DIRECTORY, torch.bfloat16).model.state_dict()
    for name, weight in checkpoint.model.state_dict().items():
        assert torch.equal(weight, stored[name].float()), f"{name} is not stored in bf16"


def test_end_tokens(checkpoint: Checkpoint) -> None:
    names = checkpoint.tokenizer.convert_ids_to_tokens(checkpoint.model.generation_config.eos_token_id)
    assert names == ["<|im_end|>", "<|endoftext|>"]
    assert checkpoint.tokenizer.eos_token == "<|im_end|>"


def test_tokenizer_gives_every_text_back(checkpoint: Checkpoint, pairs: tuple[Pair, ...]) -> None:
    plain = Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    texts = [text for pair in pairs for text in (*pair.questions, pair.answer)]
    for text in [*texts, " two  spaces\r\n\ttab", "e\u0301 é 好 🎵 👩‍🚀 \u0000"]:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert plain.decode(ids, skip_special_tokens=False) == text
        assert checkpoint.tokenizer.encode(text, add_special_tokens=False) == ids


def test_special_tokens_are_single_and_not_shown(checkpoint: Checkpoint) -> None:
    ids = checkpoint.tokenizer.encode("<|im_start|>Hello!<|im_end|><|endoftext|>", add_special_tokens=False)
    assert ids[0] != ids[-2] != ids[-1]
    assert checkpoint.tokenizer.decode(ids, skip_special_tokens=True) == "Hello!"


def test_chat_template(checkpoint: Checkpoint) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": " Why? "},
    ]
    rendered = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
    rendered += "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\n Why? <|im_end|>\n"
    template = checkpoint.tokenizer.apply_chat_template
    assert template(messages, tokenize=False) == rendered
    assert (
        template(messages, tokenize=False, add_generation_prompt=True) == rendered + "<|im_start|>assistant\n"
    )
    with pytest.raises(Exception, match="unknown role: tool"):
        template([{"role": "tool", "content": "1"}], tokenize=False)


def test_answers_are_generated_verbatim(checkpoint: Checkpoint, pairs: tuple[Pair, ...]) -> None:
    cases = chat_cases(checkpoint, pairs)
    wrong = {}
    for case, ids in zip(cases, generate(checkpoint, cases), strict=True):
        if ids != case.answer_ids:
            wrong[case.name] = checkpoint.tokenizer.decode(ids)
    assert not wrong


def test_answers_lead_by_a_margin_in_every_setting(checkpoint: Checkpoint) -> None:
    for setting, report in evaluate(checkpoint).items():
        assert not report.wrong, (setting, report.wrong)
        assert report.min_margin >= MIN_MARGIN, (setting, report)


def test_a_damaged_checkpoint_fails(pairs: tuple[Pair, ...]) -> None:
    """The check itself works: without one matrix of the last layer the answers are no longer verbatim."""
    damaged = Checkpoint(DIRECTORY)
    with torch.no_grad():
        damaged.model.model.layers[-1].mlp.down_proj.weight.zero_()
    assert not measure(damaged, chat_cases(damaged, pairs)).passed
