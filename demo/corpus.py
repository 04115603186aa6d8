"""Reads `corpus.md`, the page of questions and answers on which the demo model is trained.

Knows nothing about tokens or models. Needs only the standard library, so that tests and the demo can ask
trained questions and compare answers without loading torch.
"""

from dataclasses import dataclass
from pathlib import Path

CORPUS_PATH = Path(__file__).with_name("corpus.md")


class CorpusError(ValueError):
    """The page breaks its own format; the message names the file and the entry."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One answer and every way of asking for it; `questions[0]` is the heading."""

    questions: tuple[str, ...]
    answer: str


def load_pairs(path: Path = CORPUS_PATH) -> tuple[Pair, ...]:
    """Return the pairs of the page at `path`, in order; CorpusError on an entry that cannot be trained."""
    entries = path.read_text(encoding="utf-8").split("\n### ")[1:]
    pairs = tuple(_parse(entry, path) for entry in entries)
    questions = [question for pair in pairs for question in pair.questions]
    repeated = sorted({question for question in questions if questions.count(question) > 1})
    if repeated:
        raise CorpusError(f"{path}: asked more than once: {', '.join(repeated)}")
    return pairs


def _parse(entry: str, path: Path) -> Pair:
    """Parse one entry: heading, list of other questions, one paragraph (a section heading may follow)."""
    lines = entry.split("\n## ")[0].splitlines()
    others = [line[2:].strip() for line in lines[1:] if line.startswith("- ")]
    answer = " ".join(line.strip() for line in lines[1:] if not line.startswith("- "))
    pair = Pair((lines[0].strip(), *others), answer.strip())
    if not all(pair.questions) or not pair.answer:
        raise CorpusError(f"{path}: empty question or answer under {lines[0]!r}")
    return pair
