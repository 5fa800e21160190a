"""The charts in the tab "Custom Scalars" of TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.custom_scalar import metadata
from tensorboard.plugins.custom_scalar.layout_pb2 import (
    Category,
    Chart,
    Layout,
    MarginChartContent,
    MultilineChartContent,
)

from lightning_roulette.trainer.show import points


def layout() -> Summary:
    """Return the entry for the charts that draw several curves together."""
    low, _, high = points.BRANCH
    series = [(points.SCORE, low, high), (points.FLOOR, points.FLOOR, points.FLOOR)]
    charts = [
        _bands("score and floor", series),
        _lines("held-out score and floor", points.HELD_OUT, points.HELD_OUT_FLOOR),
        _lines("sparsity", points.SPARSITY),
        Chart(title="density of each layer", multiline=MultilineChartContent(tag=[f"{points.DENSITY}.+"])),
    ]
    stored = Layout(category=[Category(title="roulette", chart=charts)]).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    entry = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        tensor=TensorProto(dtype="DT_STRING", string_val=[stored]),
        metadata=SummaryMetadata(plugin_data=plugin),
    )
    return Summary(value=[entry])


def _lines(title: str, *tags: str) -> Chart:
    return Chart(title=title, multiline=MultilineChartContent(tag=[f"{tag}$" for tag in tags]))


def _bands(title: str, series: Sequence[tuple[str, str, str]]) -> Chart:
    """Return a chart of lines, each with a band. The tags are those of the line and of the edges of the band."""
    bands = [MarginChartContent.Series(value=line, lower=low, upper=high) for line, low, high in series]
    return Chart(title=title, margin=MarginChartContent(series=bands))
