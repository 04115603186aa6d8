"""The `baton` command against a real stack: what it prints, and how it fails."""

import os
import signal
import subprocess
import sys
import time

import grpc
import pytest

from demo.corpus import load_pairs
from tests.clients.command import assert_one_clear_line, baton, errors_of, json_lines, output_of
from tests.clients.fake_server import fake_server, status

PAIR = load_pairs()[0]
QUESTION, ANSWER = PAIR.questions[0], PAIR.answer


@pytest.fixture
def ask(stack):
    def run(command, *arguments, **options):
        return baton(command, "--address", stack.address, *arguments, **options)

    return run


def test_chat_answers_a_trained_question(ask):
    done = ask("chat", QUESTION, "--temperature", "0", "--stats")
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n")
    assert "TTFT" in done.stderr
    assert "stop;" in done.stderr


def test_conversation_on_standard_input(ask):
    done = ask("chat", "--temperature", "0", stdin=f"{QUESTION}\n\n")
    assert (done.returncode, done.stdout) == (0, f"{ANSWER}\n")


def test_generate_text_json_and_token_ids_agree(ask):
    options = ("--max-tokens", "24", "--seed", "3", "--ignore-eos")
    plain = ask("generate", "A plan is", *options)
    as_json = ask("generate", "-", "--json", *options, stdin="A plan is")
    *deltas, finish = json_lines(as_json.stdout)
    assert "".join(delta["text"] for delta in deltas) + "\n" == plain.stdout
    starts = [sum(len(before["token_ids"]) for before in deltas[:place]) for place in range(len(deltas))]
    assert [delta["index"] for delta in deltas] == starts
    assert (finish["finish"], finish["completion_tokens"]) == ("length", 24)
    ids = json_lines(ask("tokenize", "A plan is").stdout)[0]["token_ids"]
    assert len(ids) == finish["prompt_tokens"]
    again = ask("generate", "--token-ids", ",".join(map(str, ids)), *options)
    assert again.stdout == plain.stdout


def test_stop_text_ends_the_answer(ask):
    word = ANSWER.split()[3]
    done = ask("chat", QUESTION, "--temperature", "0", "--stop", word, "--json")
    *deltas, finish = json_lines(done.stdout)
    assert "".join(delta["text"] for delta in deltas) == ANSWER[: ANSWER.index(word)]
    assert (finish["finish"], finish["matched_stop"]) == ("stop", word)


def test_tokenize_counts_and_renders(ask):
    rendered = json_lines(ask("tokenize", "--chat", QUESTION).stdout)[0]
    assert QUESTION in rendered["text"]
    assert rendered["text"] != QUESTION
    assert int(ask("tokenize", "--count", "--chat", QUESTION).stdout) == len(rendered["token_ids"])


def test_model_is_described(ask):
    done = ask("model")
    assert '"health": "SERVING"' in done.stdout
    assert '"supports_chat": true' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "hi", "--temperature", "-1"), ["temperature", "-1"]),
        (("generate", "hi", "--top-p", "2"), ["top_p"]),
        (("generate", "hi", "--max-tokens", "0"), ["max_tokens"]),
        (("generate", "hi", "--max-tokens", "100000"), ["max_tokens"]),
        (("generate", ""), ["empty"]),
        (("generate", "--token-ids", "1,x"), ["--token-ids"]),
        (("generate", "--token-ids", "1,99999"), ["99999"]),
        (("generate", "--token-ids", "1", "hi"), ["--token-ids"]),
        (("chat", "-"), ["empty"]),
    ],
)
def test_refusals_are_one_clear_line(ask, arguments, words):
    assert_one_clear_line(ask(*arguments), *words)


def test_deadline_is_one_clear_line(ask):
    done = ask("generate", "hi", "--ignore-eos", "--max-tokens", "2000", "--timeout", "0.001")
    assert (done.returncode, done.stderr) == (1, "baton: not done after 0.001 s (--timeout)\n")


def test_nobody_at_the_address_is_one_clear_line():
    assert_one_clear_line(baton("chat", "hi", "--address", "127.0.0.1:1"), "127.0.0.1:1", "baton up")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--address", value) for value in ("", "localhost", "localhost:", ":::", "127.0.0.1:99999", "a:0")),
        *(("--address", value) for value in ("::1:50051", "fe80::1%eth0:50051", "2001:DB8::ffff:1.2.3.4:1")),
        *(("--timeout", value) for value in ("0", "-1", "nan", "inf", "soon")),
    ],
)
def test_wrong_addresses_and_times_are_wrong_usage(option, value):
    done = baton("model", option, value)
    assert done.returncode == 2
    assert f"argument {option}: {value!r} is not" in done.stderr


@pytest.mark.parametrize(
    "address", ["[::1]:1", "unix:/nowhere.sock", "localhost:1", "dns:///localhost:1", "dns:localhost:1"]
)
def test_addresses_in_all_forms(address):
    assert_one_clear_line(baton("model", "--address", address), address, "baton up")


def test_a_server_that_leaves_amid_the_answer():
    with fake_server() as server:
        server.service.failure_after = (3, status(grpc.StatusCode.UNAVAILABLE, "Socket closed"))
        done = baton("generate", "plans", "--address", server.address)
    assert (done.returncode, done.stdout) == (1, "pla\n")
    assert done.stderr == "baton: the server went away amid the answer: Socket closed\n"


def test_the_version_is_told():
    assert baton("--version").stdout.startswith("baton ")


@pytest.mark.parametrize("command", ["up", "down", "chat", "generate", "tokenize", "model"])
def test_help_teaches_by_example(command):
    done = baton(command, "--help")
    assert done.returncode == 0
    assert f"  baton {command}" in done.stdout.partition("examples:")[2]


def test_no_arguments_print_the_help():
    done = baton()
    assert done.returncode == 0
    assert "a first session:" in done.stdout


def endless(stack):
    return [
        *(sys.executable, "-m", "baton_client.cli", "generate", "A plan is", "--address", stack.address),
        *("--ignore-eos", "--max-tokens", "1900"),
    ]


def test_a_reader_that_leaves_is_no_error(stack):
    with subprocess.Popen(endless(stack), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        output_of(process).read(1)
        output_of(process).close()
        errors = errors_of(process).read().decode()
        assert (process.wait(30), errors) == (141, "")


def test_interrupt_is_no_traceback(stack):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        endless(stack), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        output_of(process).read(1)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait(30) == 130
        assert time.monotonic() - started < 5
        assert b"Traceback" not in errors_of(process).read()
