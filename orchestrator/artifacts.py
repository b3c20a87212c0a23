"""What stages hand to each other: folders of plain files (safetensors, Parquet, JSON), opened lazily, never edited."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
from torch import Tensor

from methods.base import Method
from orchestrator.component import Component, ConfigError
from orchestrator.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people: indented, in the given order, non-ASCII letters as they are."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Artifact:
    """An answer in a folder. `facts` are small plain values, equal for equal answers; `key` is set once stored."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    key: str = ""

    kind: ClassVar[str] = "Artifact"


@dataclass(frozen=True)
class Checkpoint(Artifact):
    """A trained method: `model.safetensors`, `model.json` (what to build), `curves.parquet` (step, name, value)."""

    kind: ClassVar[str] = "Checkpoint"
    SCHEMA: ClassVar[pa.Schema] = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])

    @staticmethod
    def write(
        folder: Path, *, state: dict[str, Tensor], encoder: Component, method: Component, classes: tuple[str, ...],
        images: int, pixels: int, precision: str, curves: list[tuple[int, str, float]], facts: dict[str, Any],
    ) -> Checkpoint:  # fmt: skip
        """Write a method's whole state and how to build it again."""
        weights = safetensors.torch.save({name: value.contiguous().cpu() for name, value in state.items()})
        (folder / "model.safetensors").write_bytes(weights)  # its own writing says of a full disk no error number
        model = {"encoder": encoder.to_json(), "method": method.to_json(), "classes": list(classes), "images": images,
                 "pixels": pixels, "precision": precision}  # fmt: skip
        write_json(folder / "model.json", model)
        columns = list(zip(*curves, strict=True)) if curves else [(), (), ()]
        pq.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, Checkpoint.SCHEMA, strict=True)],
                                schema=Checkpoint.SCHEMA), folder / "curves.parquet")  # fmt: skip
        return Checkpoint(folder, facts)

    @property
    def model(self) -> dict[str, Any]:
        """encoder, method, classes, images, pixels, precision."""
        return json.loads((self.folder / "model.json").read_text(encoding="utf-8"))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits; empty without labels."""
        return tuple(self.model["classes"])

    def state(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return safetensors.torch.load_file(self.folder / "model.safetensors")

    def build(self) -> Method:
        """The method with its weights, in eval mode, frozen. Raises UserError when its class is not to be found."""
        model = self.model
        try:
            encoder, method = Component.from_json(model["encoder"]), Component.from_json(model["method"])
        except ConfigError as error:
            raise UserError(
                f"{self.folder / 'model.json'}: {error.problems[0][1]}; it was trained with a class of yours: "
                "run where that class can be imported"
            ) from error
        built = method.cls(
            encoder.cls(encoder.config), method.config, classes=len(model["classes"]), images=model["images"]
        )
        built.load_state_dict(self.state())
        return built.eval().requires_grad_(False)

    def curves(self) -> pa.Table:
        """step, name, value: what training logged."""
        return pq.read_table(self.folder / "curves.parquet")


@dataclass(frozen=True)
class Labels(Artifact):
    """One round of the ledger, a row per unlabelled image in the order of its split. `source` says where a row's label
    comes from: "teacher", or the digest of `corrections.csv`, which then lies beside the table."""

    kind: ClassVar[str] = "Labels"
    SCHEMA: ClassVar[pa.Schema] = pa.schema([
        ("id", pa.string()), ("path", pa.string()), ("round", pa.int32()), ("teacher", pa.string()),
        ("class", pa.int32()), ("name", pa.string()), ("confidence", pa.float32()), ("margin", pa.float32()),
        ("entropy", pa.float32()), ("probabilities", pa.list_(pa.float32())), ("copies", pa.int32()),
        ("reason", pa.string()), ("changed", pa.bool_()), ("source", pa.string()),
    ])  # fmt: skip

    @staticmethod
    def write(
        folder: Path, parts: Iterable[Mapping[str, Any]], facts: dict[str, Any], corrections: str | None = None
    ) -> Labels:
        """Write the ledger and the text of the corrections among its rows.

        Args:
            parts: the rows in their order, a part after the other: columns by the names of SCHEMA.
        """
        if corrections is not None:
            (folder / "corrections.csv").write_bytes(corrections.encode())
        with pq.ParquetWriter(folder / "labels.parquet", Labels.SCHEMA, compression="zstd") as file:
            for columns in parts:
                file.write_table(pa.table(dict(columns), schema=Labels.SCHEMA))
        return Labels(folder, facts)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the clusters, where the labels are clusters; empty where they are the data's classes."""
        return tuple(f"cluster {number}" for number in range(self.facts.get("clusters", 0)))

    def table(self, columns: list[str] | None = None) -> pa.Table:
        """The rows, with the columns of SCHEMA."""
        wanted = self.SCHEMA.names if columns is None else columns
        with pq.ParquetFile(self.folder / "labels.parquet") as file:
            table = file.read([name for name in wanted if name in file.schema_arrow.names])
        if "source" in wanted and "source" not in table.column_names:  # written before there were corrections
            table = table.append_column("source", pa.array(["teacher"] * len(table), pa.string()))
        return table.select(wanted)

    def corrections(self) -> bytes | None:
        """The corrections among its rows, where there are any: the bytes of a CSV."""
        path = self.folder / "corrections.csv"
        return path.read_bytes() if path.exists() else None

    def probabilities(self) -> np.ndarray:
        """The teacher's distributions (N, K) float32, read part by part into one array."""
        with pq.ParquetFile(self.folder / "labels.parquet") as file:
            rows, found, place = file.metadata.num_rows, np.empty((0, 0), np.float32), 0
            for part in file.iter_batches(columns=["probabilities"]):
                values = part.column(0).flatten().to_numpy().reshape(len(part), -1)
                if place == 0:
                    found = np.empty((rows, values.shape[1]), np.float32)
                found[place : place + len(part)] = values
                place += len(part)
        return found


@dataclass(frozen=True)
class Scores(Artifact):
    """The answers of a probe: `scores.json`, a list of {protocol, metric, value, low, high, n}, with
    `tap` where a protocol reads several."""

    kind: ClassVar[str] = "Scores"

    @staticmethod
    def write(folder: Path, scores: list[dict[str, Any]], neighbours: list[dict[str, Any]] | None = None) -> Scores:
        """Write the records; the facts name each value by "protocol_metric", with its tap between them.

        Args:
            neighbours: [{query: {id, path, label}, nearest: [the same ...]}], for a figure.
        """
        write_json(folder / "scores.json", scores)
        if neighbours:
            write_json(folder / "neighbours.json", neighbours)
        return Scores(folder, {
            "_".join(filter(None, (s["protocol"], s.get("tap"), s["metric"]))): s["value"] for s in scores
        })  # fmt: skip

    def neighbours(self) -> list[dict[str, Any]]:
        """Queries with their nearest images, where retrieval was asked for."""
        path = self.folder / "neighbours.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def scores(self) -> list[dict[str, Any]]:
        """The records, as written."""
        return json.loads((self.folder / "scores.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Table(Artifact):
    """Scores of several arms: facts {arms: [{key, scores}], protocol, claims, random, supervised}, keys of Scores; see
    `orchestrator.comparison`."""

    kind: ClassVar[str] = "Table"

    @staticmethod
    def write(folder: Path, facts: dict[str, Any]) -> Table:
        """Write the table, for people and for the report."""
        write_json(folder / "table.json", facts)
        return Table(folder, facts)


@dataclass(frozen=True)
class Decision(Artifact):
    """A gate's choice: facts {action: promoted | kept | stopped, promoted: key of the checkpoint to go on with,
    reason, teacher, student: {key, accuracy, low, high, n}}. Whoever needs a Checkpoint may read a Decision."""

    kind: ClassVar[str] = "Decision"

    @staticmethod
    def write(folder: Path, facts: dict[str, Any]) -> Decision:
        """Write the decision, for people and for the next round."""
        write_json(folder / "decision.json", facts)
        return Decision(folder, facts)


@dataclass(frozen=True)
class Verdict(Artifact):
    """Whether unlabelled images helped: `verdict.json`, and `predictions.parquet` (arm, row, id, path, label,
    predicted, confidence, probabilities) of every arm on the test images."""

    kind: ClassVar[str] = "Verdict"
    SCHEMA: ClassVar[pa.Schema] = pa.schema([
        ("arm", pa.string()), ("id", pa.string()), ("path", pa.string()), ("label", pa.int32()),
        ("predicted", pa.int32()), ("confidence", pa.float32()), ("probabilities", pa.list_(pa.float32())),
    ])  # fmt: skip

    @staticmethod
    def write(folder: Path, facts: dict[str, Any], predictions: pa.Table) -> Verdict:
        """Write the verdict and the predictions it rests on."""
        write_json(folder / "verdict.json", facts)
        pq.write_table(predictions, folder / "predictions.parquet", compression="zstd")
        return Verdict(folder, facts)

    def predictions(self) -> pa.Table:
        """The rows, with the columns of SCHEMA."""
        return pq.read_table(self.folder / "predictions.parquet")


KINDS: dict[str, type[Artifact]] = {kind.kind: kind for kind in (Checkpoint, Labels, Scores, Table, Decision, Verdict)}
