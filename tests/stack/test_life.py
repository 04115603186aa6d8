"""Start, death and end of the service's processes: whole or not at all, and never without saying why."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import grpc
import pytest

from baton.inference.v1 import inference_pb2 as pb
from baton.inference.v1 import inference_pb2_grpc as rpc
from tests.clients.command import assert_one_clear_line, baton
from tests.support.calls import expected, failure_of, generate, ids_request
from tests.support.checkpoints import write_checkpoint
from tests.support.demo import DEMO_MODEL
from tests.support.processes import ROOT, is_running, wait_until
from tests.support.stack import Stack, start_stack

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


def failed_start(**options):
    """(exit status, what was logged) of a stack that cannot start."""
    stack = Stack(
        options.pop("model", DEMO_MODEL),
        options.pop("scheduler_args", ()),
        options.pop("listen", "127.0.0.1:0"),
    )
    try:
        return stack.scheduler.wait(), stack.scheduler.err
    finally:
        stack.stop()


def parts_of(stack):
    return [stack.pid("core"), stack.pid("frontend")]


def failure_at(channel, request):
    with pytest.raises(grpc.RpcError) as caught:
        generate(channel, request)
    return failure_of(caught.value)


class TestStart:
    def test_a_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, log = failed_start(listen=f"127.0.0.1:{port}")
        assert code == 70
        assert f"cannot listen on 127.0.0.1:{port}" in log
        assert "Traceback" not in log

    def test_a_port_of_another_scheduler(self):
        """gRPC by itself would share it silently."""
        with start_stack(workers=0) as first:
            code, log = failed_start(listen=first.address)
        assert code == 70
        assert f"cannot listen on {first.address}" in log

    def test_a_run_directory_in_use(self):
        with start_stack(workers=0) as first:
            code, log = failed_start(scheduler_args=(f"--run-dir={first.run_dir}",))
            assert (code, "another scheduler is using it" in log) == (73, True)
            assert str(first.run_dir) in log
            assert not first.serving()  # but there

    def test_a_run_directory_that_others_may_enter(self, tmp_path):
        tmp_path.chmod(0o755)
        code, log = failed_start(scheduler_args=(f"--run-dir={tmp_path}",))
        assert (code, str(tmp_path) in log) == (73, True)

    @pytest.mark.parametrize(
        ("file", "content", "status"),
        [
            ("config.json", None, 66),
            ("config.json", "{", 66),
            ("generation_config.json", "[1]", 66),
            ("tokenizer.json", None, 66),
            ("tokenizer.json", '{"version": "1.0"}', 70),
            ("chat_template.jinja", "{% if %}", 70),
        ],
    )
    def test_a_broken_checkpoint(self, tmp_path, file, content, status):
        model = write_checkpoint(tmp_path / "model", generation={})
        if content is None:
            (model / file).unlink()
        else:
            (model / file).write_text(content)
        code, log = failed_start(model=model)
        assert code == status, log
        assert str(model / file) in log
        assert "Traceback" not in log

    def test_no_checkpoint(self, tmp_path):
        code, log = failed_start(model=tmp_path / "nothing")
        assert (code, f"{tmp_path / 'nothing'}: no such directory" in log) == (66, True)

    def test_a_worker_of_another_checkpoint_is_refused(self, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(DEMO_MODEL, other)
        (other / "generation_config.json").write_text("{}")
        with start_stack(workers=0) as running:
            worker = running.start_worker("stranger", f"--model={other}")
            assert worker.wait() == 65
            assert "FINGERPRINT_MISMATCH" in worker.err
            assert not running.serving()

    def test_the_line_on_stdout(self):
        with start_stack(workers=0, scheduler_args=("--served-model-name=my model",)) as running:
            host, _, port = running.address.rpartition(":")
            assert (host, int(port) > 0) == ("127.0.0.1", True)
            where = f"(model my model, run directory {running.run_dir})"
            assert running.scheduler.out == f"baton: listening on {running.address} {where}\n"
            with running.channel() as channel:
                assert rpc.InferenceServiceStub(channel).GetModel(pb.GetModelRequest()).name == "my model"


class TestWithoutWorkers:
    def test_requests_are_refused_quickly(self):
        with start_stack(workers=0) as running, running.channel() as channel:
            stub = rpc.InferenceServiceStub(channel)
            begun = time.monotonic()
            failure = failure_at(channel, ids_request([1]))
            assert time.monotonic() - begun < 1.0
            assert (failure.code, failure.reason, failure.retry_ms) == (UNAVAILABLE, "NO_WORKER", 1000)
            bad = failure_at(channel, ids_request([1], max_tokens=0))
            assert bad.field == "stopping.max_tokens"
            # What needs no worker is answered.
            assert stub.Tokenize(pb.TokenizeRequest(text="hi")).token_ids
            model = stub.GetModel(pb.GetModelRequest())
            assert (model.ready_groups, model.max_model_len) == (0, 0)
            # A worker that comes later is all it takes.
            running.start_worker("late")
            running.wait_ready(1)
            assert generate(channel, ids_request([1], max_tokens=3)).done

    def test_the_command_says_once_to_try_again(self):
        with start_stack(workers=0) as running:
            done = baton("generate", "hi", "--address", running.address)
            assert_one_clear_line(done, "no worker has been ready yet (try again in 1 s)")

    def test_a_stream_whose_worker_was_lost_waits_for_another_only_so_long(self):
        with (
            start_stack(worker_args=("--step-us=2000",), scheduler_args=("--worker-wait-s=0.5",)) as running,
            running.channel() as channel,
        ):
            call = rpc.InferenceServiceStub(channel).Generate(
                ids_request([1], max_tokens=3000, ignore_eos=True)
            )
            next(call)
            running.workers.pop("group-0").kill()
            begun = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert 0.3 < time.monotonic() - begun < 5.0
            failure = failure_of(caught.value)
            assert (failure.code, failure.reason, failure.retry_ms) == (UNAVAILABLE, "NO_WORKER", 1000)


def has_settled(stack, requests):
    """Two run, the others wait."""
    state = stack.state()
    return (state["requests"], state["groups"]["group-0"]["waiting"]) == (requests, max(0, requests - 2))


class TestWorkers:
    def test_killed_and_restarted(self):
        """Streams pause and go on, without a gap, a repetition or a wrong token."""
        arguments = ("--step-us=2000", "--max-num-seqs=6")
        requests = [ids_request([n + 1] * 30, seed=n, max_tokens=300, ignore_eos=True) for n in range(8)]
        with start_stack(worker_args=arguments) as running, running.channel() as channel:
            stub = rpc.InferenceServiceStub(channel)
            calls = [stub.Generate(request) for request in requests]
            streams = [[next(call)] for call in calls[:6]] + [[], []]
            for _ in range(2):
                time.sleep(0.1)
                running.workers["group-0"].kill()
                running.start_worker("group-0", *arguments)
                running.wait_ready(1)
            for request, call, events in zip(requests, calls, streams, strict=True):
                events += call
                assert events.pop().WhichOneof("event") == "finish"
                tokens = [token for event in events for token in event.delta.token_ids]
                assert tokens == expected([*request.token_ids.ids], request, stop_id=None).tokens
            running.wait_idle()

    def test_one_of_two_killed(self):
        """The other takes its streams over."""
        arguments = ("--step-us=2000", "--max-num-seqs=16")
        requests = [ids_request([n + 1] * 30, seed=n, max_tokens=200, ignore_eos=True) for n in range(12)]
        with start_stack(workers=2, worker_args=arguments) as running, running.channel() as channel:
            stub = rpc.InferenceServiceStub(channel)
            calls = [stub.Generate(request) for request in requests]
            streams = [[next(call)] for call in calls]
            running.workers.pop("group-1").kill()
            for request, call, events in zip(requests, calls, streams, strict=True):
                events += call
                tokens = [token for event in events for token in event.delta.token_ids]
                assert tokens == expected([*request.token_ids.ids], request, stop_id=None).tokens
            running.wait_idle()

    def test_numerical_end(self):
        with start_stack(worker_args=("--numerical-every=40",)) as running, running.channel() as channel:
            call = rpc.InferenceServiceStub(channel).Generate(
                ids_request([1], max_tokens=3000, ignore_eos=True)
            )
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            failure = failure_of(caught.value)
            assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL, "NUMERICAL")
            running.wait_idle()

    def test_a_full_queue(self):
        arguments = ("--step-us=5000", "--max-num-seqs=2")
        with start_stack(worker_args=arguments, scheduler_args=("--max-queue=3",)) as running:
            with running.channel() as channel:
                stub = rpc.InferenceServiceStub(channel)
                calls = []
                for n in range(5):
                    calls.append(stub.Generate(ids_request([n + 1], max_tokens=3000, ignore_eos=True)))
                    wait_until(partial(has_settled, running, n + 1), why="its place in the queue")
                failure = failure_at(channel, ids_request([9], max_tokens=3))
                assert failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert (failure.reason, failure.retry_ms) == ("QUEUE_FULL", 1000)
                for call in calls:
                    call.cancel()
            running.wait_idle()


class TestDeath:
    @pytest.mark.parametrize("part", ["core", "frontend"])
    def test_of_a_part_ends_the_service(self, part):
        with start_stack() as running:
            core, frontend = parts_of(running)
            os.kill(running.pid(part), signal.SIGKILL)
            assert running.scheduler.wait(5.0) == 70
            assert f"the {part} was killed by SIGKILL; the service ends with it" in running.scheduler.err
            assert not is_running(core)
            assert not is_running(frontend)

    def test_of_the_supervisor_ends_the_parts(self):
        with start_stack() as running:
            parts = parts_of(running)
            running.scheduler.kill()
            wait_until(lambda: not any(map(is_running, parts)), 5.0, why="the parts' end")
            assert " INFO baton.core: stopped: its supervisor is gone\n" in running.scheduler.err


class TestQuestion:
    @pytest.mark.parametrize("module", ["scheduler_svc", "gpu_worker"])
    def test_sigusr1_does_not_end_what_is_still_loading(self, module):
        """Asked as soon as the interpreter runs the module, and for as long as it loads."""
        command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        for line in process.stderr:  # a line for each import that is done
            if line.split()[-1] == b"argparse":
                process.send_signal(signal.SIGUSR1)
        assert process.wait(30) == 0

    def test_sigusr1_harms_no_part(self):
        """The core answers it; to the others it is nothing, from the start on."""
        with start_stack(workers=0) as running:
            for pid in (running.scheduler.process.pid, running.pid("frontend")):
                os.kill(pid, signal.SIGUSR1)
            running.start_worker("late")
            running.wait_ready(1)
            assert running.state()["groups"].keys() == {"late"}
            assert running.scheduler.process.poll() is None


class TestPause:
    @pytest.mark.parametrize("part", ["core", "frontend"])
    def test_streams_go_on(self, part):
        """A part that stands still for a while: nothing is lost, nothing comes twice."""
        requests = [ids_request([n + 1] * 9, seed=n, max_tokens=400, ignore_eos=True) for n in range(6)]
        with start_stack(worker_args=("--step-us=2000",)) as running, running.channel() as channel:
            stub = rpc.InferenceServiceStub(channel)
            calls = [stub.Generate(request) for request in requests]
            streams = [[next(call)] for call in calls]
            os.kill(running.pid(part), signal.SIGSTOP)
            if part == "core":
                wait_until(lambda: not running.serving(), 2.0, why="the truth about a core that is silent")
            else:
                time.sleep(1.5)
            os.kill(running.pid(part), signal.SIGCONT)
            for request, call, events in zip(requests, calls, streams, strict=True):
                events += call
                tokens = [token for event in events for token in event.delta.token_ids]
                assert tokens == expected([*request.token_ids.ids], request, stop_id=None).tokens
            assert running.serving()


class TestDrain:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_running_streams_finish(self, number):
        arguments = ("--step-us=2000",)
        request = ids_request([1, 2], seed=4, max_tokens=400, ignore_eos=True)
        with start_stack(worker_args=arguments, scheduler_args=("--drain-grace-s=20",)) as running:
            with running.channel() as channel:
                call = rpc.InferenceServiceStub(channel).Generate(request)
                events = [next(call)]
                running.scheduler.signal(number)
                wait_until(lambda: not running.serving(), why="not serving")
                failure = failure_at(channel, ids_request([1]))
                assert (failure.code, failure.reason, failure.retry_ms) == (UNAVAILABLE, "DRAINING", 1000)
                events += call
            tokens = [token for event in events for token in event.delta.token_ids]
            assert tokens == expected([1, 2], request, stop_id=None).tokens
            assert running.scheduler.wait() == 0

    def test_streams_beyond_the_grace_are_told(self):
        request = ids_request([1, 2], max_tokens=4000, ignore_eos=True)
        with start_stack(worker_args=("--step-us=2000",), scheduler_args=("--drain-grace-s=0.3",)) as running:
            with running.channel() as channel:
                call = rpc.InferenceServiceStub(channel).Generate(request)
                next(call)
                running.scheduler.signal(signal.SIGTERM)
                with pytest.raises(grpc.RpcError) as caught:
                    list(call)
            failure = failure_of(caught.value)
            assert (failure.code, failure.reason) == (UNAVAILABLE, "DRAINING")
            assert running.scheduler.wait() == 0

    def test_a_second_signal_ends_at_once(self):
        slow, patient = ("--step-us=2000",), ("--drain-grace-s=60",)
        with start_stack(worker_args=slow, scheduler_args=patient) as running, running.channel() as channel:
            request = ids_request([1], max_tokens=4000, ignore_eos=True)
            call = rpc.InferenceServiceStub(channel).Generate(request)
            next(call)
            running.scheduler.signal(signal.SIGINT)
            wait_until(lambda: not running.serving(), why="draining")
            running.scheduler.signal(signal.SIGINT)
            assert running.scheduler.wait(5.0) == 0
            with pytest.raises(grpc.RpcError):
                list(call)

    def test_without_streams_it_is_quick(self):
        with start_stack() as running:
            begun = time.monotonic()
            running.scheduler.signal(signal.SIGTERM)
            assert running.scheduler.wait() == 0
            assert time.monotonic() - begun < 3.0
            assert " INFO baton.core: stopped: told to\n" in running.scheduler.err


def test_every_part_logs_alike_and_from_the_level_asked_for():
    with start_stack() as running:
        assert " INFO baton.core: group " in running.scheduler.err
    with start_stack(scheduler_args=("--log-level=warning",)) as running:
        assert running.scheduler.err == ""


def test_the_scheduler_loads_no_torch():
    """Neither of its processes, whatever their imports drag in."""
    with start_stack() as running, running.channel() as channel:
        generate(channel, pb.GenerateRequest(text="hello", stopping=pb.Stopping(max_tokens=2)))
        for pid in (running.scheduler.process.pid, *parts_of(running)):
            assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
