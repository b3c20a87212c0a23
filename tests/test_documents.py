"""The documents say what is so: commands parse, recipes load, paths exist, and the README's example runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from orchestrator import cli
from orchestrator.artifacts import Checkpoint
from orchestrator.recipe import load, parse, shipped
from orchestrator.run import execute, prepare
from orchestrator.store import Store

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/cluster.md", "docs/search.md")
# what every Linux has at the top; any other absolute path in the repository is somebody's own machine
COMMON = set("bin boot dev etc lib lib64 lost+found media mnt opt proc run sbin srv sys tmp usr var".split())


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)


def words_of(line: str) -> list[str]:
    """A shell line's words up to a redirection or pipe, without leading assignments such as PYTHONPATH=. ."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    ends = [place for place, word in enumerate(words) if word in (">", "|", "&&")]
    return words[: ends[0]] if ends else words


def commands() -> Iterator[tuple[str, ...]]:
    """The arguments of every `orchestrator ...` in a shell block or between backticks."""
    for document in DOCUMENTS:
        lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
        lines += re.findall(r"`(orchestrator [^`]+)`", text_of(document))
        yield from (tuple(words[1:]) for words in map(words_of, lines) if words[:1] == ["orchestrator"])


COMMANDS = sorted(set(commands()))


def parsed(arguments: tuple[str, ...]) -> tuple[str, dict]:
    """(command, its parameters) as the real command line reads them; raises click's error for what it refuses."""
    group = typer.main.get_command(cli.app)
    name, *rest = arguments
    assert name in group.commands, f"orchestrator {name}: no such command; there are {', '.join(group.commands)}"
    return name, group.commands[name].make_context(name, list(rest)).params


def test_the_documents_show_the_commands_that_a_first_day_needs():
    shown = {arguments[0] for arguments in COMMANDS}
    assert shown >= set("run plan doctor status show labels predict tune recipes methods ui sync".split())


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_command_in_the_documents_is_one_that_the_command_line_takes(arguments):
    name, given = parsed(arguments)
    if name in ("run", "plan", "tune") and not given["recipe"].endswith(".yaml"):
        data = [f"data.{split}={given[split]}" for split in ("labelled", "unlabelled", "test") if given[split]]
        assert load(given["recipe"], [*data, *(given["overrides"] or [])]).nodes


def test_an_option_or_command_that_does_not_exist_would_be_found():
    with pytest.raises(Exception, match="--unlabeled"):
        parsed(("run", "quickstart", "--unlabeled", "photos"))
    with pytest.raises(AssertionError, match="no such command"):
        parsed(("train", "quickstart"))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_in_a_document_exists(document):
    text = text_of(document)
    found = set(
        re.findall(r"(?<![\w/.])((?:methods|orchestrator|tune_spaces|tests|docs|benchmarks|\.ci)/[\w./-]*[\w/])", text)
    )
    found |= {f"{ROOT / document}/../{target}" for target in re.findall(r"\]\(([^)#:]+)\)", text)}
    if document != "README.md":  # which names files of the reader's own, such as rotation.py
        found |= set(re.findall(r"(?<![\w/.-])([\w-]+\.(?:py|md|toml))(?!\w)", text))
    assert len(found) > 1
    assert [path for path in sorted(found) if not Path(ROOT / path).resolve().exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS[1:])
def test_what_a_document_says_a_file_holds_is_there(document):
    missing = []
    for path, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, then |, )?)+)", text_of(document)):
        source = (ROOT / path).read_text(encoding="utf-8")
        known = set(re.findall(r"^ *(?:def|class) (\w+)", source, re.MULTILINE))
        missing += [(path, name) for name in re.findall(r"`(\w+)`", names) if name not in known]
    assert missing == []


def test_every_make_target_in_the_documents_exists():
    everything = "\n".join(map(text_of, DOCUMENTS))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", everything, re.MULTILINE))
    assert named and named <= set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))


def test_the_readme_has_a_row_for_every_shipped_recipe_and_no_other():
    table = text_of("README.md").partition("| recipe |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == set(shipped())


@pytest.fixture
def example(untracked, tmp_path, monkeypatch):
    """The README's method, importable as a user's own module, and its recipe."""
    (method,), (recipe,) = blocks("README.md", "python"), blocks("README.md", "yaml")
    (tmp_path / "rotation.py").write_text(method, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield recipe
    sys.modules.pop("rotation", None)


def test_the_method_in_the_readme_trains_from_its_recipe_and_is_judged(example, tmp_path):
    trainings = ("pretrain", "baseline", "finetuned")
    short = [f"stages.{stage}.{field}" for stage in trainings for field in ("steps=3", "batch=8")]
    recipe = parse(example, label="rotation.yaml", overrides=[*short, "resources.threads=1"])
    result = execute(prepare(recipe, tmp_path / "store", label="rotation"), use_ray=False)
    assert {stage["name"]: stage["state"] for stage in result.stages} == dict.fromkeys(
        ("pretrain", "baseline", "finetuned", "verdict"), "ran"
    )
    digest = {stage["name"]: stage["digest"] for stage in result.stages}
    assert result.verdict is not None and digest["finetuned"] != digest["baseline"]  # which differ in `init` alone
    pretrained = Store.open(tmp_path / "store").open_artifact(result.stages[0]["key"])
    assert isinstance(pretrained, Checkpoint) and type(pretrained.build()).__module__ == "rotation"
    assert "rotation_accuracy" in pretrained.curves()["name"].to_pylist()


def test_nothing_in_the_repository_names_a_place_on_somebodys_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout: which files belong to the project is not known")
    places = {entry.name for entry in Path("/").iterdir() if entry.is_dir()} - COMMON | {"home", "Users", "root"}
    own = re.compile(rf"(?<![\w.~}}/*)>-])/(?:{'|'.join(sorted(map(re.escape, places)))})/\w|[A-Z]:\\Users\\")
    home = "home"  # not spelled out behind a slash, or this file would name such a place itself
    assert own.search(f'open("/{home}/ada/x")')
    assert not own.search(f"STORE/{home}/x {{store}}/{home}/x https://a.org/{home}/x")
    found = []
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and path.is_file() and name != "tests/test_documents.py":
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if own.search(line)]
    assert found == []
