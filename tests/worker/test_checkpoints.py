"""What a checkpoint may look like, and what is refused: by the file's and the field's or tensor's name."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker import loader
from gpu_worker.errors import CheckpointError
from tests.support.random_checkpoints import Shape, write_checkpoint
from tests.worker import drive

REQUEST = drive.Request([5, 6, 7, 8], 8, drive.sampling(seed=1))


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path / "model", Shape(), with_tokenizer=False)


def edit(folder, **fields):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def tokens(folder):
    made = drive.runner(drive.load(folder), max_num_seqs=2, num_kvcache_blocks=8)
    return drive.generate(made, [REQUEST]).tokens


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("architectures", ["LlamaForCausalLM"], "LlamaForCausalLM"),
        ("architectures", ..., "architectures"),
        ("vocab_size", ..., "missing"),
        ("vocab_size", "many", "positive integer"),
        ("num_hidden_layers", 0, "positive integer"),
        ("num_key_value_heads", 3, "does not divide"),
        ("head_dim", 15, "odd"),
        ("hidden_act", "gelu", "not supported"),
        ("quantization_config", {"quant_method": "fp8"}, "not supported"),
        ("use_sliding_window", True, "not supported"),
        ("layer_types", ["full_attention", "sliding_attention"], "sliding_attention"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}, "yarn"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "linear"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "llama3"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("rope_theta", -1.0, "positive number"),
        ("rms_norm_eps", 0, "positive number"),
        ("tie_word_embeddings", "yes", "neither true nor false"),
    ],
)
def test_configurations_that_are_refused(folder, name, value, says):
    edit(folder, **{name: value})
    with pytest.raises(CheckpointError, match=says) as error:
        drive.load(folder)
    assert name in str(error.value)
    assert str(folder / "config.json") in str(error.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "\x80"])
def test_broken_config(folder, content):
    path = folder / "config.json"
    path.unlink() if content is None else path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        drive.load(folder)


def test_missing_tensor(folder):
    edit_tensors(folder, lambda t: t.pop("model.layers.1.self_attn.k_norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_norm\.weight missing"):
        drive.load(folder)


def test_extra_tensors_are_counted(folder):
    more = {f"model.layers.{n}.mlp.extra": torch.ones(1) for n in range(7)}
    edit_tensors(folder, lambda t: t.update(more))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.extra.* and 2 more not part of"):
        drive.load(folder)


def test_bias_that_the_configuration_does_not_know(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias not part of"):
        drive.load(folder)


def test_tensor_of_another_shape(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.ones(96, 47)}))
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight: shape \[96, 47\], the model needs \[96, 48\]"
    ):
        drive.load(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_tensor_of_a_dtype_that_is_not_plain(folder, dtype):
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(48).to(dtype)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: dtype"):
        drive.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        drive.load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        drive.load(folder)


class TestSharded:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_checkpoint(tmp_path / "model", Shape(shards=3), with_tokenizer=False)

    def index(self, folder, change):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    def test_is_the_same_model(self, folder, tmp_path):
        single = write_checkpoint(tmp_path / "single", Shape(), with_tokenizer=False)
        assert tokens(folder) == tokens(single)

    def test_missing_shard(self, folder):
        (folder / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: missing"):
            drive.load(folder)

    def test_shard_without_a_promised_tensor(self, folder):
        self.index(
            folder,
            lambda i: i["weight_map"].update({"model.norm.weight": "model-00001-of-00003.safetensors"}),
        )
        with pytest.raises(CheckpointError, match=r"00001-of-00003\.safetensors: model\.norm\.weight m"):
            drive.load(folder)

    def test_shard_elsewhere(self, folder):
        self.index(folder, lambda i: i["weight_map"].update({"model.norm.weight": "../other.safetensors"}))
        with pytest.raises(CheckpointError, match="not the name of a file beside it"):
            drive.load(folder)

    def test_no_map(self, folder):
        self.index(folder, lambda i: i.update(weight_map=None))
        with pytest.raises(CheckpointError, match=r"index\.json: weight_map"):
            drive.load(folder)


def test_head_of_a_tied_model_may_be_written_and_is_not_used(tmp_path):
    shape = Shape(tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "model", shape, with_tokenizer=False)
    plain = tokens(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(320, 48)}))
    assert tokens(folder) == plain


def test_half_precision_is_read_as_float32(tmp_path):
    folder = write_checkpoint(tmp_path / "model", Shape(dtype=torch.bfloat16), with_tokenizer=False)
    loaded = drive.load(folder)
    assert loaded.dtype == torch.float32
    narrow = tokens(folder)
    edit_tensors(folder, lambda t: t.update({name: value.float() for name, value in t.items()}))
    assert tokens(folder) == narrow


def test_places_that_are_no_checkpoint(tmp_path):
    (tmp_path / "file").touch()
    for model, says in ((tmp_path / "none", "no such directory"), (tmp_path / "file", "not a directory")):
        with pytest.raises(CheckpointError, match=says):
            loader.locate(str(model))
    with pytest.raises(CheckpointError, match="nobody/nothing: no such directory, and the hub"):
        loader.locate("nobody/nothing")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--model", "MODEL", "--tensor-parallel-size", "2"], 64, "--tensor-parallel-size 2"),
        (["--model", "MODEL", "--device", "cuda"], 64, "--device cuda"),
        (["--model", "MODEL", "--max-model-len", "100000"], 64, "--max-model-len 100000"),
        (["--model", "MODEL", "--max-num-batched-tokens", "5"], 64, "--max-num-batched-tokens 5"),
        (["--model", "MODEL", "--kvcache-block-size", "24"], 64, "--kvcache-block-size 24"),
        (
            ["--model", "MODEL", "--kvcache-block-size", "65536"],
            64,
            "--kvcache-block-size 65536: at most 4096",
        ),
        (["--model", "MODEL", "--threads", "100000"], 64, "--threads 100000: at most"),
        (["--model", "MODEL", "--num-kvcache-blocks", "1000000000"], 64, "--num-kvcache-blocks 1000000000"),
        (["--model", "MODEL", "--connect", "tcp://127.0.0.1:1"], 64, "plain tcp is refused"),
        (["--model", "MODEL", "--load-timeout-s", "0.000001"], 70, "loading the weights took longer than"),
        (["--model", "MODEL/none"], 65, "no such directory"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else None,
)
def test_the_process_says_why_it_ends(folder, tmp_path, arguments, code, says):
    arguments = [argument.replace("MODEL", str(folder)) for argument in arguments]
    command = [sys.executable, "-m", "gpu_worker", "--log-level", "error", *arguments]
    if "--connect" not in arguments:
        command += ["--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == code
    assert says in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
