"""What the event files of TensorBoard hold."""

from __future__ import annotations

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray


def events(folder: str) -> EventAccumulator:
    """All entries of a folder."""
    return EventAccumulator(folder, size_guidance={"scalars": 0, "tensors": 0}).Reload()


def plugin_of(read: EventAccumulator, tag: str) -> str:
    """The tab in which TensorBoard shows a tag."""
    return read.SummaryMetadata(tag).plugin_data.plugin_name


def scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Curves in both forms of TensorBoard. Ours have descriptions, which only the newer form can hold."""
    read = events(folder)
    plain = {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    described = [tag for tag in read.Tags()["tensors"] if plugin_of(read, tag) == "scalars"]
    return plain | {
        tag: [(one.step, make_ndarray(one.tensor_proto).item()) for one in read.Tensors(tag)] for tag in described
    }
