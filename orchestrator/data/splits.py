"""Splits: from the sources a recipe names to disjoint, deterministic sets of images under one class map."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from methods.views.draws import mix
from orchestrator.data.catalogue import STREAM_BYTES, Catalogue, copy_bytes, open_catalogue
from orchestrator.data.images import Images
from orchestrator.data.labels import SEPARATORS, WHOLE, natural
from orchestrator.data.sources import Listing, open_source
from orchestrator.errors import UserError, nearest

PROTECTED = ("test", "holdout")  # their images are in no other split
UNLABELLED = ("unlabelled", "unlabeled")
STREAM_ABOVE = 64 * 2**30  # bytes of a copy in the store; by the data alone, since a machine must not change an answer
_SCATTERED = 0.25  # share of the row groups it touches below which a split is not worth reading them for in each epoch
_NEED_LABELS = ("labelled", "labeled", *PROTECTED)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One named set of images, as the recipe writes it.

    Args:
        source: another split's name, or where images are: a path, a glob, "digits/train", "torchvision:CIFAR10/train".
        per_class, fraction, count: draw that many of each class, that share of each class, or that many in all in the
            classes' proportions; at most one. A split drawn from another split takes its images out of it.
        without: leave out the images of these splits.
        labels: False hides the labels; then a draw does not look at them either.
        label_noise: share of the labels that are replaced by a class drawn uniformly from all, to study what wrong
            labels do: of K classes, 1 - label_noise (1 - 1 / K) of the labels stay right. A greater share adds to
            what a smaller one replaced.
        separator: what divides the cells of a text column into several labels: "," or ";" or "|"; "none" says that each
            is one class, whatever it holds. Belongs where the path is named; all splits of a source share it.

    Of images with several labels `fraction` and `count` draw without regard to classes; `per_class` and `label_noise`
    need one class an image and are refused.
    """

    source: str
    per_class: int | None = None
    fraction: float | None = None
    count: int | None = None
    without: tuple[str, ...] = ()
    labels: bool = True
    label_noise: float = 0.0
    separator: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source = '': must be a path, a data set or another split")
        given = [name for name in ("per_class", "fraction", "count") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1]} = {getattr(self, given[1])}: must be left out, {given[0]} is given already")
        for name in ("per_class", "count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"fraction = {self.fraction}: must be above 0 and below 1")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise = {self.label_noise}: must be in [0, 1]")
        if self.label_noise and not self.labels:
            raise ValueError(f"label_noise = {self.label_noise}: must be left out where labels are hidden")
        if self.separator is not None and self.separator not in (*SEPARATORS, WHOLE):
            known = " or ".join(f'"{mark}"' for mark in (*SEPARATORS, WHOLE))
            raise ValueError(f"separator = {self.separator!r}: must be {known}, in quotes")
        if self.per_class is not None and not self.labels:
            raise ValueError(f"per_class = {self.per_class}: must be left out where labels are hidden; use count")

    @property
    def drawn(self) -> bool:
        """Whether this is a part of its source."""
        return not (self.per_class is self.fraction is self.count is None)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a recipe.

    Args:
        pixels: every image is held as `pixels` by `pixels`: the centre square, antialiased bilinear.
        splits: by name. No image of "test" or "holdout" is in any other split; "unlabelled" hides its labels and leaves
            out the images of "labelled"; "labelled", "test" and "holdout" leave out images without a label.
        on_bad_image: "skip" and report, or "fail".
        max_bad_share: above this share of bad images in one source nothing starts.
        include_labelled: whether "unlabelled" keeps the images that are in "labelled" too.
        stream: whether the images of Parquet sources stay in their shards and are read from there a row group at a
            time, in an order that shuffles row groups, and rows among neighbours in that order: "always", "never", or
            "auto": where a copy in the store would take more than 64 GiB.
        stream_mib: most MiB of a streamed source that a process holds. More of it shuffles further.
    """

    pixels: int
    splits: Mapping[str, Split]
    on_bad_image: Literal["skip", "fail"] = "skip"
    max_bad_share: float = 0.05
    include_labelled: bool = False
    stream: Literal["auto", "always", "never"] = "auto"
    stream_mib: int = STREAM_BYTES >> 20

    def __post_init__(self) -> None:
        if not 1 <= self.pixels <= 4096:
            raise ValueError(f"pixels = {self.pixels}: must be between 1 and 4096")
        if self.on_bad_image not in ("skip", "fail"):
            raise ValueError(f"on_bad_image = {self.on_bad_image!r}: must be skip or fail")
        if self.stream not in ("auto", "always", "never"):
            raise ValueError(f"stream = {self.stream!r}: must be auto, always or never")
        if self.stream_mib < 1:
            raise ValueError(f"stream_mib = {self.stream_mib}: must be at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share = {self.max_bad_share}: must be between 0 and 1")
        if not self.splits:
            raise ValueError("splits = {}: must name at least one split")
        for name, split in self.splits.items():
            for other in split.without:
                if other not in self.splits or other == name:
                    raise ValueError(
                        f"splits.{name}.without = {other!r}: must be another split{nearest(other, self.splits)}"
                    )
            if name in PROTECTED and split.label_noise:
                raise ValueError(
                    f"splits.{name}.label_noise = {split.label_noise}: must be left out, wrong labels measure nothing"
                )
            if name in UNLABELLED and split.per_class is not None:
                raise ValueError(
                    f"splits.{name}.per_class = {split.per_class}: must be left out, its labels are hidden; use count"
                )
        _order(self.splits)
        read: dict[str, tuple[str, str]] = {}  # source to the split that says how its cells are divided, and how
        for name, split in self.splits.items():
            if split.separator is None:
                continue
            if above := _ancestors(name, self.splits):
                raise ValueError(f"splits.{name}.separator = {split.separator!r}: belongs to {above[-1]}")
            first, other = read.setdefault(split.source, (name, split.separator))
            if other != split.separator:
                raise ValueError(
                    f"splits.{name}.separator = {split.separator!r}: {split.source} is read with {other!r} in {first}"
                )

    def separator(self, source: str) -> str | None:
        """What divides the cells of a source's label column."""
        return next((s.separator for s in self.splits.values() if s.source == source and s.separator), None)


@dataclass(frozen=True)
class Data:
    """All splits of a recipe: disjoint where they must be, under one class map.

    `notices` are lines for people: what was skipped, dropped, found twice, or is missing. `quarantine` has (path,
    reason) of every image that cannot be used.
    """

    splits: dict[str, Images]
    classes: tuple[str, ...]
    notices: list[str]
    quarantine: list[tuple[str, str]]
    pixels: int

    def describe(self) -> dict:
        """The same for JSON, without the ids."""
        return {
            "pixels": self.pixels,
            "classes": list(self.classes),
            "splits": {
                name: {
                    "images": len(images),
                    "labelled": int(images.labelled.sum()),
                    "per_class": images.per_class(),
                    "fingerprint": images.fingerprint,
                }
                for name, images in self.splits.items()
            },
            "notices": self.notices,
            "quarantine": [{"path": path, "reason": reason} for path, reason in self.quarantine],
        }

    def save(self, folder: Path) -> None:
        """Write `splits.parquet` (split, id, class or null; a row an image) and `data.json` (`describe`).

        With several labels an image anywhere, the column `classes` lists them, and `class` is null for such images.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tables = []
        for name, images in self.splits.items():
            codes = pa.array(images.label.astype(np.int32), mask=~images.labelled | images.several)
            classes = pa.array(self.classes, pa.string())
            names = classes.take(codes) if self.classes else pa.nulls(len(images), pa.string())
            columns = {"split": pa.repeat(name, len(images)), "id": images.ids, "class": names}
            if any(part.several for part in self.splits.values()):
                columns["classes"] = _lists(images, classes)
            tables.append(pa.table(columns))
        pq.write_table(pa.concat_tables(tables), folder / "splits.parquet")
        (folder / "data.json").write_text(json.dumps(self.describe(), indent=1))


def _lists(images: Images, classes: pa.Array) -> pa.Array:
    """(N,) lists of class names, null for images without a label."""
    if images.targets is None:
        shown = np.zeros((len(images), len(classes)), bool)
        shown[np.flatnonzero(images.labelled), images.label[images.labelled]] = True
    else:
        shown = images.targets
    offsets = np.concatenate([[0], np.cumsum(shown.sum(axis=1))])
    names = classes.take(pa.array(np.nonzero(shown)[1], pa.int32()))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names, mask=pa.array(~images.labelled))


def open_data(
    config: DataConfig,
    cache: Path,
    *,
    seed: int,
    threads: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Data:
    """Find, check and split all images of a recipe.

    Splits are a pure function of the images' ids, `seed` and the split's name: moving or renaming files changes none,
    and raising `per_class` keeps the images that were drawn before. Rows of every split are in the order of the ids; of
    a streamed source, in its own.

    Args:
        cache: catalogues and downloads are kept here.
        seed: of the draws.
        threads: decoding threads, for the scan and, for images above 96 pixels, for batches.
        progress: called with (source, done, total) during a scan.
    Raises:
        UserError: in one line, with what was found and what to do.
    """
    notices: list[str] = []
    quarantine: list[tuple[str, str]] = []
    roots = {name: _root(name, config.splits) for name in config.splits}
    visible = {name: split.labels and name not in UNLABELLED for name, split in config.splits.items()}
    pools: dict[str, Images] = {}
    for source in dict.fromkeys(roots.values()):
        separator = config.separator(source)
        listing = open_source(source, cache, separator=separator)
        if separator in SEPARATORS and not listing.several and not listing.label_problem:
            raise UserError(
                f"{source}: separator is {separator!r}, but there is no label column of text to divide "
                f"({listing.kind}); leave it out"
            )
        catalogue = open_catalogue(
            listing, cache, pixels=config.pixels, threads=threads, progress=progress,
            stream_bytes=config.stream_mib << 20 if _streams(config, listing) else None,
        )  # fmt: skip
        labels = any(visible[name] for name in roots if roots[name] == source)
        bad = catalogue.bad()
        _check_bad(source, bad, len(catalogue), config)
        quarantine += bad
        notices += _source_notices(listing, catalogue, bad, labels)
        if labels and catalogue.about["label_problem"]:
            raise UserError(catalogue.about["label_problem"])
        images = Images.of(catalogue, threads=threads)
        pools[source] = images if labels else images.without_labels().relabel(())
    classes = _class_map(config.splits, roots, pools)
    pools = {source: images.relabel(classes) for source, images in pools.items()}
    splits = _resolve(config, roots, pools, visible, seed, notices)
    _check_classes(splits, notices)
    for name, images in splits.items():
        if images.blocks is not None and images.share_of_groups < _SCATTERED:
            splits[name] = images.copied(cache, threads=threads, progress=progress)
            notices.append(f"{name}: {len(images):,} images are scattered over the shards, and copied into the store")
    if classes:
        notices.append(f"classes: {_listed(classes, 50)}")
    for name, images in splits.items():
        notices.append(_count_line(name, images))
    return Data(splits, classes, notices, quarantine, config.pixels)


# ---- sources


def _root(name: str, splits: Mapping[str, Split]) -> str:
    """The source that a split is cut from in the end."""
    return splits[[name, *_ancestors(name, splits)][-1]].source


def _ancestors(name: str, splits: Mapping[str, Split]) -> list[str]:
    """The splits that a split is made from, the nearest first. A source named like its own split is a path."""
    chain = [name]
    while (source := splits[chain[-1]].source) in splits and source != chain[-1]:
        chain.append(source)
    return chain[1:]


def _streams(config: DataConfig, listing: Listing) -> bool:
    if listing.shards is None or config.stream == "never":
        return False
    return config.stream == "always" or copy_bytes(listing, config.pixels) > STREAM_ABOVE


def _check_bad(source: str, bad: Sequence[tuple[str, str]], total: int, config: DataConfig) -> None:
    if not bad or (config.on_bad_image == "skip" and len(bad) <= config.max_bad_share * total):
        return
    shown = "".join(f"\n  {path}   {reason}" for path, reason in bad[:20])
    more = f"\n  and {len(bad) - 20:,} more; `orchestrator doctor {source}` lists all" if len(bad) > 20 else ""
    share = f"max_bad_share allows {config.max_bad_share:.1%}"
    limit = "on_bad_image is fail" if config.on_bad_image == "fail" else share
    raise UserError(
        f"{source}: {len(bad):,} of {total:,} images ({len(bad) / total:.1%}) cannot be used, and {limit}; mend or "
        f"remove them, or change that setting:{shown}{more}"
    )


def _source_notices(listing: Listing, catalogue: Catalogue, bad: Sequence[tuple[str, str]], labels: bool) -> list[str]:
    source, about = listing.source, catalogue.about
    if not labels:
        what = ", its labels are not read" if about["classes"] or about["label_problem"] else ""
    else:
        what = f", {len(about['classes'])} classes" if about["classes"] else ", no labels"
    lines = [f"{source}: {len(catalogue):,} images ({listing.kind}{what})", *listing.notices]
    if catalogue.streamed:
        lines.append(
            f"{source}: streamed, at most {catalogue.stream_bytes >> 20:,} MiB of it in memory; shuffled over "
            f"{catalogue.window:,} row groups at a time, about {catalogue.window_rows:,} images"
        )
    if bad:
        path, reason = bad[0]
        lines.append(f"{source}: {len(bad):,} images cannot be used and are left out, such as {path} ({reason})")
    if about["duplicates"]:
        first, again = about["duplicate_examples"][0]
        lines.append(f"{source}: {about['duplicates']:,} exact duplicates are left out, such as {again} (is {first})")
    if labels and about["conflicts"]:
        first, again, kept, other = about["conflict_examples"][0]
        lines.append(
            f"{source}: {about['conflicts']:,} of the duplicates have another label than the image that was kept, such "
            f"as {again} ({other}; kept {first}, {kept}): correct the labels"
        )
    return lines


def _class_map(splits: Mapping[str, Split], roots: Mapping[str, str], pools: Mapping[str, Images]) -> tuple[str, ...]:
    """Every class that a labelled image of a source has: in natural order if each source is, else in the order that the
    sources declare, the one of "labelled" first."""
    ranked = sorted(splits, key=lambda name: (_rank(name), list(splits).index(name)))
    ranked = sorted(ranked, key=lambda name: name not in ("labelled", "labeled"))
    declared = [
        [name for name, count in pools[source].per_class().items() if count]
        for source in dict.fromkeys(roots[name] for name in ranked)
    ]
    union = list(dict.fromkeys(name for names in declared for name in names))
    if all(names == sorted(names, key=natural) for names in declared):
        union.sort(key=natural)
    return tuple(union)


# ---- from sources to splits


def _rank(name: str) -> int:
    """Of the splits that can be made next: test and holdout first, since others give way to them; unlabelled last."""
    if name in PROTECTED:
        return PROTECTED.index(name)
    return 4 if name in UNLABELLED else 2 if name in ("labelled", "labeled") else 3


def _needs(name: str, splits: Mapping[str, Split]) -> set[str]:
    source = splits[name].source
    return ({source} if source in splits and source != name else set()) | set(splits[name].without)


def _order(splits: Mapping[str, Split]) -> list[str]:
    """The splits, each after those it is made from. Raises ValueError for a circle."""
    ordered: list[str] = []
    waiting = list(splits)
    while waiting:
        ready = [name for name in waiting if _needs(name, splits) <= set(ordered)]
        if not ready:
            raise ValueError(f"splits = {', '.join(waiting)}: must not be made from each other in a circle")
        ordered.append(min(ready, key=_rank))
        waiting.remove(ordered[-1])
    return ordered


def _resolve(
    config: DataConfig,
    roots: Mapping[str, str],
    pools: Mapping[str, Images],
    visible: Mapping[str, bool],
    seed: int,
    notices: list[str],
) -> dict[str, Images]:
    whole: dict[str, Images] = {}  # each split before later ones were drawn from it
    left: dict[str, Images] = {}  # each split as it stands
    excluded: dict[tuple[str, str], tuple[int, str]] = {}  # (split, other split it gives way to): how many, an example

    def give_way(images: Images, name: str, other: str) -> Images:
        found = _member(images, whole[other])
        if found.any():
            count, example = excluded.get((name, other), (0, images.where(int(np.argmax(found)))))
            excluded[name, other] = (count + int(found.sum()), example)
        return images.select(~found)

    for name in _order(config.splits):
        split = config.splits[name]
        above = _ancestors(name, config.splits)
        parent = above[0] if above else None
        images = whole[parent] if parent else pools[roots[name]]
        if name in _NEED_LABELS and visible[name] and not images.labelled.all():
            unlabelled = int((~images.labelled).sum())
            if unlabelled == len(images):
                raise UserError(
                    f"{name}: none of the {len(images):,} images of {split.source} has a label; class folders, a "
                    "manifest with a label column or a Parquet label column are needed"
                )
            notices.append(f"{name}: {unlabelled:,} images of {split.source} have no label and are left out")
            images = images.select(images.labelled)
        before = images
        for other in split.without:
            images = images.select(~_member(images, whole[other]))
        for other in PROTECTED:
            if other in whole and other not in above:
                images = give_way(images, name, other)
        if name in UNLABELLED and not config.include_labelled:
            for other in ("labelled", "labeled"):
                if other in whole:
                    images = give_way(images, name, other)
        if images.several and visible[name]:
            _check_several(name, split)
        if split.drawn:
            if parent:  # what earlier splits drew from the same one is gone
                images = images.select(_member(images, left[parent]))
            by_class = visible[name] and not images.several
            images = _draw(name, split, before, images, seed=seed, by_class=by_class, spare=parent is not None)
            if images.several and visible[name]:
                notices.append(f"{name}: drawn without regard to classes, since an image may have several labels")
            if parent:
                left[parent] = left[parent].select(~_member(left[parent], images))
        whole[name] = left[name] = images
    for name in left:  # test and holdout may have been made after a split that holds their images
        for other in PROTECTED:
            if other == name or other not in left or other in _ancestors(name, config.splits):
                continue
            if name not in PROTECTED or _rank(name) > _rank(other):
                left[name] = give_way(left[name], name, other)
    notices += [_exclusion_line(*pair, *found, roots) for pair, found in excluded.items()]
    if any(name in left for name in UNLABELLED) and any(name in left for name in ("labelled", "labeled")):
        notices.append(
            "unlabelled keeps the images that are in labelled too (include_labelled)"
            if config.include_labelled
            else "unlabelled does not hold the images of labelled (include_labelled is false)"
        )
    for name, images in left.items():
        if not len(images):
            raise UserError(f"{name}: no image of {config.splits[name].source} is left after other splits took theirs")
    for name, split in config.splits.items():
        if split.label_noise and visible[name]:
            clean = left[name].label
            left[name] = _noisy(left[name], split.label_noise, seed, name)
            wrong = int((left[name].label != clean).sum())
            notices.append(f"{name}: {wrong:,} of {len(clean):,} labels are wrong on purpose (label_noise)")
    return {name: left[name] if visible[name] else left[name].without_labels() for name in config.splits}


def _check_several(name: str, split: Split) -> None:
    """Refuse what needs one class an image, in a line."""
    for option, instead in (("per_class", "use count or fraction"), ("label_noise", "leave it out")):
        if getattr(split, option):
            raise UserError(
                f"{name}: {option} is {getattr(split, option)}, but images of {split.source} may have several labels; "
                f"{instead}"
            )


def _noisy(images: Images, share: float, seed: int, name: str) -> Images:
    """The images with `share` of their labels replaced by a draw from all classes."""
    chance = (_priority(images, seed, f"{name} noise").view(np.uint64) >> np.uint64(11)) * 2.0**-53
    drawn = (_priority(images, seed, f"{name} wrong").view(np.uint64) % np.uint64(len(images.classes))).astype(int)
    return images.with_labels(np.where(chance < share, drawn, images.label))


def _exclusion_line(name: str, other: str, count: int, example: str, roots: Mapping[str, str]) -> str:
    if roots[name] == roots[other] or other not in PROTECTED:
        return f"{name}: {count:,} images are in {other} and left out here"
    return f"leak: {count:,} images of {other} were also in {name}, such as {example}; they are left out of {name}"


def _member(images: Images, others: Images) -> np.ndarray:
    """(N,) bool: which of `images` are among `others`, by content."""
    found = pc.is_in(pa.array(images.id_bytes), value_set=pa.array(others.id_bytes))
    return found.to_numpy(zero_copy_only=False)


# ---- draws


def _draw(name: str, split: Split, source: Images, images: Images, *, seed: int, by_class: bool, spare: bool) -> Images:
    """The drawn part of `images`, which is what other splits left of `source`.

    Args:
        by_class: draw within each class (unlabelled images count as one more).
        spare: leave at least one image of each class to the split that is drawn from.
    """
    groups = len(images.classes) + 1
    group = np.where(images.labelled, images.label, groups - 1) if by_class else np.full(len(images), groups - 1)
    size = np.bincount(group, minlength=groups)
    if split.per_class is not None:
        want = np.where(np.bincount(source.label[source.labelled], minlength=groups) > 0, split.per_class, 0)
        short = np.flatnonzero(want > size)
        if len(short):
            found = ", ".join(f"{images.classes[c]} has {size[c]:,}" for c in short[:10])
            found += f" and {len(short) - 10} more have too few" if len(short) > 10 else ""
            lowest = int(size[want > 0].min())
            advice = f"lower per_class to {lowest:,}, or add images" if lowest else "add images"
            raise UserError(f"{name}: per_class is {split.per_class:,}, but in {split.source} {found}; {advice}")
        if not want.any():
            raise UserError(f"{name}: per_class is {split.per_class:,}, but {split.source} has no labels; use count")
    else:
        before = np.where(source.labelled, source.label, groups - 1) if by_class else np.full(len(source), groups - 1)
        share = np.bincount(before, minlength=groups)
        total = split.count if split.fraction is None else round(split.fraction * len(source))
        assert total is not None  # a drawn split has one of the three
        most = np.maximum(size - 1, 0) if spare else size
        if total > most.sum() or total < 1:
            by = f"count is {total:,}" if split.fraction is None else f"fraction {split.fraction} is {total:,} images"
            left = int(most.sum())
            shared = "what is in test or another split is left out: give each images of its own"
            advice = f"ask for 1 to {left:,}" if left else shared
            raise UserError(f"{name}: {by}, but {split.source} has {left:,} to draw from; {advice}")
        want = _apportion(share, total, most)
    order = np.lexsort((_priority(images, seed, name), group))
    rank = np.empty(len(images), np.int64)
    rank[order] = np.arange(len(images)) - np.repeat(np.cumsum(size) - size, size)
    return images.select(rank < want[group])


def _apportion(share: np.ndarray, total: int, most: np.ndarray) -> np.ndarray:
    """Split `total` in the proportions of `share` (K,), at most `most` each, by largest remainder.

    Shares 3, 1 and a total of 2 give 2, 0 (quotas 1.5 and 0.5, the larger class first on ties).
    """
    quota = share * total / share.sum()
    given = np.minimum(np.floor(quota).astype(np.int64), most)
    for place in np.lexsort((-share, -(quota - np.floor(quota)))).tolist() * 2:
        if given.sum() < total and given[place] < most[place]:
            given[place] += 1
    while given.sum() < total:  # classes at their limit: the rest goes to those with most room
        given[np.argmax(most - given)] += 1
    return given


def _priority(images: Images, seed: int, name: str) -> np.ndarray:
    """(N,) int64: a random number for each image, the same wherever and beside whatever else it lies."""
    digits = images.id_bytes.astype("S16").tobytes().decode()
    key = np.frombuffer(bytes.fromhex(digits), ">i8").astype(np.int64)
    salt = int.from_bytes(blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little", signed=True)
    return mix(mix(torch.from_numpy(key)) + salt).numpy()


# ---- checks


def _check_classes(splits: Mapping[str, Images], notices: list[str]) -> None:
    labelled = next((splits[name] for name in ("labelled", "labeled") if name in splits), None)
    if labelled is None:
        return
    known = {name for name, count in labelled.per_class().items() if count}
    if len(known) < 2 and not labelled.several:
        only = next(iter(known), "none")
        raise UserError(f"labelled: one class only ({only}); at least two are needed, or every image is surely {only}")
    for name in PROTECTED:
        if name not in splits or not splits[name].labelled.any():
            continue
        present = {c: count for c, count in splits[name].per_class().items() if count}
        unknown = [c for c in present if c not in known]
        if unknown and labelled.several:  # a draw without regard to classes may miss a rare one
            notices.append(f"{name}: {_listed(unknown)} is in no labelled image: nothing can be learned of it")
        for extra in unknown if not labelled.several else ():
            raise UserError(
                f"{name}: class {extra!r} ({present[extra]:,} images) is not in labelled, which has "
                f"{_listed(sorted(known))}{nearest(extra, known)}; add labelled images of it or leave it out of {name}"
            )
        missing = [c for c in labelled.classes if c in known and c not in present]
        if missing:
            notices.append(f"{name}: no image of {_listed(missing)}: nothing can be said about it there")


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _count_line(name: str, images: Images) -> str:
    counts = images.per_class()
    labelled = int(images.labelled.sum())
    if not labelled:
        return f"{name}: {len(images):,} images, no labels"
    present = {c: count for c, count in counts.items() if count}
    if images.targets is not None and not present:
        return f"{name}: {len(images):,} images, {labelled:,} labelled, none shows any class"
    fewest, most = min(present, key=present.__getitem__), max(present, key=present.__getitem__)
    if present[fewest] == present[most]:
        spread = f"{present[most]:,} of each of {len(present)} classes"
    else:
        spread = f"{len(present)} classes, {present[fewest]:,} ({fewest}) to {present[most]:,} ({most})"
    of = "" if labelled == len(images) else f", {labelled:,} labelled"
    if images.targets is not None:
        spread += f", {images.targets.sum() / labelled:.1f} labels an image"
    return f"{name}: {len(images):,} images{of}, {spread}"
