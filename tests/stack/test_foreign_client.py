"""`buf curl`, a client that knows nothing of ours but what reflection tells it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.calls import expected, ids_request
from tests.support.stack import SERVICE

BUF = Path(sys.executable).with_name("buf")
HEALTH_LIST = """\
syntax = "proto3";
package grpc.health.v1;
message HealthListRequest {}
message HealthCheckResponse {
  enum ServingStatus { UNKNOWN = 0; SERVING = 1; NOT_SERVING = 2; SERVICE_UNKNOWN = 3; }
  ServingStatus status = 1;
}
message HealthListResponse { map<string, HealthCheckResponse> statuses = 1; }
service Health { rpc List(HealthListRequest) returns (HealthListResponse); }
"""

pytestmark = pytest.mark.skipif(not BUF.exists(), reason="buf is not installed")


@pytest.fixture
def curl(stack):
    def run(path, data=None, *options):
        command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *options]
        body = [] if data is None else ["--data", json.dumps(data)]
        return subprocess.run(
            [*command, *body, f"http://{stack.address}{path}"], capture_output=True, text=True, timeout=30
        )

    return run


def events_of(output):
    """The JSON documents, one after the other."""
    decoder, events, place = json.JSONDecoder(), [], 0
    while (place := place + len(output[place:]) - len(output[place:].lstrip())) < len(output):
        event, place = decoder.raw_decode(output, place)
        events.append(event)
    return events


@pytest.mark.parametrize("version", ["grpc-v1", "grpc-v1alpha"])
def test_lists_and_describes(curl, version):
    options = (f"--reflect-protocol={version}",)
    listed = curl("", None, *options, "--list-methods")
    assert listed.returncode == 0, listed.stderr
    assert f"{SERVICE}/Generate" in listed.stdout.split()
    assert "grpc.health.v1.Health/Check" in listed.stdout.split()
    services = curl("", None, *options, "--list-services")
    assert set(services.stdout.split()) == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    called = curl(f"/{SERVICE}/GetModel", {}, *options)
    assert json.loads(called.stdout)["readyGroups"] == 2


def test_generate(curl):
    data = {
        "tokenIds": {"ids": [1, 2]},
        "sampling": {"seed": "5"},
        "stopping": {"maxTokens": 30, "ignoreEos": True},
    }
    done = curl(f"/{SERVICE}/Generate", data)
    assert done.returncode == 0, done.stderr
    *deltas, last = events_of(done.stdout)
    tokens = [token for event in deltas for token in event["delta"]["tokenIds"]]
    assert tokens == expected([1, 2], ids_request([1, 2], seed=5, max_tokens=30, ignore_eos=True)).tokens
    assert last["finish"]["reason"] == "FINISH_REASON_LENGTH"
    assert last["finish"]["usage"] == {"promptTokens": 2, "completionTokens": 30}


def test_errors_are_readable(curl):
    done = curl(f"/{SERVICE}/Generate", {"text": "x", "sampling": {"topP": 2}})
    assert done.returncode != 0
    error = json.loads(done.stderr)
    assert (error["code"], error["message"]) == ("invalid_argument", "sampling.top_p: 2 is not in [0, 1]")
    assert [detail["type"] for detail in error["details"]] == [
        "google.rpc.ErrorInfo",
        "google.rpc.BadRequest",
    ]


def test_health(curl):
    for service in ("", SERVICE):
        done = curl("/grpc.health.v1.Health/Check", {"service": service})
        assert json.loads(done.stdout) == {"status": "SERVING"}


def test_health_list(curl, tmp_path):
    (tmp_path / "health.proto").write_text(HEALTH_LIST)
    done = curl("/grpc.health.v1.Health/List", {}, "--schema", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "statuses": {"": {"status": "SERVING"}, SERVICE: {"status": "SERVING"}}
    }
