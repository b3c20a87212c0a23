"""One run as one HTML file that asks nothing of the network: made from the store alone, again whenever it is wanted."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.report import compared, health, judgement, learning, record, searched
from orchestrator.report.content import Section
from orchestrator.report.gallery import Pictures
from orchestrator.report.reading import RunFacts, read_run
from orchestrator.search.trials import is_search
from orchestrator.store import Store, replace_file


def write_report(store: Store, folder: Path) -> Path:
    """Write `folder`/report.html of the run in `folder`; equal bytes for an equal store.

    A section that the run has no stage for is left out. Where the source images are gone so are the pictures, and a
    sentence says it.

    Raises:
        UserError: there is no such run, or a stored answer lost a file.
    """
    run = read_run(store, folder)
    sections = searched.sections(run, folder) if is_search(run.head) else sections_of(run, store)
    page = render(run, sections)
    path = folder / "report.html"
    replace_file(path, lambda part: part.write_text(page, encoding="utf-8", errors="replace"))
    return path


def sections_of(run: RunFacts, store: Store) -> list[Section]:
    """All sections of a run that have something to say, in order."""
    judges = judgement.judged(run)
    albums = learning.albums(run, judges)
    wanted = [picture.id for album in albums for picture in album.pictures]
    pictures = Pictures.open(store, run.recipe, next(iter(run.seeds)), wanted) if wanted else Pictures({})
    found = (
        judgement.verdict(run, judges), compared.comparison(run),
        judgement.rounds(run, judges), learning.curves(run), health.health(run), learning.ledger(run),
        judgement.classes(run, judges), judgement.calibration(run, judges),
        learning.galleries(albums, pictures, run.head["pixels"]), learning.probes(run), record.cost(run),
        record.data(run), record.reproduce(run),
    )  # fmt: skip
    return [section for section in found if section is not None]


def render(run: RunFacts, found: list[Section]) -> str:
    """The page. Everything but the figures' SVG, which matplotlib escaped, is escaped here."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["svg"] = Markup
    return environment.get_template("page.html.j2").render(run=run, head=run.head, sections=found)
