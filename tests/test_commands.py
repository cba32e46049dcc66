"""The commands of `python -m jaxserve` as a table: what each says when asked, and what becomes of a wrong name."""

import pytest

from jaxserve.__main__ import COMMANDS, main
from jaxserve.api.batch_worker import ANSWERS
from jaxserve.batch_flags import ENDPOINTS
from jaxserve.flags import parse


def left_with(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str, str]:
    """-> exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


def test_help_names_every_command(capsys):
    code, out, _ = left_with(capsys, "--help")
    assert code == 0
    for name, command in COMMANDS.items():
        assert f"  {name}" in out and command.summary in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_within_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = left_with(capsys, command, "--help")
    assert code == 0 and not err
    assert out.startswith("usage: jaxserve")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(("given", "meant"), [("bacth", "batch"), ("server", "serve")])
def test_a_misspelt_command_is_told_its_name(given, meant, capsys):
    code, _, err = left_with(capsys, given)
    assert code == 2 and f"did you mean {meant}?" in err


def test_what_is_no_command_is_taken_for_a_model_without_its_flag(capsys):
    code, _, err = left_with(capsys, "some/folder")
    assert code == 2 and "--model some/folder" in err


def test_serve_takes_the_model_first_as_vllm_does(monkeypatch, capsys):
    from jaxserve import launch

    seen = []
    monkeypatch.setattr(launch, "launch", lambda options: seen.append(options) or 0)
    for argv in (("serve", "some/folder", "--port", "1"), ("serve", "--model", "some/folder", "--port", "1")):
        assert left_with(capsys, *argv)[0] == 0
    assert seen == [parse(["--model", "some/folder", "--port", "1"])] * 2


def test_the_batch_command_names_the_endpoints_that_batches_have():
    assert set(ENDPOINTS) == set(ANSWERS)
