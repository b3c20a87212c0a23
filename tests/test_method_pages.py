"""The pages of methods say what is so: a page for each, its options with their defaults, recipes that are valid."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from methods.views.policy import Augment
from methods.views.strong import StrongAugment
from orchestrator import cli
from orchestrator.catalog import components, compositions, pages
from orchestrator.component import validate
from orchestrator.recipe import parse, shipped
from orchestrator.stages.cluster import Cluster

ROOT = Path(__file__).parent.parent
PAGES = pages()
METHODS = [component for component in components() if component["kind"] == "method"]
DATA = """
name: page
data:
  pixels: 32
  labelled: {from: digits/train, per_class: 2}
  unlabelled: {from: digits/train, labels: false}
  test: digits/test
stages:
"""


def module_of(component: dict[str, Any]) -> str:
    return component["use"].split(".")[1]


def config_of(name: str, page: str) -> type:
    """The configuration that a heading "Options of NAME" is about."""
    shared = {"Augment": Augment, "StrongAugment": StrongAugment, "Cluster": Cluster}
    return shared[name] if name in shared else getattr(importlib.import_module(f"methods.{page}"), name).Config


def tables(page: str) -> dict[str, dict[str, tuple[str, str]]]:
    """{class: {option: (default, meaning)}} of a page's sections "Options of A and B"."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for heading, text in re.findall(r"^## Options of (.+)\n\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE):
        names = heading.split(" and ")
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        assert head == ["option", *(names if len(names) > 1 else ["default"]), "meaning"]
        for place, name in enumerate(names, start=1):
            found[name] = {row[0].strip("`"): (row[place].strip("`"), row[-1]) for row in rows}
            assert len(found[name]) == len(rows), f"{page}: an option of {name} has two rows"
    return found


TABLES = [(page, name) for page in PAGES for name in tables(page)]


@pytest.fixture
def printed(monkeypatch, capsys):
    """What `orchestrator ...` prints, and its errors."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["orchestrator", *arguments])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as end:
            assert end.code in (0, 2)
        return tuple(capsys.readouterr())

    return command


def test_every_method_has_a_page_and_every_page_is_a_methods_or_a_compositions():
    modules = {module_of(component) for component in METHODS}
    assert modules - set(PAGES) == set()
    assert set(PAGES) - modules == {"clusterfit", "knowledge_transfer"}


@pytest.mark.parametrize("component", METHODS, ids=lambda component: component["name"])
def test_a_page_names_the_class_its_options_and_the_papers_of_its_module(component):
    page = module_of(component)
    assert component["name"] in tables(page)
    papers = re.findall(r"arXiv:(\d{4}\.\d{5})", inspect.getdoc(importlib.import_module(f"methods.{page}")) or "")
    assert papers and [paper for paper in papers if f"arXiv:{paper}" not in PAGES[page]] == []


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_a_table_holds_every_option_in_order_and_a_recipe_that_writes_its_defaults_changes_nothing(page, name):
    table, config = tables(page)[name], config_of(name, page)
    fields = {field.name: field for field in dataclasses.fields(config) if field.init}
    assert list(table) == list(fields)
    for option, (default, meaning) in table.items():
        assert meaning, f"{page}: {option} has no meaning"
        if fields[option].default is dataclasses.MISSING:
            assert default == "required"
            continue
        needed = {key: 2 for key, (value, _) in table.items() if value == "required"}
        written = getattr(validate(config, needed | {option: yaml.safe_load(default)}), option)
        real = fields[option].default
        assert written == (pytest.approx(real, rel=2e-3) if isinstance(real, float) else real), option


def test_a_wrong_default_would_be_found(monkeypatch):
    monkeypatch.setitem(PAGES, "rotation", PAGES["rotation"].replace("| `all` |", "| `one` |"))
    with pytest.raises(AssertionError, match="turns"):
        test_a_table_holds_every_option_in_order_and_a_recipe_that_writes_its_defaults_changes_nothing(
            "rotation", "Rotation"
        )


@pytest.mark.parametrize("page", PAGES)
def test_the_recipe_in_a_page_is_valid(page):
    snippets = re.findall(r"^```yaml\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    assert snippets
    for snippet in snippets:
        text = DATA + "".join(f"  {line}\n" for line in snippet.splitlines())
        recipe = parse(text, label=f"{page}.md")
        assert [node.name for node in recipe.nodes] == list(yaml.safe_load(snippet))
        assert page in ("clusterfit", "knowledge_transfer") or f"methods.{page}." in snippet


@pytest.mark.parametrize("page", PAGES)
def test_a_recipe_that_a_page_names_is_shipped_and_uses_the_method(page):
    (line,) = re.findall(r"^Recipes?: (.*?)\n\n", PAGES[page], re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([a-z0-9-]+)`", line)) - {"soft"}
    use = f"methods.{page}." if any(module_of(component) == page for component in METHODS) else "stages.cluster.Cluster"
    assert named and [name for name in named if use not in shipped()[name]] == []
    if "all of them" in line:
        assert [name for name, text in shipped().items() if use not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_goes_wrong_when_to_use_it_and_where_it_was_measured_with_links_that_lead_somewhere(page):
    text = PAGES[page]
    assert "\n## What goes wrong\n\n- " in text and "\n## When to use it\n" in text
    last = " ".join(text.rstrip().rpartition("\n\n")[2].split())
    assert last == "Measured: see [docs/results.md](../results.md)." or (
        last.startswith("Measured: ") and "±" in last and last.endswith("See [docs/results.md](../results.md).")
    )
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / "methods" / target).exists(), target


def test_the_pages_in_docs_are_those_that_the_package_ships():
    in_docs = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert in_docs == PAGES
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    held = {path.stem for pattern in data["orchestrator"] for path in (ROOT / "orchestrator").glob(pattern)}
    assert set(in_docs) <= held


@pytest.mark.parametrize(
    ("asked", "page"),
    [
        ("simclr", "simclr"), ("SimCLR", "simclr"), ("methods.simclr", "simclr"), ("methods.simclr.SimCLR", "simclr"),
        ("JigsawPlus", "jigsaw"), ("nearbypatches", "patch_contrast"), ("patch_contrast", "patch_contrast"),
        ("noisy-student", "noisy_student"), ("clusterfit", "clusterfit"), ("knowledge-transfer", "knowledge_transfer"),
    ],
)  # fmt: skip
def test_a_page_is_printed_by_class_module_or_path(printed, asked, page):
    assert printed("methods", asked) == (PAGES[page], "")


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("SimCRL", "SimCLR"), ("rotatoin", "rotation"), ("clusterfti", "clusterfit"), ("methods.prl", "methods.pirl")],
)
def test_a_name_that_is_nearly_one_is_answered_with_it(printed, asked, hint):
    out, error = printed("methods", asked)
    assert out == "" and f"method {asked}: unknown; did you mean {hint}?" in error


def test_an_encoder_has_no_page_and_shows_its_options(printed):
    out, _ = printed("methods", "SmallCNN")
    assert out.startswith("SmallCNN  (encoder; use: methods.encoders.SmallCNN)") and "width: float = 1.0" in out


def test_json_gives_the_options_and_not_the_page(printed):
    found = yaml.safe_load(printed("methods", "jigsaw", "--json")[0])
    assert [component["name"] for component in found] == ["Jigsaw", "JigsawPlus"] and found[0]["options"]
    (composition,) = yaml.safe_load(printed("methods", "clusterfit", "--json")[0])
    assert composition["kind"] == "composition" and "arXiv:1912.03330" in composition["source"]


def test_the_list_names_the_compositions_and_how_to_read_about_them(printed):
    out, _ = printed("methods")
    for composition in compositions():
        assert f"\n{composition['name']}  (composition; see: orchestrator methods {composition['name']})\n" in out
