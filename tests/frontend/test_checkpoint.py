"""What the scheduler reads of a checkpoint, and that every broken file is named."""

import pytest

from scheduler_svc import checkpoint
from scheduler_svc.checkpoint import CheckpointError, SamplingDefaults
from scheduler_svc.frontend import model, tokenizer
from tests.support.checkpoints import write_checkpoint, write_json
from tests.support.tokenizers_zoo import SPECIAL, byte_level


def test_eos_is_the_union_of_three_files(tmp_path):
    path = write_checkpoint(tmp_path, config={"eos_token_id": 3}, generation={"eos_token_id": [5, 4]})
    loaded = model.load(checkpoint.load(path), default_max_tokens=1)
    assert loaded.eos_token_ids == (3, 4, 5, byte_level().token_to_id(SPECIAL))


def test_eos_may_be_missing_everywhere(tmp_path):
    path = write_checkpoint(tmp_path, config={"eos_token_id": None}, tokenizer_config={"eos_token": None})
    assert model.load(checkpoint.load(path), default_max_tokens=1).eos_token_ids == ()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, SamplingDefaults()),
        ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, SamplingDefaults(0.6, 20, 0.95, 0.0)),
        ({"do_sample": True, "temperature": 0.6, "min_p": 0.1}, SamplingDefaults(0.6, 0, 1.0, 0.1)),
        ({"do_sample": False, "temperature": 0.6}, SamplingDefaults(0.0)),
        ({"temperature": None, "top_k": None}, SamplingDefaults()),
    ],
)
def test_sampling_defaults(tmp_path, generation, expected):
    assert checkpoint.load(write_checkpoint(tmp_path, generation=generation)).sampling == expected


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("config.json", "{", "not JSON"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", None, "missing"),
        ("config.json", '{"eos_token_id": "x"}', "eos_token_id"),
        ("config.json", '{"eos_token_id": 2147483648}', "eos_token_id"),
        ("generation_config.json", "\x00", "not JSON"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature"),
        ("generation_config.json", '{"top_p": 7}', "top_p"),
        ("tokenizer_config.json", "nonsense", "not JSON"),
        ("tokenizer.json", None, "missing"),
        ("tokenizer.json", '{"version": "1.0"}', "Model missing"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file, content, complaint):
    path = write_checkpoint(tmp_path, generation={})
    if content is None:
        (path / file).unlink()
    else:
        (path / file).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        tokenizer.load(checkpoint.load(path))
    assert str(path / file) in str(caught.value)
    assert complaint in str(caught.value)


def test_what_is_no_directory_is_named(tmp_path):
    write_json(tmp_path / "file", {})
    for model_id, complaint in [
        (str(tmp_path / "file"), "not a directory"),
        (str(tmp_path / "nothing"), "no such directory"),
        ("no-owner/no-model", "the model hub did not give it"),  # the hub is out of reach in tests
    ]:
        with pytest.raises(CheckpointError, match=complaint) as caught:
            checkpoint.locate(model_id)
        assert model_id in str(caught.value)
    assert checkpoint.locate(str(tmp_path)) == tmp_path


def test_tokens_that_the_configuration_names_are_special(tmp_path):
    path = write_checkpoint(tmp_path, tokenizer_config={"eos_token": "<think>", "pad_token": "<absent>"})
    codec = tokenizer.load(checkpoint.load(path))
    detokenizer = codec.detokenization.new()
    think, letter = codec.token_id("<think>"), codec.token_id("a")
    assert think is not None
    assert letter is not None
    assert detokenizer.push([think, letter]) == "a"
    assert codec.token_id("<absent>") is None
