"""The command line: a thin skin that parses, calls, prints. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.errors import UserError, nearest

if TYPE_CHECKING:
    from orchestrator.recipe import Recipe

_STARTED = time.perf_counter()

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn a small labelled image set and a large unlabelled one into the best model they can give.\n\n"
         "Start with `orchestrator run quickstart`, then `orchestrator doctor FOLDER` and\n"
         "`orchestrator run noisy-student --labelled FOLDER --unlabelled FOLDER`.",
)  # fmt: skip

StoreOption = Annotated[
    Path, typer.Option("--store", help="Folder of all results; made when missing.", envvar="ORCHESTRATOR_STORE")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Any field of the recipe, e.g. seeds=3 or stages.teacher.steps=200"),
]
AddressOption = Annotated[
    str,
    typer.Option(
        help="The cluster's job server, such as http://127.0.0.1:8265 through a tunnel.",
        envvar="RAY_API_SERVER_ADDRESS",
    ),
]
TokenOption = Annotated[
    Path | None,
    typer.Option(
        "--token", metavar="FILE", envvar="RAY_AUTH_TOKEN_PATH",
        help="File with the cluster's token; on the head it is ~/.ray/auth_token.",
    ),
]  # fmt: skip
DEFAULT_STORE = Path("orchestrator-store")


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _quoted(text: str) -> str:
    """Text as YAML that reads back as it is; not as JSON, whose surrogate pairs YAML does not join."""
    return '"' + re.sub(r"[^ !#-\[\]-~]", lambda found: f"\\U{ord(found[0]):08X}", text) + '"'


def _load(
    recipe: str, overrides: list[str] | None, labelled: str | None, unlabelled: str | None, test: str | None
) -> Recipe:
    from orchestrator.recipe import load

    given = {"labelled": labelled, "unlabelled": unlabelled, "test": test}
    flags = [f"data.{name}={_quoted(value)}" for name, value in given.items() if value is not None]
    return load(recipe, [*flags, *(overrides or [])])


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name (`orchestrator recipes`) or a YAML file.")],
    overrides: Overrides = None,
    labelled: Annotated[
        str | None, typer.Option(help="Labelled images: class folders, Parquet, a manifest ...")
    ] = None,
    unlabelled: Annotated[str | None, typer.Option(help="Unlabelled images: a folder, Parquet, a manifest ...")] = None,
    test: Annotated[
        str | None, typer.Option(help="Labelled test images; left out, a fifth of the labelled ones.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe to its verdict. Ctrl-C stops cleanly; the same command goes on where it was."""
    from orchestrator.context import Interrupted
    from orchestrator.display import Display
    from orchestrator.run import execute, prepare

    checked = _load(recipe, overrides, labelled, unlabelled, test)
    display = Display(sys.stderr if as_json else sys.stdout)
    prepared = prepare(checked, store, label=recipe, progress=display.reading)
    display.line(f"run {prepared.name}")
    display.notices(prepared)
    with _answer_alone(as_json), _stop_on_interrupt(prepared.folder / "stop", display), display.watch(prepared):
        try:
            result = execute(prepared, started=_STARTED, notice=display.notice, finished=display.finished)
        except Interrupted:
            display.close()
            display.line("Stopped. Everything done is kept; the same command goes on where it was.")
            raise typer.Exit(130) from None
    display.result(prepared, result)
    if as_json:
        _print_json(result.json())


@contextlib.contextmanager
def _answer_alone(as_json: bool) -> Iterator[None]:
    """With JSON, all else goes to stderr: Ray's threads print of lost workers and nodes until Ray ends."""
    if not as_json:
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            if "ray" in sys.modules:
                from orchestrator.cluster.connect import leave

                leave()


@contextlib.contextmanager
def _stop_on_interrupt(stop: Path, display: Any) -> Iterator[None]:
    """The first Ctrl-C asks every process to stop after its step, the second one ends this process.

    So does SIGTERM, by which Ray's jobs, Kubernetes and schedulers ask a process to end.
    """
    second: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def ask(number: int, frame: Any) -> None:
        for one, handler in second.items():
            signal.signal(one, handler)
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()
        display.notice("stopping after this step; Ctrl-C again quits at once")

    before = {one: signal.signal(one, ask) for one in second}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    overrides: Overrides = None,
    labelled: Annotated[str | None, typer.Option(help="Labelled images.")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="Unlabelled images.")] = None,
    test: Annotated[str | None, typer.Option(help="Labelled test images.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """What would run: the stages, what is stored already and why the rest is not, steps, images. Trains nothing."""
    from orchestrator.display import Display, plan_rows

    checked = _load(recipe, overrides, labelled, unlabelled, test)
    from orchestrator.run import prepare

    display = Display(sys.stderr if as_json else sys.stdout)
    prepared = prepare(checked, store, label=recipe, progress=display.reading)
    rows = plan_rows(prepared)
    if as_json:
        _print_json({"recipe": checked.name, "run": prepared.name, "store": str(prepared.store.root), "stages": rows,
                     "data": prepared.data[0].describe()})  # fmt: skip
        return
    display.notices(prepared)
    display.plan(rows)


@app.command()
def tune(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name (`orchestrator recipes`) or a YAML file.")],
    overrides: Overrides = None,
    space: Annotated[
        list[str] | None,
        typer.Option(help="Ranges shipped for a method or pipeline, such as fixmatch; left out, what fits the recipe."),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH=RANGE", help="One more range, such as stages.model.optim.lr='loguniform(0.01, 1)'."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="STAGE.FACT", help="What trials are compared by; left out, the Judge's or last Probe's."),
    ] = None,
    mode: Annotated[str, typer.Option(help="max or min.")] = "max",
    trials: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    budget: Annotated[
        str | None, typer.Option(help="At most so long: 90s, 30m, 2h; or so many GPU-hours: 4gpuh.")
    ] = None,
    concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at once; left out, as many as there is room for.")
    ] = None,
    search: Annotated[str, typer.Option(help="tpe (Optuna), random or grid.")] = "tpe",
    stop: Annotated[
        str, typer.Option(help="asha ends trials that fall behind during training; none lets all end.")
    ] = "asha",
    confirm: Annotated[
        int, typer.Option(min=0, help="Seeds on which the best is held against the default after the search.")
    ] = 3,
    held_out: Annotated[
        float, typer.Option("--holdout", help="Share of the labelled images that judges trials, without data.holdout.")
    ] = 0.2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be searched, and train nothing.")] = False,
    labelled: Annotated[str | None, typer.Option(help="Labelled images.")] = None,
    unlabelled: Annotated[str | None, typer.Option(help="Unlabelled images.")] = None,
    test: Annotated[str | None, typer.Option(help="Labelled test images.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """Search over a recipe, on a hold-out. Ctrl-C stops cleanly; the same command goes on where it was."""
    for name, value, known in (
        ("mode", mode, ("max", "min")), ("search", search, ("tpe", "random", "grid")), ("stop", stop, ("asha", "none"))
    ):  # fmt: skip
        if value not in known:
            raise UserError(f"--{name} {value}: must be {' or '.join(known)}{nearest(value, known)}")
    if not 0 < held_out < 1:
        raise UserError(f"--holdout {held_out:g}: must be above 0 and below 1, a share of the labelled images")
    from orchestrator.context import Interrupted
    from orchestrator.display import Display
    from orchestrator.search.display import line, show_search, watch_search
    from orchestrator.search.question import make_search, read_budget
    from orchestrator.search.run import execute_search, prepare_search

    limits = read_budget(trials, budget)
    checked = _load(recipe, overrides, labelled, unlabelled, test)
    display = Display(sys.stderr if as_json else sys.stdout)
    made, notes = make_search(
        checked, label=recipe, names=space or (), params=param or (), metric=metric, mode=mode,  # type: ignore[arg-type]
        algorithm=search, stop=stop, fraction=held_out,  # type: ignore[arg-type]
    )  # fmt: skip
    prepared = prepare_search(
        checked, store, made, budget=limits, concurrent=concurrent, confirm=confirm, notes=tuple(notes),
        progress=display.reading,
    )  # fmt: skip
    display.close()
    for text in (*prepared.lines(), *(f"  {notice}" for notice in prepared.data.notices)):
        display.line(text)
    if dry_run:
        if as_json:
            _print_json(prepared.json())
        return
    with (
        _answer_alone(as_json),
        _stop_on_interrupt(prepared.folder / "stop", display),
        watch_search(display, prepared.folder),
    ):
        try:
            result = execute_search(
                prepared, notice=display.notice,
                finished=lambda trial: display.line(line(prepared.about(), trial)),
            )  # fmt: skip
        except Interrupted:
            display.line("Stopped. Everything done is kept; the same command goes on where it was.")
            raise typer.Exit(130) from None
    show_search(display, prepared.folder)
    if as_json:
        _print_json({**prepared.json(), "best_recipe": str(prepared.folder / "best.yaml"), "result": result})


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="A run, or the beginning of its name; left out, all runs.")] = None,
    store: StoreOption = DEFAULT_STORE,
    address: Annotated[
        str | None, typer.Option(help="Look on a cluster, at its job server, such as http://127.0.0.1:8265.")
    ] = None,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Where runs stand: stages, progress, seconds and how much of them was not training; or the jobs of a cluster."""
    if address is not None:
        _cluster_status(run, address, token, as_json)
        return
    from orchestrator.display import Display, status_rows
    from orchestrator.runs import read_head
    from orchestrator.search.display import status_line, trial_table
    from orchestrator.search.trials import is_search, read_trials

    folders = [_find_run(store, run, searches=True)] if run else _runs(store)
    heads = [read_head(folder) for folder in folders]
    if as_json:
        _print_json(
            [{**head, "stages": status_rows(store, folder)} for head, folder in zip(heads, folders, strict=True)]
        )
        return
    display = Display(sys.stdout)
    if not heads:
        display.line(f"no runs in {store}; start with `orchestrator run quickstart`")
    for head, folder in zip(heads, folders, strict=True):
        if is_search(head):
            trials = read_trials(folder)
            display.line(status_line(head, trials))
            if run is not None:
                display.console.print(trial_table(head["search"], trials))
            continue
        display.status(head, status_rows(store, folder), whole=run is not None)


def _cluster_status(run: str | None, address: str, token: Path | None, as_json: bool) -> None:
    """The runs sent to a cluster, or one of them with the end of what it wrote."""
    from orchestrator.cluster import submit as cluster

    client = cluster.open_client(address, token)
    found = [cluster.find(client, run)] if run else cluster.jobs(client)
    tail = cluster.log(client, found[0]).splitlines()[-20:] if run else []
    if as_json:
        _print_json([{**job.json(), **({"log": tail} if run else {})} for job in found])
        return
    if not found:
        print(f"no runs on {address}; send one with `orchestrator submit RECIPE --address {address}`")
    for line in (*cluster.lines(found), *(f"  {line}" for line in tail)):
        print(line)


@app.command()
def submit(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")],
    address: AddressOption,
    overrides: Overrides = None,
    labelled: Annotated[str | None, typer.Option(help="Labelled images, where the cluster's nodes see them.")] = None,
    unlabelled: Annotated[
        str | None, typer.Option(help="Unlabelled images, where the cluster's nodes see them.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Labelled test images, where the cluster's nodes see them.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Folder of all results, shared by all nodes; left out, the head's ORCHESTRATOR_STORE."),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of recipe and own classes to send; left out, this one, none for a shipped recipe."),
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A variable for the run's processes; no secrets.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print what the run writes until it ends.")] = False,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe on a Ray cluster. The same command finds the run that is there, and goes on with one that ended."""
    from orchestrator.cluster import submit as cluster

    checked = _load(recipe, overrides, labelled, unlabelled, test)
    cluster.check_places(checked, store)
    folder = cluster.working_directory(recipe, working_dir)
    environment = cluster.runtime_environment(folder, env or [])
    given = {"--labelled": labelled, "--unlabelled": unlabelled, "--test": test}
    flags = [word for name, value in given.items() if value is not None for word in (name, value)]
    client = cluster.open_client(address, token, same_version=True)
    command = cluster.entrypoint(recipe, [*(overrides or []), *flags], store)
    job, sent = cluster.send(client, checked, command, environment)
    say = sys.stderr if as_json else sys.stdout
    print(f"{'sent as' if sent else 'runs already as'} {job.id}", file=say)
    if follow:
        try:
            job = cluster.follow(client, job, lambda text: print(text, end="", file=say, flush=True))
        except KeyboardInterrupt:
            print(f"\nNot followed any more; the run goes on there. orchestrator stop {job.name} --address {address}"
                  " stops it.", file=say)  # fmt: skip
            raise typer.Exit(130) from None
    else:
        print(f"next    orchestrator status {job.name} --address {address}    orchestrator stop {job.name} "
              f"--address {address}", file=say)  # fmt: skip
    if as_json:
        _print_json({**job.json(), "sent": sent})
    if job.over:
        _end_as(job)


def _end_as(job: Any) -> None:
    """Exit as the run on the cluster did."""
    if job.state == "STOPPED":
        print(f"{job.id} was stopped; everything done is kept, the same command goes on", file=sys.stderr)
        raise typer.Exit(130)
    if job.state == "FAILED":
        if job.exit_code == 127:
            raise UserError(f"{job.id}: the head has no command `orchestrator`; install this package on every node, "
                            "as cluster.yaml does")  # fmt: skip
        if job.exit_code is None and job.message:
            print(f"error: {job.id}: {job.message}", file=sys.stderr)
        raise typer.Exit(job.exit_code if job.exit_code in (2, 130) else 1)


@app.command()
def stop(
    run: Annotated[str, typer.Argument(help="A run on the cluster, or the beginning of its name.")],
    address: AddressOption,
    token: TokenOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a run on a cluster after its step. Everything is kept; `submit` again goes on where it was."""
    from orchestrator.cluster import submit as cluster

    client = cluster.open_client(address, token)
    job = cluster.find(client, run)
    stopping = cluster.stop(client, job)
    if as_json:
        _print_json({**job.json(), "stopping": stopping})
    else:
        print(f"{job.id} {'stops after its step' if stopping else f'is over already: {job.state.lower()}'}")


@app.command()
def show(
    run: Annotated[
        str, typer.Argument(help="A run, or the beginning of its name; `latest` is the last one.")
    ] = "latest",
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """The numbers of a run: verdict, stages, probes, rounds; rebuilds its report from the store."""
    from orchestrator.display import Display, status_rows
    from orchestrator.report.html import write_report
    from orchestrator.run import RunResult
    from orchestrator.runs import read_head
    from orchestrator.search.display import show_search
    from orchestrator.search.trials import is_search, read_trials
    from orchestrator.store import Store

    folder = _find_run(store.absolute(), run, searches=True)
    opened = Store.open(store)
    head = read_head(folder)
    stages = status_rows(store, folder)
    report = str(write_report(opened, folder))
    if is_search(head):
        if as_json:
            trials = [asdict(trial) for trial in read_trials(folder)]
            _print_json({"search": folder.name, "store": str(opened.root), "report": report,
                         "question": head["search"], "trials": trials, "result": head["result"]})  # fmt: skip
        else:
            show_search(Display(sys.stdout), folder, head=head)
        return
    result = RunResult(folder.name, str(opened.root), report, head.get("verdict"), stages, head.get("comparison"))
    if as_json:
        _print_json(result.json())
        return
    Display(sys.stdout).show(head, result)


@app.command()
def labels(
    run: Annotated[
        str, typer.Argument(help="A run, or the beginning of its name; `latest` is the last one.")
    ] = "latest",
    round: Annotated[int | None, typer.Option(help="Round, from 0; left out, the last.")] = None,
    name: Annotated[str | None, typer.Option("--class", help="Only images the teacher takes for this class.")] = None,
    uncertain: Annotated[int | None, typer.Option(min=1, help="Only the N least confident.")] = None,
    kept: Annotated[
        bool | None, typer.Option("--kept/--left-out", help="Only images the student learned from, or not.")
    ] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only images of another class than in the round before, or --against.")
    ] = False,
    flips: Annotated[
        int | None, typer.Option(min=1, help="Only the N that changed class in the most rounds, with their history.")
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="What changed since the round before, or --against: class by class.")
    ] = False,
    against: Annotated[
        int | None, typer.Option(help="The round that --diff and --changed compare with.", metavar="ROUND")
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Write the images into this new folder by class, with labels.csv to correct.")
    ] = None,
    corrections: Annotated[
        list[Path] | None,
        typer.Option(help="Take a corrected labels.csv back; says how the next round uses it.", metavar="FILE"),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="Which of several stages, such as students.pseudo or seed-1/students.pseudo.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """The pseudo-labels of a run: who was taken for what, how surely, what came of it; what people say against it."""
    from orchestrator import ledger
    from orchestrator.store import Store

    shows = {"--diff": diff, "--export": export is not None, "--corrections": bool(corrections)}
    if sum(shows.values()) > 1:
        raise UserError(f"{' and '.join(name for name, given in shows.items() if given)}: give one of them")
    if against is not None and not (diff or changed):
        raise UserError(f"--against {against}: add --diff or --changed")
    folder = _find_run(store, run)
    opened = Store.open(store)
    book = ledger.open_ledger(opened, folder, stage)
    if corrections:
        review = ledger.take_back(book, corrections, round)
        _say(review.json() if as_json else review.lines)
        return
    number = book.number(round)
    other = book.before(number, against) if diff or changed else None
    before = book.labels(other).table() if other is not None else None
    table = ledger.filter_rows(
        book.labels(number).table(), name=name, uncertain=uncertain, kept=kept, before=before if changed else None
    )
    history: list[dict[str, Any]] = [{}] * len(table)
    if flips is not None:
        table, history = ledger.flipped(book.tables(), table, flips)
    if diff and before is not None and other is not None:
        found = ledger.compare(before, table)
        _say(
            {"round": number, "against": other, **found.json()}
            if as_json else ledger.difference_lines(found, book.title(number), other)
        )  # fmt: skip
    elif export is not None:
        count = ledger.export(opened, folder, book.labels(number), table, export)
        _say(
            {"round": number, "images": count, "folder": str(export)}
            if as_json else [f"{count} images of {book.title(number)} in {export}, with labels.csv"]
        )  # fmt: skip
    elif as_json:
        rows = table.drop_columns(["probabilities"]).to_pylist()
        _say({"round": number, "rows": [{**row, **more} for row, more in zip(rows, history, strict=True)]})
    elif flips is not None:
        _say(ledger.flip_lines(table, history, book.title(number)))
    else:
        _say(ledger.lines(table, book.title(number)))


def _say(answer: dict[str, Any] | Iterable[str]) -> None:
    """JSON of an object, or lines."""
    if isinstance(answer, dict):
        _print_json(answer)
        return
    for line in answer:
        print(line)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run, or the beginning of its name; `latest` is the last one.")],
    images: Annotated[list[Path], typer.Argument(help="Image files or folders of them.")],
    stage: Annotated[str | None, typer.Option(help="Which stage's model; left out, the final one.")] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: JsonOption = False,
) -> None:
    """What a run's model sees in images: class and confidence, one line an image."""
    from orchestrator.predict import predict_files
    from orchestrator.store import Store

    folder = _find_run(store, run)
    rows = predict_files(Store.open(store), folder, images, stage)
    if as_json:
        _print_json(rows)
    else:
        writer = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
        for row in rows:
            answer = [row["class"], f"{row['confidence']:.3f}"] if "class" in row else ["", row["error"]]
            writer.writerow([row["path"], *answer])
    if any("error" in row for row in rows):
        raise typer.Exit(1)


@app.command()
def doctor(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Folders, Parquet files, manifests.")],
    separator: Annotated[
        str | None, typer.Option(help="What divides several labels in a cell: , or ; or |, as in the recipe.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What is in these folders: kinds, counts, classes, sizes; what is broken, duplicated or leaking."""
    from orchestrator.data.doctor import inspect
    from orchestrator.display import Display

    display = Display(sys.stderr if as_json else sys.stdout)
    found = inspect(paths, separator=separator, progress=display.reading)
    display.close()
    if as_json:
        _print_json(found.json())
    else:
        for line in found.lines:
            print(line)
    if any(source.error for source in found.sources):
        raise typer.Exit(2)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe's YAML.")] = None, as_json: JsonOption = False
) -> None:
    """The shipped recipes, or one of them as YAML to start your own from."""
    import yaml

    from orchestrator.recipe import read_source, shipped

    if name is not None:
        print(read_source(name)[1], end="")
        return
    found = {key: str(yaml.safe_load(text).get("description", "")).strip() for key, text in shipped().items()}
    if as_json:
        _print_json([{"name": key, "description": text} for key, text in found.items()])
        return
    for key, text in found.items():
        print(f"{key}\n    {text}")


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="The page of this one: a class (SimCLR), a module (simclr) or a full path.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The methods and encoders a recipe may use, with paper, options and defaults; or one method's page."""
    from orchestrator.catalog import components, compositions, find

    found, page = find(name) if name is not None else ([*components(), *compositions()], None)
    if as_json:
        _print_json(found)
        return
    if page is not None:
        print(page, end="")
        return
    for component in found:
        how = f"use: {component['use']}" if component["use"] else f"see: orchestrator methods {component['name']}"
        print(f"{component['name']}  ({component['kind']}; {how})\n    {component['source']}")
        for option in component["options"]:
            print(
                f"    {option['name']}: {option['type']} = {option['default']}"
                + (f"   {option['doc']}" if option["doc"] else "")
            )
        print()


@app.command()
def ui(
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback opens it to the network.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
) -> None:
    """The MLflow UI on this store, to compare runs, rounds and stages."""
    from orchestrator.store import Store
    from orchestrator.tracking import serve

    raise typer.Exit(serve(Store.open(store).root, host, port))


@app.command()
def sync(store: StoreOption = DEFAULT_STORE) -> None:
    """Send to MLflow what a dead tracking server left behind."""
    from orchestrator.run import load_for_registry
    from orchestrator.runs import read_head
    from orchestrator.store import Store
    from orchestrator.tracking import send_all, tracking_uri

    opened = Store.open(store)
    late = []
    for folder in _runs(store):
        experiment = read_head(folder)["recipe"]
        late.append(send_all(folder, uri=tracking_uri(opened.root), experiment=experiment,
                             load_model=lambda key: load_for_registry(opened, key)))  # fmt: skip
    for line in filter(None, late):
        print(line)
    if any(late):
        raise typer.Exit(1)
    print(f"all records of {len(late)} runs are sent")


def _runs(store: Path) -> list[Path]:
    """Run folders, oldest first."""
    found = [path.parent for path in (store / "runs").glob("*/run.json")]
    return sorted(found, key=lambda folder: (folder / "run.json").stat().st_mtime)


def _find_run(store: Path, name: str, *, searches: bool = False) -> Path:
    """The folder of a run, or with `searches` of a search too, by the beginning of its name."""
    from orchestrator.runs import read_head
    from orchestrator.search.trials import is_search

    runs = _runs(store)
    if not searches:
        runs = [folder for folder in runs if not is_search(read_head(folder))]
    if not runs:
        raise UserError(f"store {store}: has no runs; start with `orchestrator run quickstart`, or give --store")
    if name == "latest":
        return runs[-1]
    found = [folder for folder in runs if folder.name.startswith(name)]
    names = [folder.name for folder in runs]
    if len(found) != 1:
        which = f"is the beginning of {', '.join(f.name for f in found)}" if found else "not in this store" + (
            nearest(name, names) or "; there are " + ", ".join(names))  # fmt: skip
        raise UserError(f"run {name}: {which}")
    return found[0]


def main() -> None:
    """Run a command. Exit codes: 0 done, 2 a mistake the user can mend, 130 stopped by Ctrl-C, 1 anything else."""
    sys.path.insert(
        0, os.getcwd()
    )  # a recipe may name classes of the user's own, beside it; Ray hands this on to workers
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped. Everything done is kept; the same command goes on where it was.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
