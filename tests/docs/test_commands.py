"""The settings in the commands of README and docs exist: they are parsed, nothing is run."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from lightning_modules.cli.run import main

ROOT = Path(__file__).resolve().parents[2]
OF_THE_READER = re.compile("there is no such file|No module named 'my_")
"""Errors about checkpoints, configs and classes which these pages suppose to be the reader's."""


def commands():
    """The different `imbsam` commands of all pages, as lists of arguments."""
    found = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["imbsam"] and words[1] != "report":
                    found.setdefault(tuple(words), pytest.param(words, id=f"{page.stem}-{len(found)}"))
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize("words", commands())
def test_it_is_parsed(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*words, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    errors = capsys.readouterr().err
    assert not ended.value.code or OF_THE_READER.search(errors), errors


def test_the_pages_have_commands():
    assert len(commands()) > 50
