"""The command line as a whole: one line and exit code 2 for every user error."""

import re

import pytest

from compose.app.cli import COMMANDS, main


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", shown, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[command][1].split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"lora-compose \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    "argv",
    [
        ["generat"],
        ["generate"],
        ["generate", "--prompt", "a dog", "--steps", "many"],
        ["generate", "--prompt", "a", "--nope"],
        [],
    ],
)
def test_errors_of_the_parser_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("compose: ")
    assert shown.count("\n") == 1


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    import compose.app.doctor

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compose.app.doctor, "run", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "compose: stopped\n"
