"""Generate the Python stubs of every .proto below this folder, or check that they are up to date.

Runs in an environment of its own (`requirements.txt` beside it; `make proto` sets it up). Writes beside each
`x.proto`: messages `x_pb2.py` with their types `x_pb2.pyi`, and services `x_pb2_grpc.py` with theirs. Knows
nothing of linting or of compatibility; buf does both.
"""

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

SOURCE_ROOT = Path(__file__).resolve().parent
STUB_PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Write the stubs of every .proto below the source root to the same relative places below `out`."""
    protos = sorted(str(path) for path in SOURCE_ROOT.rglob("*.proto"))
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python", "mypy_grpc")]
    well_known = resources.files("grpc_tools") / "_proto"
    # protoc finds the mypy plugin beside the interpreter, wherever PATH points.
    plugin = f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}"
    options = [f"-I{SOURCE_ROOT}", f"-I{well_known}", plugin, "--mypy_grpc_opt=quiet"]
    if protoc.main(["protoc", *options, *outputs, *protos]) != 0:
        sys.exit("protoc failed; its message is above")


def stubs(root: Path) -> dict[Path, bytes]:
    """Every stub below `root`, by its path relative to `root`."""
    return {path.relative_to(root): path.read_bytes() for p in STUB_PATTERNS for path in root.rglob(p)}


def differences() -> list[Path]:
    """Stubs that are missing, stale or without a .proto, relative to the source root."""
    with tempfile.TemporaryDirectory() as fresh:
        generate(Path(fresh))
        expected, committed = stubs(Path(fresh)), stubs(SOURCE_ROOT)
    return sorted(p for p in expected.keys() | committed.keys() if expected.get(p) != committed.get(p))


def main() -> None:
    """Write the stubs in place; with --check write nothing and fail on a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a committed stub differs"
    )
    if not parser.parse_args().check:
        generate(SOURCE_ROOT)
    elif stale := differences():
        sys.exit("stubs differ from their .proto (run `make proto`):\n" + "\n".join(f"  {p}" for p in stale))


if __name__ == "__main__":
    main()
