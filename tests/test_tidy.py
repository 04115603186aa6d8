"""Habits that a linter does not know: the layout, the imports each package may have, sizes, words, links.

Style is ruff's, types are mypy's, imports through others are import-linter's (all in `make check`).
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
MAX_BYTES = 4 << 20

# Folders that hold packages and must not be packages: their names belong to others on PyPI.
SOURCE_ROOTS = [
    "clients",
    "kernels",
    "proto",
    "sim",
    "tests",
    "tests/clients",
    "tests/kernels",
    "tests/proto",
    "tests/sim",
]

# What a package's own files may import besides the standard library and itself. The longest folder wins.
ALLOWED_IMPORTS = {
    "clients/baton_client": {"baton.inference", "google", "grpc", "grpc_status", "rich", "tqdm"},
    "gpu_worker": {
        *("baton_kernels", "baton_wire", "flash_attn", "huggingface_hub", "numpy"),
        *("safetensors", "tokenizers", "torch", "tqdm", "transformers", "xxhash", "zmq"),
    },
    "kernels/baton_kernels": {"numpy", "torch", "triton"},
    "proto/baton": {"google", "grpc"},
    "proto/baton_wire": {"numpy", "xxhash"},
    "proto/baton_wire/transport": {"baton_wire", "numpy", "xxhash", "zmq"},
    "scheduler_svc": {
        *("baton.inference", "baton_wire", "google", "grpc", "grpc_health", "grpc_reflection", "grpc_status"),
        *("huggingface_hub", "jinja2", "numpy", "smg_grpc_proto", "tokenizers", "uvloop", "xxhash", "zmq"),
    },
    "scheduler_svc/core": {"baton_wire", "numpy", "xxhash"},
    "sim/baton_sim": {"baton_wire", "numpy", "scheduler_svc.core", "xxhash"},
}

FORBIDDEN_TEXT = {
    "a path of somebody's machine": re.compile(r"(?<![\w.])/(?:work|root|home|Users)/|\.\./shared\b"),
    "a note to oneself (finish it, or open an issue)": re.compile(r"\b(?:TO[D]O|FIX[M]E)\b"),
    "loading that may run code": re.compile(r"allow_pickle\s*=\s*True|weights_only\s*=\s*False"),
    "a Windows line ending": re.compile(r"\r"),
    "a space at the end of a line": re.compile(r"[ \t]+$", re.MULTILINE),
    "no newline, or an empty line, at the end": re.compile(r"(?:[^\n]|\n\n)\Z"),
}


def project_files() -> list[Path]:
    """Files that are, or are about to be, under version control."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def is_generated(path: Path) -> bool:
    """Stubs, measurements and checkpoints: what a program wrote."""
    return (
        "_pb2" in path.name or path.suffix in {".json", ".jsonl"} or path.is_relative_to(ROOT / "demo/model")
    )


def text_files() -> Iterator[tuple[Path, str]]:
    """Handwritten text with its path; what is not UTF-8 or holds NUL is no text."""
    for path in project_files():
        content = path.read_bytes()
        if is_generated(path) or b"\0" in content:
            continue
        try:
            yield path, content.decode()
        except UnicodeDecodeError:
            continue


def modules(folder: str) -> list[Path]:
    return [p for p in sorted((ROOT / folder).rglob("*.py")) if not is_generated(p)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("folder", SOURCE_ROOTS)
def test_source_roots_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_files_stay_small():
    def lines_of_code(text: str) -> int:
        return sum(1 for line in map(str.strip, text.splitlines()) if line and not line.startswith("#"))

    sizes = {name(path): lines_of_code(text) for path, text in text_files() if path.suffix == ".py"}
    assert {path: size for path, size in sizes.items() if size > MAX_LINES} == {}


def test_no_large_file():
    assert [name(path) for path in project_files() if path.stat().st_size > MAX_BYTES] == []


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_text_is_free_of(what):
    pattern = FORBIDDEN_TEXT[what]
    found = [
        f"{name(path)}:{text.count(chr(10), 0, match.start()) + 1}"
        for path, text in text_files()
        for match in pattern.finditer(text)
    ]
    assert found == []


def imported_modules(path: Path) -> Iterator[str]:
    """Dotted names that the file imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(module: str, allowed: str) -> bool:
    return module == allowed or module.startswith(f"{allowed}.")


def may_import(path: Path, module: str) -> bool:
    """Whether ALLOWED_IMPORTS lets the file at `path` import `module`."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        return True
    inside = name(path).removesuffix(".py")
    folder = max((f for f in ALLOWED_IMPORTS if inside == f or inside.startswith(f"{f}/")), key=len)
    nested = folder.partition("/")[0] in ("clients", "kernels", "proto", "sim")
    own = ".".join(folder.split("/")[1 if nested else 0 :])
    return any(is_within(module, allowed) for allowed in (own, *ALLOWED_IMPORTS[folder]))


@pytest.mark.parametrize("folder", ALLOWED_IMPORTS)
def test_packages_import_only_what_they_may(folder):
    wrong = [
        f"{name(p)} imports {m}" for p in modules(folder) for m in imported_modules(p) if not may_import(p, m)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["scheduler_svc", "baton_client", "baton_sim"])
def test_importing_every_module_loads_no_torch(package):
    """Third-party imports count too: transformers, for one, loads torch."""
    script = f"""
import importlib, pkgutil, sys, {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(*sorted({{"torch", "transformers", "triton"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def make_targets() -> dict[str, bool]:
    """Targets that a person may ask for, and whether `make help` describes them."""
    makefile = (ROOT / "Makefile").read_text()
    return {m[1]: "## " in m[2] for m in re.finditer(r"^([a-z-]+):(.*)$", makefile, re.MULTILINE)}


def test_every_make_target_is_described_and_phony():
    targets = make_targets()
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert [target for target, described in targets.items() if not described] == []
    assert set(phony[1].split()) == set(targets)


def markdown() -> list[tuple[Path, str]]:
    return [(path, text) for path, text in text_files() if path.suffix == ".md"]


def test_documented_make_targets_exist():
    mentions = {
        (name(p), m[1])
        for p, text in markdown()
        for m in re.finditer(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)
    }
    assert {(path, target) for path, target in mentions if target not in make_targets()} == set()


def test_links_in_documents_lead_somewhere():
    dead = [
        f"{name(path)}: {target}"
        for path, text in markdown()
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text)
        if not (path.parent / target).exists()
    ]
    assert dead == []


def test_readme_starts_with_two_commands():
    block = re.search(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None, "README.md has no code block"
    commands = [line for line in block[1].splitlines() if line and not line.startswith("#")]
    assert len(commands) == 2
    assert any(line.startswith("make demo") for line in commands)
