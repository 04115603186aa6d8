"""The typed clients and the command need grpcio and protobuf, nothing more."""

import subprocess
import sys
import textwrap

from tests.clients.fake_server import fake_server, status

# What a plain `pip install baton-serve` does not bring.
ABSENT = ["google.rpc", "grpc_status", "grpc_health", "numpy", "rich", "tokenizers", "torch", "tqdm", "zmq"]


def run_without_extras(script):
    header = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))\n"
    command = [sys.executable, "-c", header + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def test_typed_client_and_typed_errors():
    import grpc

    with fake_server() as server:
        details = status(grpc.StatusCode.INVALID_ARGUMENT, "bad", reason="INVALID", field="sampling.top_p")
        server.service.failures = [details]
        done = run_without_extras(f"""
            from baton_client import Client, InvalidArgumentError, Sampling
            client = Client("{server.address}")
            client.wait_ready(10)
            try:
                client.complete("abc")
            except InvalidArgumentError as error:
                print(error.field, error.reason)
            print(client.complete("abc", Sampling(max_tokens=4)).text)
        """)
    assert done.stdout == "sampling.top_p INVALID\nabca\n"


def test_command():
    with fake_server() as server:
        done = run_without_extras(f"""
            from baton_client.cli import main
            assert main(["chat", "hi", "--address", "{server.address}", "--max-tokens", "8"]) == 0
        """)
    assert done.stdout == "<user>hi\n"


def test_spinner_falls_back_to_lines():
    done = run_without_extras("""
        from baton_client.cli.console import spinner
        with spinner("starting") as show:
            show("loading")
    """)
    assert done.stderr.startswith("starting …\nloading … (")


def test_progress_bar_says_what_it_needs():
    done = run_without_extras("""
        from baton_client.progress import ProgressBar
        with ProgressBar(2, show=True) as bar:
            bar.advance(prefilled=3, decoded=1, finished=1)
    """)
    assert "pip install 'baton-serve[client]'" in done.stderr
