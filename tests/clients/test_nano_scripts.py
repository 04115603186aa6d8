"""Scripts with nano-vLLM's calls run as they are: same arguments, a checkpoint where they look for one."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.clients.command import DEMO_MODEL, THREADS

SCRIPTS = Path(__file__).with_name("scripts")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home directory with a small random checkpoint whose vocabulary has more than 10,000 ids."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "huggingface" / "Qwen3-0.6B"
    config = Qwen3Config(
        vocab_size=10_240,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1279,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return home


def run(home, script, *arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        env={**os.environ, **THREADS, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_example(home):
    done = run(home, "offline_example.py")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^Prompt: '.*(?:Who are you|primes).*'$", done.stdout, re.MULTILINE)) == 2
    assert len(re.findall(r"^Completion: ['\"].+['\"]$", done.stdout, re.MULTILINE)) == 2
    assert "2/2" in done.stderr  # the progress bar


def test_bench(home):
    done = run(home, "offline_bench.py", "64", "120")
    assert done.returncode == 0, done.stderr
    line = r"Total: (\d+)tok, Time: [\d.]+s, Throughput: ([\d.]+)tok/s\n"
    found = re.fullmatch(line, done.stdout)
    assert found is not None, done.stdout
    assert int(found[1]) > 64 * 100
    assert float(found[2]) > 0
