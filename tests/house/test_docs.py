"""The documentation: commands that parse, configs that load, links that lead somewhere, messages that are said."""

import ast
import re
import shlex

import pytest

from peftune.cli import parse
from peftune.config.load import load
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def fences(kind):
    return [pytest.param(text, id=f"{name}-{number}") for name, page in zip(NAMES, PAGES, strict=True)
            for number, (language, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")))
            if language == kind]


def commands(text):
    """The words after `peftune` of each line that begins with it, or with the script that trains."""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        words = shlex.split(line.partition(" > ")[0], comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:1] == ["peftune"]:
            yield words[1:]
        elif "peftune/train.py" in words:
            yield ["train", *words[words.index("peftune/train.py") + 1 :]]


@pytest.mark.parametrize("text", fences("bash"))
def test_every_command_parses(text, monkeypatch):
    monkeypatch.setattr("sys.argv", ["peftune"])
    for words in commands(text):
        parse(words)


@pytest.mark.parametrize("text", fences("yaml"))
def test_every_config_loads(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    load([str(path)])


@pytest.mark.parametrize("text", fences("python"))
def test_every_program_compiles(text):
    ast.parse(text)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_file_of_the_project_that_is_named_exists(page):
    ours = r"`((?:configs|docs|launch|tests|benchmarks|peftune)/[\w/.-]+\.\w+)`"
    assert not [name for name in re.findall(ours, page.read_text(encoding="utf-8")) if not (ROOT / name).exists()]


def test_every_message_of_the_troubleshooting_is_one_of_ours():
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "peftune").rglob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go on in the next line
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", table, flags=re.M)
    assert len(messages) > 8
    assert not [message for message in messages if not all(part in joined for part in message.split("…"))]
