"""Trains the demo model on `corpus.md` and writes a complete Hugging Face checkpoint.

One run does everything: it learns a byte-level BPE tokenizer, trains a tiny model of the Qwen3 architecture
to give every answer word for word, rounds the weights to bf16, writes the directory, loads it again as a user
would, and asks every question. The exit status is 0 only if every answer came back verbatim, and surely so.

Each epoch asks every question once, in a new order and in varied settings: several turns in one conversation,
with and without a system message, in lower case, or as plain text without a chat. The loss counts only
answers.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from demo.corpus import CORPUS_PATH, load_pairs
from demo.evaluate import MODEL_DIR, Checkpoint, evaluate, generate, print_reports
from demo.tokenizer import END_OF_TEXT, IM_END, IM_START, train_tokenizer, write_tokenizer

VOCAB_SIZE = 1280
MAX_POSITIONS = 2048
IGNORED = -100  # label of a token that the loss does not count

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the demo model of Baton.",
    "Answer questions about Baton and about serving language models.",
)

WHAT_IS = ("What's ", "Explain ", "Define ", "Tell me about ", "Please tell me what is ")

Example = tuple[list[int], list[int]]  # token ids, and the label of each: its own id or IGNORED


@dataclass(frozen=True, slots=True)
class Settings:
    """How long and how fast to train. `batch` counts conversations."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float


class Examples:
    """Turns the corpus into training examples, different in every epoch, the same for the same seed."""

    def __init__(self, asked: list[tuple[str, str]], tokenizer: Any, seed: int) -> None:
        self._asked = asked
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._im_start, self._im_end, self._end_of_text = tokenizer.convert_tokens_to_ids(
            [IM_START, IM_END, END_OF_TEXT]
        )
        self._assistant = self._encode("assistant\n")

    def epoch(self) -> list[Example]:
        """Every question once, grouped into conversations of one to five turns; some alone, as plain text."""
        order = self._random.sample(self._asked, len(self._asked))
        examples = []
        while order:
            count = self._random.choice((1, 1, 1, 1, 1, 2, 3, 5))
            turns = [(self._vary(question), answer) for question, answer in order[:count]]
            del order[:count]
            plain = len(turns) == 1 and self._random.random() < 0.6
            examples.append(self._text(*turns[0]) if plain else self._chat(turns))
        return examples

    def _vary(self, question: str) -> str:
        """Sometimes ask as people do: in other words, in lower case, or without the mark at the end."""
        if question.startswith("What is ") and self._random.random() < 0.3:
            question = self._random.choice(WHAT_IS) + question.removeprefix("What is ")
        if self._random.random() < 0.2:
            question = question.lower()
        if self._random.random() < 0.2:
            question = question.rstrip("?.!")
        return question

    def _text(self, question: str, answer: str) -> Example:
        prompt = self._encode(question)
        target = [*self._encode(f"\n{answer}"), self._end_of_text]
        return prompt + target, [IGNORED] * len(prompt) + target

    def _chat(self, turns: list[tuple[str, str]]) -> Example:
        messages = []
        if self._random.random() < 0.25:
            messages.append({"role": "system", "content": self._random.choice(SYSTEM_PROMPTS)})
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        ids = self._encode(self._tokenizer.apply_chat_template(messages, tokenize=False))
        return ids, self._assistant_labels(ids)

    def _assistant_labels(self, ids: list[int]) -> list[int]:
        """Label what the assistant says, from behind its header up to and including <|im_end|>."""
        labels = [IGNORED] * len(ids)
        header = [self._im_start, *self._assistant]
        for start in range(len(ids)):
            if ids[start : start + len(header)] == header:
                begin = start + len(header)
                end = ids.index(self._im_end, begin) + 1
                labels[begin:end] = ids[begin:end]
        return labels

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


def make_model(end_ids: list[int], pad_id: int) -> Qwen3ForCausalLM:
    """A Qwen3 with 1.1 million parameters, small in every dimension; head_dim is not hidden_size / heads."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        max_window_layers=4,
        tie_word_embeddings=True,
        eos_token_id=end_ids[0],
        pad_token_id=pad_id,
    )
    model: Any = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=end_ids, pad_token_id=pad_id)
    return model


def train(model: Qwen3ForCausalLM, examples: Examples, settings: Settings) -> float:
    """Train in place; return the mean loss of the last epoch, in nats per token."""
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    plain = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    progress = tqdm(range(settings.epochs), unit="epoch", desc="training")
    mean = 0.0
    for epoch in progress:
        losses = []
        batches = list(_batches(examples.epoch(), settings.batch))
        for index, (ids, labels) in enumerate(batches):
            done = (epoch + index / len(batches)) / settings.epochs
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(done)
            loss = _loss(model, ids, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        mean = sum(losses) / len(losses)
        progress.set_postfix(loss=f"{mean:.4f}")
    return mean


def _batches(examples: list[Example], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ids and labels, each [up to size, longest], padded on the right, where no causal model looks.

    Examples of similar length share a batch, so that little is padded; long and short batches alternate.
    """
    examples.sort(key=lambda example: len(example[0]))
    groups = [examples[start : start + size] for start in range(0, len(examples), size)]
    order = [group for pair in zip(groups, reversed(groups), strict=True) for group in pair][: len(groups)]
    for group in order:
        width = max(len(ids) for ids, _ in group)
        yield (
            torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in group]),
            torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in group]),
        )


def _schedule(done: float) -> float:
    """Factor on the learning rate after the fraction `done` of training: short warm-up, then down to 0."""
    return min(done / 0.03, 1.0) * (1.0 - done)


def _loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over labelled tokens. Logits are computed for these only."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    counted = targets != IGNORED
    return functional.cross_entropy(model.lm_head(hidden[counted]), targets[counted])


def verify(directory: Path, corpus: Path) -> bool:
    """Load `directory` as a user would, ask everything, print the outcome; true if all answers are right."""
    checkpoint = Checkpoint(directory)
    reports = evaluate(checkpoint, corpus)
    print_reports(reports)
    cases = [checkpoint.chat_case(*entry) for entry in _asked(corpus)]
    generated = list(generate(checkpoint, cases))
    wrong = [case.name for case, ids in zip(cases, generated, strict=True) if ids != case.answer_ids]
    print(f"generated: {len(cases) - len(wrong)} of {len(cases)} answers verbatim")
    for name in wrong:
        print(f"  not verbatim: {name}")
    return not wrong and all(report.passed for report in reports.values())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo/train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python demo/train.py --out /tmp/model\n"
        "  BATON_DEMO_MODEL=/tmp/model python -m pytest tests/demo",
    )
    add = parser.add_argument
    add("--out", type=Path, default=MODEL_DIR, help="directory to write (default: demo/model)")
    add("--corpus", type=Path, default=CORPUS_PATH, help="questions and answers (default: corpus.md)")
    add("--epochs", type=int, default=150, help="times each question is asked (default: %(default)s)")
    add("--batch", type=int, default=12, help="conversations per update (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.01, help="of matrices (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights and of the order of questions (default: %(default)s)")
    add("--threads", type=int, default=2, help="CPU threads; another number rounds differently (default: 2)")
    return parser.parse_args()


def _asked(corpus: Path) -> list[tuple[str, str]]:
    """Every question of the corpus with its answer."""
    return [(question, pair.answer) for pair in load_pairs(corpus) for question in pair.questions]


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    disable_progress_bar()
    settings = Settings(arguments.epochs, arguments.batch, arguments.lr, arguments.weight_decay)

    asked = _asked(arguments.corpus)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(train_tokenizer(_tokenizer_texts(asked), VOCAB_SIZE), arguments.out, MAX_POSITIONS)
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.out, local_files_only=True)
    im_end, end_of_text = tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT])

    started_s = time.monotonic()
    model = make_model([im_end, end_of_text], pad_id=end_of_text)
    loss = train(model, Examples(asked, tokenizer, arguments.seed), settings)
    elapsed_s = time.monotonic() - started_s
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    (arguments.out / "model.safetensors").chmod(0o644)

    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{model.num_parameters():,} parameters, {size:,} bytes in {arguments.out}")
    print(f"trained in {elapsed_s:.0f} s, last loss {loss:.5f}")
    return 0 if verify(arguments.out, arguments.corpus) else 1


def _tokenizer_texts(asked: list[tuple[str, str]]) -> list[str]:
    """Everything the model will read, each text once, in a fixed order."""
    spoken = [text for entry in asked for text in entry]
    return list(dict.fromkeys(["system\nuser\nassistant\n", *SYSTEM_PROMPTS, *spoken]))


if __name__ == "__main__":
    sys.exit(main())
