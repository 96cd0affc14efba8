"""A real Feast repository in a folder: registry in a file, online store in SQLite."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pandas as pd

from modelserve import plugins
from modelserve.ports import FeatureRecord

CONFIGURATION = """\
project: shop
provider: local
registry: registry.db
online_store:
  type: sqlite
  path: online.db
entity_key_serialization_version: 3
"""


def _decoded(record: FeatureRecord) -> dict[str, Any]:
    _, _, texts, _ = record
    return {name: orjson.loads(text) for name, text in texts.items()}


class Repository:
    """Describes feature views and publishes to them, as a team with Feast does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"feast://{folder}"
        folder.mkdir()
        (folder / "feature_store.yaml").write_text(CONFIGURATION)
        self.feast = plugins.require("feast")
        self.types = plugins.require("feast.types")
        self.store = self.feast.FeatureStore(repo_path=str(folder))

    def entity(self, key: str, kind: str = "STRING") -> Any:
        return self.feast.Entity(name=key, join_keys=[key], value_type=self.feast.ValueType[kind])

    def view(self, name: str, entities: Iterable[Any], schema: Mapping[str, Any], **options: Any) -> Any:
        """Describe a view by its features and their types: Feast's, or a value that tells which."""
        fields = [self.feast.Field(name=feature, dtype=self._type_of(kind)) for feature, kind in schema.items()]
        source = self.feast.FileSource(
            name=f"{name}_source", path=str(self.folder / f"{name}.parquet"), timestamp_field="event_timestamp"
        )
        return self.feast.FeatureView(name=name, entities=list(entities), schema=fields, source=source, **options)

    def apply(self, *objects: Any) -> None:
        entities = {each.name: each for each in objects if isinstance(each, self.feast.Entity)}
        self.store.apply([*entities.values(), *(each for each in objects if each not in entities.values())])

    def publish(self, view: str, rows: Sequence[Mapping[str, Any]], when: dt.datetime) -> None:
        """Write rows through the SDK, all features of each."""
        self.store.write_to_online_store(view, df=pd.DataFrame(rows).assign(event_timestamp=when))

    def put(self, records: Sequence[FeatureRecord]) -> None:
        """Write rows with some of the features only, as Feast's jobs leave them when a view has got more features."""
        for record in records:
            view = self.store.get_feature_view(record.group)
            (key,) = view.entity_columns
            kinds = {field.name: field.dtype.to_value_type() for field in (key, *view.features)}
            values = {key.name: record.key, **_decoded(record)}
            protos = {name: self._proto(value, kinds[name]) for name, value in values.items()}
            entity = plugins.require("feast.protos.feast.types.EntityKey_pb2").EntityKey(
                join_keys=[key.name], entity_values=[protos.pop(key.name)]
            )
            when = dt.datetime.fromtimestamp(record.written_at, dt.UTC)
            self.store.provider.online_write_batch(self.store.config, view, [(entity, protos, when, None)], None)

    def _proto(self, value: Any, kind: Any) -> Any:
        return plugins.require("feast.type_map").python_values_to_proto_values([value], kind)[0]

    def _type_of(self, kind: Any) -> Any:
        named = {bool: "Bool", int: "Int64", float: "Float64", str: "String", type(None): "Float64"}
        if type(kind) in named:
            return getattr(self.types, named[type(kind)])
        return self.types.Array(self.types.Float64) if isinstance(kind, list) else kind
