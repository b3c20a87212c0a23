"""Sections that keep the record: cost, data, and how the run is made again."""

from __future__ import annotations

from collections import Counter

from orchestrator.report import figures
from orchestrator.report.content import Block, Code, Figure, Lines, Section, Table, Text, percent
from orchestrator.report.reading import RunFacts


def cost(run: RunFacts) -> Section | None:
    """What did it cost?"""
    rows, bars = [], []
    several = len(run.seeds) > 1
    for seed, stages in run.seeds.items():
        for stage in stages:
            name = f"seed-{seed}/{stage.name}" if several else stage.name
            here, facts = stage.outcome, dict(stage.artifact.facts) if stage.artifact else {}
            seconds, computing = stage.manifest.get("seconds", 0.0), stage.manifest.get("computing", 0.0)
            images = facts.get("images_seen", facts.get("images"))
            counts = [f"{n:,}" if n is not None else "" for n in (facts.get("steps"), images, facts.get("parameters"))]
            known = [f"{seconds:.1f}", f"{computing:.1f}"] if stage.manifest else ["", ""]
            rows.append([name, stage.kind, stage.state, f"{here.get('seconds', 0.0):.1f}", *known, *counts])
            if stage.manifest and (not several or seed == next(iter(run.seeds))):
                bars.append((name, seconds, min(computing, seconds)))
    if not any(stage.outcome for stages in run.seeds.values() for stage in stages):
        return None
    header = ["stage", "kind", "state", "seconds in this run", "seconds when computed", "of these computing"]
    table = Table([*header, "steps", "images", "parameters"], rows, "lllrrrrrr",
                  "A stored stage was computed by an earlier run and cost this one nothing.")  # fmt: skip
    blocks: list[Block] = []
    if bars:
        names, seconds, computing = zip(*bars, strict=True)
        svg = figures.inside(names, seconds, computing, whole_name="whole stage", part_name="computing",
                             xlabel="seconds", value=[f"{s:.1f} s" for s in seconds], salt="cost")  # fmt: skip
        machines = sorted({s.manifest["machine"] for s in run.stages if s.manifest})
        blocks.append(Figure(svg, f"Seconds by stage when it was computed, on {', '.join(machines)}.", table))
    return Section("cost", "Cost", "What did it cost?", [*blocks, _total(run)])


def _total(run: RunFacts) -> Block:
    head = run.head
    if head.get("status") == "RUNNING" or "seconds" not in head:
        return Text("Total, start-up and overhead are known when the run has ended: `orchestrator show` adds them.")
    seconds = head["seconds"]
    names = (
        ("total", "from the command to the end"), ("start_up", "start-up, imports and data included"),
        ("computing", "training, labelling, probing, judging"), ("overhead", "the rest: storing, tracking, scheduling"),
    )  # fmt: skip
    rows = [[words, f"{seconds[name]:.1f}", percent(seconds[name] / seconds["total"])] for name, words in names]
    return Table(["this run", "seconds", "share"], rows, "lrr")


def data(run: RunFacts) -> Section | None:
    """Which images was this learned from?"""
    if not run.data:
        return None
    about = run.data[0]
    rows = []
    for name, split in about["splits"].items():
        counts = list(split["per_class"].values())
        spread = f"{min(counts):,} to {max(counts):,}" if split["labelled"] and len(set(counts)) > 1 else ""
        if split["labelled"] and len(set(counts)) == 1:
            spread = f"{counts[0]:,}"
        rows.append([name, f"{split['images']:,}", f"{split['labelled']:,}", spread, split["fingerprint"][:16]])
    section = Section("data", "Data", "Which images was this learned from?", [
        Table(["split", "images", "with a label", "images a class", "fingerprint"], rows, "lrrrl",
              f"{len(about['classes'])} classes, every image held at {about['pixels']} by {about['pixels']} pixels."),
    ])  # fmt: skip
    notices = [line for line in about["notices"] if line.startswith("leak")]
    notices += [line for line in about["notices"] if not line.startswith(("leak", "classes:"))]
    if notices:
        section.blocks.append(Lines(notices))
    names = [name for name, split in about["splits"].items() if split["labelled"]]
    counts = [[c, *(f"{about['splits'][name]['per_class'][c]:,}" for name in names)] for c in about["classes"]]
    if counts and names:
        align = "l" + "r" * len(names)
        section.blocks.append(Table(["class", *names], counts, align, "Labelled images by class", folded=True))
    if about["quarantine"]:
        reasons = Counter(line["reason"] for line in about["quarantine"])
        why = ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common(5))
        caption = f"{len(about['quarantine']):,} images cannot be used: {why}"
        rows = [[line["path"], line["reason"]] for line in about["quarantine"][:100]]
        more = "; the first 100" if len(rows) < len(about["quarantine"]) else ""
        section.blocks.append(Table(["image", "reason"], rows, "ll", caption + more))
    return section


def reproduce(run: RunFacts) -> Section:
    """How is this run made again?"""
    found = [s for stages in run.seeds.values() for s in stages if s.manifest]
    versions: dict[str, set[str]] = {}
    for stage in found:
        for name, version in stage.manifest["versions"].items():
            versions.setdefault(name, set()).add(version)
    commits = sorted({stage.manifest["commit"] for stage in found if stage.manifest.get("commit")})
    facts = [["seeds", ", ".join(map(str, run.seeds))]]
    facts += [[name, ", ".join(sorted(known))] for name, known in sorted(versions.items())]
    facts += [["commit", ", ".join(commits)]] if commits else []
    several = len(run.seeds) > 1
    keys = [
        [f"seed-{seed}/{s.name}" if several else s.name, s.state, s.key, s.manifest.get("digest", ""),
         s.manifest.get("created", "")[:19]]
        for seed, stages in run.seeds.items() for s in stages
    ]  # fmt: skip
    return Section("reproduce", "How to reproduce", "How is this run made again?", [
        Text("Save the recipe below as recipe.yaml, beside data of the fingerprints above:"),
        Code("", "orchestrator run recipe.yaml"),
        Table(["", "recorded"], facts, "ll"),
        Code("Recipe, after overrides", run.recipe),
        Table(["stage", "state", "key", "digest", "computed"], keys, "lllll",
              "Equal keys are equal questions; equal digests are equal answers, byte for byte.", folded=True),
    ])  # fmt: skip
