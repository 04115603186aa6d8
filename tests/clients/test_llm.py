"""The offline face over a real stack: order, mixtures, steps, refusals, and its end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from baton_client import LLM, BatonError, InvalidArgumentError, SamplingParams, StackError, UnavailableError
from demo.corpus import load_pairs
from tests.clients.command import DEMO_MODEL, output_of, processes_with
from tests.clients.fake_server import FakeServer

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    with LLM(DEMO_MODEL, enforce_eager=True, max_num_seqs=32, max_num_batched_tokens=2048) as llm:
        yield llm


@pytest.fixture
def chats(client):
    """Trained questions as rendered text, with their answers."""
    asked = [(pair.questions[0], pair.answer) for pair in load_pairs()[:40]]
    return [(client.tokenize([{"role": "user", "content": ask}]).text, answer) for ask, answer in asked]


def test_outputs_are_in_the_order_of_the_prompts(llm, chats):
    params = [SamplingParams(temperature=0.0, max_tokens=200) for _ in chats]
    outputs = llm.generate([prompt for prompt, _ in chats], params, use_tqdm=False)
    assert [output["text"] for output in outputs] == [answer for _, answer in chats]
    assert all(set(output) == {"text", "token_ids"} for output in outputs)


def test_texts_and_token_ids_mix_and_each_has_its_parameters(llm, client):
    text = "A plan is"
    ids = list(client.tokenize(text).token_ids)
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (5, 9)]
    first, second = llm.generate([text, ids], params, use_tqdm=False)
    assert (len(first["token_ids"]), len(second["token_ids"])) == (5, 9)
    assert second["token_ids"][:5] == first["token_ids"]


def test_more_prompts_than_the_server_runs_at_once(llm):
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    outputs = llm.generate([[index % 1000, 5] for index in range(700)], params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [2] * 700


def test_progress_bar_shows_both_rates(llm, capfd):
    llm.generate(["A plan is"] * 3, GREEDY)
    errors = capfd.readouterr().err
    assert "3/3" in errors
    assert "Prefill=" in errors
    assert "Decode=" in errors
    llm.generate(["A plan is"], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_steps(llm):
    numbers = [llm.add_request("A plan is", GREEDY), llm.add_request([7, 8, 9], GREEDY)]
    assert not llm.is_finished()
    ended: dict[int, list[int]] = {}
    prefilled = decoded = 0
    while not llm.is_finished():
        outputs, tokens = llm.step()
        ended |= dict(outputs)
        prefilled += max(tokens, 0)
        decoded += max(-tokens, 0)
    assert list(ended) == numbers or list(ended) == numbers[::-1]
    assert all(len(token_ids) == 32 for token_ids in ended.values())
    whole = llm.generate(["A plan is", [7, 8, 9]], GREEDY, use_tqdm=False)
    assert [ended[number] for number in numbers] == [output["token_ids"] for output in whole]
    assert prefilled > 3
    assert decoded >= 62  # the first token of each may come with its prefill
    assert llm.step() == ([], 0)


def test_seed_repeats_whatever_else_runs(llm):
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=24, ignore_eos=True)
    (alone,) = llm.generate(["Blocks"], params, use_tqdm=False)
    crowd = llm.generate(["Blocks", *["A step"] * 12], [params, *[GREEDY] * 12], use_tqdm=False)
    assert crowd[0] == alone


def test_stop_parameters(llm, chats):
    prompt, answer = chats[0]
    word = answer.split()[4]
    params = SamplingParams(temperature=0.0, max_tokens=200, stop=[word])
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output["text"] == answer[: answer.index(word)]
    (free,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=200), use_tqdm=False)
    stop_id = free["token_ids"][6]
    params = SamplingParams(temperature=0.0, max_tokens=200, stop_token_ids=[stop_id])
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output["token_ids"] == free["token_ids"][: free["token_ids"].index(stop_id) + 1]
    params = SamplingParams(temperature=0.0, max_tokens=200, stop_token_ids=[stop_id], min_tokens=30)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert len(output["token_ids"]) >= 30


def test_one_bad_prompt_cancels_the_call_and_harms_nothing_else(llm):
    with pytest.raises(InvalidArgumentError, match="99999"):
        llm.generate(["A plan is", [99999]], SamplingParams(max_tokens=1500, ignore_eos=True), use_tqdm=False)
    assert llm.is_finished()
    (output,) = llm.generate(["A plan is"], GREEDY, use_tqdm=False)
    assert len(output["token_ids"]) == 32


@pytest.mark.parametrize("bad", [None, 5, b"ids"])
def test_what_is_no_prompt_harms_nothing_else(llm, bad):
    with pytest.raises(InvalidArgumentError, match=r"^prompt: .* not (NoneType|int|bytes)$"):
        llm.generate(["A plan is", bad], GREEDY, use_tqdm=False)
    assert llm.is_finished()
    (output,) = llm.generate([range(1, 4)], GREEDY, use_tqdm=False)
    assert output["token_ids"]


@pytest.mark.parametrize(
    ("prompts", "params", "field"),
    [
        ("one text", GREEDY, "prompts"),
        (7, GREEDY, "prompts"),
        (["a", "b"], [GREEDY], "sampling_params"),
        (["a"], None, "sampling_params"),
    ],
)
def test_what_does_not_fit_is_named(llm, prompts, params, field):
    with pytest.raises(InvalidArgumentError, match=f"^{field}: "):
        llm.generate(prompts, params)


def test_no_prompts_no_outputs(llm):
    assert llm.generate([], GREEDY) == []


def test_connect_to_a_running_server(stack, chats):
    with LLM.connect(stack.address) as llm:
        (output,) = llm.generate(
            [chats[0][0]], SamplingParams(temperature=0.0, max_tokens=200), use_tqdm=False
        )
    assert output["text"] == chats[0][1]
    stack.check()
    with pytest.raises(BatonError, match="exited"):
        llm.add_request("a", GREEDY)
    llm.exit()


def test_connect_where_nobody_listens_fails_soon_and_names_the_address():
    started = time.monotonic()
    with pytest.raises(UnavailableError, match=r"^no server answers at 127\.0\.0\.1:1, tried for 3 s"):
        LLM.connect("127.0.0.1:1")
    assert time.monotonic() - started < 10


def test_connect_waits_for_a_server_that_starts_as_long_as_it_is_told():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    late = threading.Timer(4.0, lambda: started.append(FakeServer(port)))
    late.start()
    try:
        LLM.connect(f"127.0.0.1:{port}", timeout_s=60).exit()
        assert started
    finally:
        late.join()
        started[0].close()


@pytest.mark.parametrize("argument", ["quantization", "swap_space", "hf_config"])
def test_unknown_arguments_are_refused_by_name(argument):
    with pytest.raises(TypeError, match=argument):
        LLM(DEMO_MODEL, **{argument: 1})  # type: ignore[arg-type]


def test_more_ranks_than_there_are_is_refused():
    with pytest.raises(StackError, match="tensor"):
        LLM(DEMO_MODEL, tensor_parallel_size=2)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(StackError, match=str(tmp_path)):
        LLM(tmp_path)


SCRIPT = """
import signal, sys
from baton_client import LLM, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
llm = LLM({model!r})
print(llm._stack.run_dir, flush=True)
if sys.argv[1] == "wait":
    llm.generate([[1, 2, 3]] * 600, SamplingParams(max_tokens=1500, ignore_eos=True), use_tqdm=False)
"""


@pytest.mark.parametrize("sign", [None, signal.SIGINT, signal.SIGKILL])
def test_the_stack_ends_with_its_process(sign):
    how = "leave" if sign is None else "wait"
    command = [sys.executable, "-c", SCRIPT.format(model=str(DEMO_MODEL)), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        run_dir = output_of(process).readline().strip()
        assert run_dir
        if sign is not None:
            os.kill(process.pid, sign)
        process.wait(60)
    deadline = time.monotonic() + 30
    while processes_with(run_dir) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(run_dir) == []
    if sign is not signal.SIGKILL:
        assert not os.path.exists(run_dir)
