"""The command line: what it resolves to, and that wrong values are refused by name."""

from pathlib import Path

import pytest

from scheduler_svc import config
from scheduler_svc.config import ServiceConfig


def parse(*arguments):
    return config.parse(arguments, "scheduler_svc")


def test_arguments_round_trip():
    options = ServiceConfig(
        model="-odd name",
        listen="[::1]:0",
        run_dir=Path("/tmp/x y"),
        served_model_name="n",
        max_queue=3,
        worker_wait_s=0.25,
        default_max_tokens=7,
        drain_grace_s=0.0,
        log_level="debug",
    )
    assert parse(*options.arguments()) == options
    assert parse("--model=m") == ServiceConfig("m")


@pytest.mark.parametrize(
    ("argument", "complaint"),
    [
        ("--listen=50051", "--listen"),
        ("--listen=localhost:70000", "--listen"),
        ("--listen=::1:5", "--listen"),
        ("--max-queue=0", "--max-queue"),
        ("--max-queue=many", "--max-queue"),
        ("--default-max-tokens=-1", "--default-max-tokens"),
        ("--worker-wait-s=nan", "--worker-wait-s"),
        ("--drain-grace-s=inf", "--drain-grace-s"),
        ("--log-level=loud", "--log-level"),
        ("--model=", "--model"),
    ],
)
def test_wrong_values_name_the_option(capsys, argument, complaint):
    with pytest.raises(SystemExit) as caught:
        parse("--model=m", argument)
    assert caught.value.code == 2
    assert f"argument {complaint}" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for word in ("--run-dir", "gpu_worker", "baton: listening on", "SIGTERM", "Exit status"):
        assert word in text
