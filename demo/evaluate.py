"""Checks that a demo checkpoint gives every trained answer word for word at temperature 0, and how surely.

The check runs as the service does: weights as stored (bf16), arithmetic in float32, the most likely token
each time. Knows nothing about how the checkpoint was trained. As a command, `python demo/evaluate.py`, it
prints what it found.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from demo.corpus import CORPUS_PATH, load_pairs

MODEL_DIR = Path(__file__).with_name("model")
BATCH = 64  # prompts per forward pass
MIN_MARGIN = 1.0  # logits; rounding differences between devices stay far below


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt and the ids that must follow it, the end token included."""

    name: str
    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True, slots=True)
class Report:
    """Outcome over all cases. `min_margin` is the smallest lead of an answer token over others, in logits."""

    cases: int
    wrong: tuple[str, ...]
    min_margin: float
    min_margin_at: str

    @property
    def passed(self) -> bool:
        return not self.wrong and self.min_margin >= MIN_MARGIN


class Checkpoint:
    """A demo checkpoint as transformers loads it, without network."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=dtype)

    def chat_case(self, question: str, answer: str, *before: tuple[str, str]) -> Case:
        """`question` as a chat message after (role, content) messages; the answer ends with <|im_end|>."""
        messages = [{"role": role, "content": content} for role, content in (*before, ("user", question))]
        prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return Case(question, self._encode(prompt), self._encode(answer + "<|im_end|>"))

    def text_case(self, question: str, answer: str) -> Case:
        """`question` as plain text; the answer follows on a new line and ends with <|endoftext|>."""
        return Case(question, self._encode(question), self._encode(f"\n{answer}<|endoftext|>"))

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def measure(checkpoint: Checkpoint, cases: list[Case]) -> Report:
    """Compare each answer token with the model's choice after the tokens before it.

    If all of them are equal, greedy decoding gives exactly these answers.
    """
    wrong: list[str] = []
    margins: list[tuple[float, str]] = []
    for batch in _batches(cases):
        for case, logits in zip(batch, _answer_logits(checkpoint.model, batch), strict=True):
            margin = _margin(logits, torch.tensor(case.answer_ids))
            margins.append((margin, case.name))
            if not margin > 0:
                wrong.append(case.name)
    min_margin, min_margin_at = min(margins)
    return Report(len(cases), tuple(wrong), min_margin, min_margin_at)


@torch.inference_mode()
def generate(checkpoint: Checkpoint, cases: list[Case]) -> Iterator[list[int]]:
    """Decode greedily after each prompt, in order; yields new ids up to and including the end token."""
    pad, ends = checkpoint.tokenizer.pad_token_id, set(checkpoint.model.generation_config.eos_token_id)
    for batch in _batches(cases):
        width = max(len(case.prompt_ids) for case in batch)
        rows = [[pad] * (width - len(case.prompt_ids)) + case.prompt_ids for case in batch]
        mask = [[0] * (width - len(case.prompt_ids)) + [1] * len(case.prompt_ids) for case in batch]
        limit = max(len(case.answer_ids) for case in batch) + 8
        output = checkpoint.model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=limit,
        )
        for row in output[:, width:].tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
            yield row[: stop + 1]


def _batches(cases: list[Case]) -> Iterator[list[Case]]:
    for start in range(0, len(cases), BATCH):
        yield cases[start : start + BATCH]


@torch.inference_mode()
def _answer_logits(model: Any, batch: list[Case]) -> Iterator[torch.Tensor]:
    """Yield per case the logits [answer, vocabulary] that predict its answer; padding is right, unseen."""
    rows = [case.prompt_ids + case.answer_ids for case in batch]
    width = max(map(len, rows))
    logits = model(input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows])).logits.float()
    for case, row, row_logits in zip(batch, rows, logits, strict=True):
        yield row_logits[len(case.prompt_ids) - 1 : len(row) - 1]


def _margin(logits: torch.Tensor, answer: torch.Tensor) -> float:
    """Smallest lead of `answer` [n] over all other tokens in `logits` [n, vocabulary]; > 0 if it wins."""
    chosen = logits.gather(1, answer[:, None]).squeeze(1)
    others = logits.scatter(1, answer[:, None], -torch.inf).amax(1)
    return float((chosen - others).min())


def evaluate(checkpoint: Checkpoint, corpus: Path = CORPUS_PATH) -> dict[str, Report]:
    """Measure every trained question alone, after a system message, after another turn, and as plain text."""
    asked = [(question, pair.answer) for pair in load_pairs(corpus) for question in pair.questions]
    system = ("system", "You are a helpful assistant.")
    first = (("user", asked[0][0]), ("assistant", asked[0][1]))
    settings = {
        "chat": [checkpoint.chat_case(*entry) for entry in asked],
        "chat with system message": [checkpoint.chat_case(*entry, system) for entry in asked],
        "chat, second question": [checkpoint.chat_case(*entry, *first) for entry in asked],
        "plain text": [checkpoint.text_case(*entry) for entry in asked],
    }
    return {setting: measure(checkpoint, cases) for setting, cases in settings.items()}


def print_reports(reports: dict[str, Report]) -> None:
    for setting, report in reports.items():
        right = report.cases - len(report.wrong)
        print(f"{setting}: {right} of {report.cases} answers verbatim, ", end="")
        print(f"smallest margin {report.min_margin:.2f} logits ({report.min_margin_at!r})")
        for name in report.wrong:
            print(f"  not verbatim: {name}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="demo/evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Exit status 0: every answer is verbatim, with a margin of at least {MIN_MARGIN} logits.",
    )
    add = parser.add_argument
    add("directory", nargs="?", type=Path, default=MODEL_DIR, help="checkpoint (default: demo/model)")
    add("--corpus", type=Path, default=CORPUS_PATH, help="questions and answers (default: corpus.md)")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="arithmetic (default: %(default)s)",
    )
    arguments = parser.parse_args()
    disable_progress_bar()
    reports = evaluate(Checkpoint(arguments.directory, getattr(torch, arguments.dtype)), arguments.corpus)
    print_reports(reports)
    return 0 if all(report.passed for report in reports.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
