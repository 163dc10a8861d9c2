"""Put a published checkpoint into an ONNX graph of the same network: codes, centroids and biases as they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper

from vqonnx import modelfile
from vqonnx.checkpoint import Checkpoint, PublishedLayer, read_checkpoint
from vqonnx.errors import ModelError
from vqonnx.fusion import fuse_layers, is_fused
from vqonnx.generate import generate_feeds
from vqonnx.graph import Site, find
from vqonnx.modelfile import remove_entries, set_nodes
from vqonnx.place import Placement, Target, all_names, node_reads, place
from vqonnx.record import LayerRecord, write_record
from vqonnx.result import Result, Saved
from vqonnx.writer import Writer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Imported(Result):
    """A published network in memory.

    Attributes:
        checkpoint: What was imported.
    """

    checkpoint: Checkpoint

    def save(
        self, path: str | Path, *, verify: bool = True, rtol: float | None = None, atol: float | None = None
    ) -> Saved:
        """As `Result.save`; the checkpoint is not written over either."""
        modelfile.check_output(path, self.checkpoint.path)
        return super().save(path, verify=verify, rtol=rtol, atol=atol)


def import_kill_the_bits(
    checkpoint: str | Path,
    model: str | Path,
    *,
    target: Target = "hybrid",
    fuse: bool | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> Imported:
    """Give the network of an ONNX model the weights of a checkpoint of Stock et al. 2020 ("And the bit goes down").

    Nothing is encoded again: codes, centroids, scale and shift of batch normalisations and weights that were not
    compressed are stored with the values and the precision that the checkpoint has. No weight of the model is kept.

    Args:
        checkpoint: Path of the ``.pth`` file.
        model: Path of the network, batch normalisation folded into its convolutions (so each has a bias). Layers are
            matched by name: that of the weight, or that of the module in the node's name, as exporters of torch write
            them; where the model lacks names, by their order, if the names that it has agree with that.
        target: ``hybrid``, ``portable`` or ``custom`` (docs/format.md).
        fuse: As in `vqonnx.compress`.
        input_shapes: Shapes for the generated inputs on which the written file is run.

    Raises:
        ModelError: A file cannot be read, or the two are not the same network; names the first layer that differs.
        InputError: torch is not installed.
        OptionError: Layers shall be fused in a portable file.
    """
    fusing = is_fused(fuse, target)
    path = Path(model)
    proto = modelfile.load(path)
    published = read_checkpoint(checkpoint)
    pairs = _match(published, proto, path)
    feeds = generate_feeds(path, shapes=input_shapes)
    place(proto, [Placement(site, layer.form, site.view("ihw")) for site, layer in pairs], target)
    _put_biases(proto, {site.name: (layer.bias, site.elem_type) for site, layer in pairs})
    before = modelfile.file_bytes(path)
    fused = fuse_layers(proto, path.parent) if fusing else {}
    records = tuple(_record(site, layer, fused.get(site.name)) for site, layer in pairs)
    write_record(proto, before, records, ())
    return Imported(proto, records, (), target, path, before, feeds, published)


def _match(published: Checkpoint, model: ModelProto, path: Path) -> list[tuple[Site, PublishedLayer]]:
    """The site of each layer, in the order of the checkpoint; refuses the first that differs."""
    found = find(model, path.parent)
    for entry in found.skipped:
        raise ModelError(f"{path}: {entry.name}: {entry.reason}; export the network in evaluation mode, as float32")
    names = [layer.name for layer in published.layers]
    sites = _label(found.sites, names)
    pairs = []
    for layer in published.layers:
        there = f"{layer.name} is {list(layer.shape)} in {published.path.name}"
        if layer.name not in sites:
            raise ModelError(f"{there}, and {path} has no such layer; give an ONNX model of the same network")
        site = sites[layer.name]
        other = _other_than(site, layer)
        if other is not None:
            raise ModelError(f"{there} and {other} in {path}; give an ONNX model of the same network")
        pairs.append((site, layer))
    for name, site in sites.items():
        if name not in names:
            raise ModelError(f"{name} is {list(site.shape)} in {path}, and {published.path.name} has no such layer")
    _refuse_norms(model.graph, {site.name: layer.name for site, layer in pairs}, path)
    unnamed = sum(layer.name not in _names(site) for site, layer in pairs)
    if unnamed:
        _log.warning("%s: %d of %d layers have no name of the checkpoint; matched by order", path, unnamed, len(pairs))
    return pairs


def _label(sites: Sequence[Site], names: Sequence[str]) -> dict[str, Site]:
    """Sites by the name of their layer: their own name, or that of their place if all names that there are agree."""
    by_name: dict[str, Site] = {}
    for site in sites:
        free = (name for name in _names(site) if name in names and name not in by_name)
        by_name[next(free, site.name)] = site
    labels = [*names[: len(sites)], *(site.name for site in sites[len(names) :])]
    by_order = dict(zip(labels, sites, strict=True))
    agree = all(by_order.get(name) is site for name, site in by_name.items() if name in names)
    return by_order if agree and not set(names) <= set(by_name) else by_name


def _names(site: Site) -> list[str]:
    """What torch may call the layer: by its weight, and by the modules in its node's name.

    Exporters name nodes ``/layer1/layer1.0/conv1/Conv``; a part that starts with the one before it continues it.
    """
    by_weight = site.name.removesuffix(".weight")
    modules: list[str] = []
    for part in site.node.name.strip("/").split("/")[:-1]:
        if modules and part.startswith(modules[-1] + "."):
            modules.pop()
        modules.append(part)
    return [by_weight, ".".join(modules)]


def _other_than(site: Site, layer: PublishedLayer) -> str | None:
    """What the model has in the place of a layer, where that is of another kind or shape."""
    if site.scope.parent is not None or not isinstance(site.scope.proto, GraphProto):
        return "inside a subgraph or function"
    convolution = len(layer.shape) > 2
    view = site.view("ihw")
    shape = site.shape if convolution else (view.rows, view.cols)
    if site.op_type != ("Conv" if convolution else "Gemm"):
        return f"the {list(shape)} weight of a {site.op_type}"
    return None if shape == layer.shape else str(list(shape))


def _refuse_norms(graph: GraphProto, weights: Mapping[str, str], path: Path) -> None:
    outputs = {node.output[0]: weights[node.input[1]] for node in _layers(graph, weights)}
    for node in graph.node:
        if node.op_type == "BatchNormalization" and node.input[0] in outputs:
            raise ModelError(
                f"{path}: a BatchNormalization follows {outputs[node.input[0]]}, where the checkpoint has it folded; "
                "export the network in evaluation mode"
            )


def _layers(graph: GraphProto, weights: Mapping[str, object]) -> list[NodeProto]:
    return [n for n in graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 1 and n.input[1] in weights]


def _put_biases(model: ModelProto, biases: Mapping[str, tuple[NDArray[Any], int]]) -> None:
    """Give each layer, by the name of its weight, a bias of an element type, stored in the precision that it has.

    A Cast in front makes one type of the other; runtimes fold it.
    """
    graph = model.graph
    writer = Writer(all_names(model))
    old: set[str] = set()
    for node in _layers(graph, biases):
        values, elem_type = biases[node.input[1]]
        name = writer.constant(values)
        if elem_type != helper.np_dtype_to_tensor_dtype(values.dtype):
            name = writer.node("Cast", [name], to=elem_type)
        old |= set(node.input[2:])
        del node.input[2:]
        node.input.append(name)
    graph.initializer.extend(writer.constants.values())
    _drop_unread(graph, old)
    set_nodes(graph, [*writer.take(), *graph.node])


def _drop_unread(graph: GraphProto, names: set[str]) -> None:
    """Remove constants among ``names`` that nothing reads any more, and the nodes that handed them on."""
    unread = names - {name for node in graph.node for name in node_reads(node)} - {out.name for out in graph.output}
    if not unread:
        return
    remove_entries(graph.initializer, lambda tensor: tensor.name in unread)
    remove_entries(graph.input, lambda entry: entry.name in unread)
    makers = [node for node in graph.node if set(node.output) & unread]
    behind = {name for node in makers for name in node.input if name}
    remove_entries(graph.node, lambda node: bool(set(node.output) & unread))
    _drop_unread(graph, behind)


def _record(site: Site, layer: PublishedLayer, fused: str | None) -> LayerRecord:
    """How the layer came here; how far it is from the model's own weight means nothing, as that need not be trained."""
    options = {"words": layer.form.words, "width": layer.form.width}
    return LayerRecord(
        name=site.name,
        op_type=site.op_type,
        shape=site.shape,
        method="kill-the-bits" if layer.compressed else str(np.dtype(layer.form.codebooks.dtype)),
        options=options if layer.compressed else {},
        bytes=layer.form.nbytes,
        weight_snr_db=None,
        output_snr_db=None,
        fused=() if fused is None else (fused,),
    )
