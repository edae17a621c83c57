"""`python -m demo`: what it refuses, in one line and with the right exit code, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from demo.__main__ import _options, _parser, main
from vlm.console import run_command


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run_command(main, argv)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    return captured.err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "board.local"])
def test_other_machines_need_a_login(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert "--auth user:password" in refused(capsys, "--host", host)


def test_a_public_link_needs_a_login(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--auth user:password" in refused(capsys, "--share")


def test_an_open_door_must_be_asked_for_and_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--host", "0.0.0.0", "--no-auth"], ["--share", "--no-auth"]):
        options = _options(_parser().parse_args(argv))
        assert options.auth is None
        assert "WITHOUT a login" in capsys.readouterr().err
    options = _options(_parser().parse_args(["--host", "0.0.0.0", "--auth", "a:b"]))
    assert options.auth == ("a", "b")
    assert "not encrypted" in capsys.readouterr().err
    _options(_parser().parse_args([]))
    assert capsys.readouterr().err == ""


def test_a_login_and_an_open_door_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert "exclude each other" in refused(capsys, "--auth", "a:b", "--no-auth")


@pytest.mark.parametrize("auth", ["user", "user:", ":password", ""])
def test_half_a_login_is_refused(capsys: pytest.CaptureFixture[str], auth: str) -> None:
    assert "--auth needs both parts" in refused(capsys, "--auth", auth)


def test_a_port_that_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert "70000" in refused(capsys, "--port", "70000")


def test_no_such_artefact(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "neither an artefact" in refused(capsys, str(tmp_path / "none"))


def test_nothing_to_show(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "python -m distill" in refused(capsys)


def test_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--help" in refused(capsys, "--colour")


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(main, ["--help"])
    assert ended.value.code == 0
    assert "example: python -m demo" in capsys.readouterr().out
