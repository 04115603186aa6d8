"""`baton chat` as a person at a terminal has it: the prompt, Ctrl-C and Ctrl-D."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import grpc

from tests.clients.fake_server import fake_server, status
from tests.support.processes import wait_until


class Terminal:
    """The person's side of the terminal at which the command runs."""

    def __init__(self, process, file):
        self.process = process
        self._file = file

    def type(self, keys):
        os.write(self._file, keys)

    def interrupt(self):
        """Ctrl-C, once the command waits: readline misses a signal that comes just before."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S", why="a command that waits")
        self.process.send_signal(signal.SIGINT)

    def until(self, words, timeout_s=20.0):
        """What the command wrote, up to `words`."""
        seen, deadline = b"", time.monotonic() + timeout_s
        while words not in seen:
            assert select.select([self._file], [], [], max(0.0, deadline - time.monotonic()))[0], seen
            seen += os.read(self._file, 1)
        return seen


@contextmanager
def conversation(address):
    file, theirs = pty.openpty()
    command = [sys.executable, "-m", "baton_client.cli", "chat", "--address", address, "--max-tokens", "2000"]
    environment = {**os.environ, "TERM": "dumb"}
    try:
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
        ) as process:
            try:
                yield Terminal(process, file)
            finally:
                process.kill()
    finally:
        os.close(file)
        os.close(theirs)


def test_an_interrupt_at_the_prompt_drops_the_line_and_the_first_says_how_to_leave():
    with fake_server() as server, conversation(server.address) as terminal:
        terminal.until(b"\n> ")
        terminal.type(b"not this")
        terminal.until(b"not this")
        terminal.interrupt()
        assert b"Ctrl-D leaves" in terminal.until(b"\n> ")
        terminal.interrupt()
        assert b"Ctrl-D" not in terminal.until(b"\n> ")
        terminal.type(b"but this\n")
        terminal.until(b"<user>but this")
        assert [message.content for message in server.service.requests[0].chat.messages] == ["but this"]


def test_an_interrupt_amid_an_answer_stops_it_and_keeps_the_conversation():
    with fake_server() as server, conversation(server.address) as terminal:
        server.service.token_delay_s = 0.01
        terminal.until(b"\n> ")
        terminal.type(b"one\n")
        terminal.until(b"<user>one")
        terminal.interrupt()
        assert b"[stopped]" in terminal.until(b"\n> ")
        terminal.type(b"two\n")
        terminal.until(b"<user>two")
        terminal.interrupt()
        terminal.until(b"\n> ")
        terminal.type(b"\x04")
        assert terminal.process.wait(20) == 0


def test_an_answer_that_fails_says_what_helps_and_keeps_the_conversation():
    full = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", reason="QUEUE_FULL", retry_after_s=1)
    with fake_server() as server, conversation(server.address) as terminal:
        terminal.until(b"\n> ")
        server.service.failures = [full] * 4  # the client itself tries so often
        terminal.type(b"one\n")
        assert b"baton: queue full (try again in 1 s)" in terminal.until(b"\n> ")
