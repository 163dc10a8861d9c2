"""Walk through the layers in order, each with its inputs as the already compressed layers before it make them.

The model is cut at every layer. What is alive at a cut (the frontier) is kept for each calibration batch, in memory up
to a limit and in a temporary folder above it; the nodes up to the next layer start from there. So every node runs once
over the calibration data, and memory does not grow with their number.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, shape_inference

from vqonnx.errors import DataError, VqonnxError
from vqonnx.graph import Site
from vqonnx.modelfile import inlined, make_tensor
from vqonnx.moments import Moments, MomentsAccumulator
from vqonnx.place import node_reads
from vqonnx.runtime import open_session, run
from vqonnx.scope import attributes, scopes
from vqonnx.unfold import unfold
from vqonnx.view import Order

# Rows that are looked at for each column of a layer's weight; second moments need some 30 to be trusted.
_ROWS_PER_COLUMN = 32
_LEAST_POSITIONS = 16
_MEMORY_LIMIT = 2**28  # bytes of values between layers that a walk keeps in memory

Batch = dict[str, Any]


class Walk:
    """Observe sites one after the other, replacing their weights on the way. A context manager: it holds a folder.

    Args:
        model: The original model; not changed.
        folder: Where it lies, for external data.
        sites: Those that will be observed, in order of their layers.
        feeds: Calibration batches; read once.
        positions: Output positions of each image that are looked at; None takes as many as the layer's size wants.
        seed: Seed for the choice of positions.

    Raises:
        DataError: There are no batches, or a batch does not run, or gives NaN or Inf.
    """

    def __init__(
        self,
        model: ModelProto,
        folder: str | Path,
        sites: Iterable[Site],
        feeds: Iterable[Mapping[str, Any]],
        *,
        positions: int | None = None,
        seed: int = 0,
    ) -> None:
        self._segments = _Segments(model, Path(folder))
        self._positions = positions
        self._rng = np.random.default_rng(seed)
        self._frontier = _Spool()
        self._at = 0
        self._images = 0
        with ExitStack() as undo:  # the folder goes away if the data cannot be read
            undo.enter_context(self._frontier)
            for feed in feeds:
                self._frontier.append(dict(feed))
                self._images += max((len(x) for x in feed.values() if isinstance(x, np.ndarray) and x.ndim), default=1)
            if not len(self._frontier):
                raise DataError("the calibration data hold no batch; give at least one")
            if not self._images:
                raise DataError("the calibration data hold no image: all batches are empty; give at least one")
            undo.pop_all()
        nodes = [site.node for site in sites if self.can_observe(site)]
        self._inputs = {at: n.input[0] for n in nodes if (at := self._segments.position(n)) is not None}
        self._wanted = self._segments.needed_for(self._inputs.values())

    def batches(self) -> Iterator[Batch]:
        """What is alive where the walk stands, for each calibration batch; at its beginning, the feeds."""
        return iter(self._frontier)

    def can_observe(self, site: Site) -> bool:
        """Whether the layer's input can be seen: it can in the main graph, not in subgraphs and functions."""
        return self._segments.position(site.node) is not None and not self._segments.is_constant(site.node.input[0])

    def observe(self, site: Site, order: Order) -> Moments:
        """Second moments of what the first layer of the site sees, in the column order of the weight's view."""
        accumulator: MomentsAccumulator | None = None
        for rows in self.rows(site, order):
            if accumulator is None:
                accumulator = MomentsAccumulator(rows.shape[0], rows.shape[2])
            accumulator.add(rows)
        assert accumulator is not None
        return accumulator.result()

    def rows(self, site: Site, order: Order) -> Iterator[NDArray[np.floating]]:
        """The rows ``[groups, n, cols]`` that the first layer of the site sees, batch by batch."""
        position = self._segments.position(site.node)
        assert position is not None, site.name
        self._advance(position)
        name = site.node.input[0]
        wanted = _ROWS_PER_COLUMN * site.view(order).cols
        positions = self._positions or max(_LEAST_POSITIONS, -(-wanted // self._images))
        for batch in self._frontier:
            rows = unfold(
                site.op_type,
                attributes(site.node),
                site.shape,
                np.asarray(batch[name], np.float32),
                order=order,
                positions=positions,
                rng=self._rng,
            )
            if not np.isfinite(rows).all():
                raise DataError(f"{site.name}: its inputs are not finite on the calibration data; check the data")
            yield rows

    def replace(self, site: Site, tensor: NDArray[np.float32]) -> None:
        """Use ``tensor`` as the weight of the site from here on."""
        self._segments.replace(site, tensor)

    def set_constant(self, tensor: TensorProto) -> None:
        """Use another value for an initializer of the main graph from here on."""
        self._segments.set_constant(tensor)

    def _advance(self, position: int) -> None:
        """Run the nodes before ``position`` that are still to run and are needed."""
        if position <= self._at:
            return
        nodes = [node for node in self._segments.nodes[self._at : position] if id(node) in self._wanted]
        alive = self._segments.alive_at(position, self._wanted)
        alive |= {name for at, name in self._inputs.items() if at >= position}
        before, self._frontier = self._frontier, _Spool()
        with before:
            made = {name for node in nodes for name in node.output}
            session = None
            for batch in before.drain():
                kept = {name: value for name, value in batch.items() if name in alive}
                if made & alive:
                    if session is None:
                        model = self._segments.model(nodes, batch, sorted(made & alive))
                        session = open_session(model.SerializeToString())
                    known = {entry.name for entry in session.get_inputs()}
                    kept |= run(session, {name: value for name, value in batch.items() if name in known})
                self._frontier.append(kept)
        self._at = position

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._frontier.__exit__(kind, error, trace)


class _Segments:
    """The nodes of the main graph in order, and small models made of runs of them."""

    def __init__(self, model: ModelProto, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._scope = scopes(model)[0]
        self._replaced: dict[str, TensorProto] = {}
        self._types: dict[str, ValueInfoProto] | None = None
        self._constants: dict[str, NodeProto] = {}  # nodes that depend on constants only, by output
        self.nodes: list[NodeProto] = []  # the others
        for node in model.graph.node:
            inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
            if (
                not inner
                and all(self.is_constant(name) for name in node.input)
                and (node.input or node.op_type == "Constant")
            ):
                self._constants.update((name, node) for name in node.output)
            else:
                self.nodes.append(node)
        self._positions = {id(node): position for position, node in enumerate(self.nodes)}

    def is_constant(self, name: str) -> bool:
        """Whether the value does not depend on the model's inputs."""
        return not name or name in self._scope.initializers or name in self._constants

    def position(self, node: NodeProto) -> int | None:
        return self._positions.get(id(node))

    def replace(self, site: Site, tensor: NDArray[np.float32]) -> None:
        if site.scope.proto is self._model.graph:
            self._replaced[site.name] = make_tensor(tensor, site.elem_type, site.name)

    def set_constant(self, tensor: TensorProto) -> None:
        self._replaced[tensor.name] = tensor

    def needed_for(self, names: Iterable[str]) -> set[int]:
        """The nodes (by id) that the named values depend on."""
        wanted, needed = set(names), set()
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                needed.add(id(node))
                wanted |= node_reads(node) - {""}  # the name of what is left out
        return needed

    def alive_at(self, position: int, wanted: set[int]) -> set[str]:
        """Values that the wanted nodes from ``position`` on read."""
        read: set[str] = set()
        for node in self.nodes[position:]:
            if id(node) in wanted:
                read |= node_reads(node)
        return read - {""}

    def model(self, nodes: list[NodeProto], batch: Batch, outputs: list[str]) -> ModelProto:
        """A model that computes ``outputs`` from values of ``batch``."""
        inputs, initializers, constants = self._closure(nodes, batch)
        graph = helper.make_graph(
            [*constants, *nodes],
            "segment",
            [self._input(name, batch[name]) for name in sorted(inputs)],
            [ValueInfoProto(name=name) for name in outputs],
            initializer=initializers,
        )
        return helper.make_model(
            graph,
            opset_imports=self._model.opset_import,
            ir_version=max(self._model.ir_version, 4),
            functions=self._model.functions,
        )

    def _closure(self, nodes: list[NodeProto], batch: Batch) -> tuple[set[str], list[TensorProto], list[NodeProto]]:
        """What the nodes read: values of the batch, initializers, and constant nodes (in order)."""
        made = {name for node in nodes for name in node.output}
        todo = {name for node in nodes for name in node_reads(node)} - made - {""}
        inputs: set[str] = set()
        initializers: dict[str, TensorProto] = {}
        constants: dict[int, NodeProto] = {}
        while todo:
            name = todo.pop()
            if name in batch:
                inputs.add(name)
            elif name in self._replaced:
                initializers[name] = self._replaced[name]
            elif name in self._scope.initializers:
                initializers[name] = inlined(self._scope.initializers[name], self._folder)
            elif name in self._constants and id(self._constants[name]) not in constants:
                node = self._constants[name]
                constants[id(node)] = node
                todo |= set(node.input) - {""}
        ordered = [node for node in self._model.graph.node if id(node) in constants]
        return inputs, list(initializers.values()), ordered

    def _input(self, name: str, value: Any) -> ValueInfoProto:
        if isinstance(value, np.ndarray):
            kind = TensorProto.STRING if value.dtype.kind in "OUS" else helper.np_dtype_to_tensor_dtype(value.dtype)
            return helper.make_tensor_value_info(name, kind, [None] * value.ndim)
        if self._types is None:  # sequences and optional values say too little of their type: ask shape inference
            graph = shape_inference.infer_shapes(self._model).graph
            self._types = {info.name: info for info in (*graph.value_info, *graph.input)}
        if name not in self._types:
            raise DataError(
                f"cannot calibrate through '{name}', whose type is unknown; use a method without calibration"
            )
        return self._types[name]


class _Spool:
    """Batches in order: in memory up to a limit, in a temporary folder above it."""

    def __init__(self) -> None:
        self._batches: list[Batch | Path] = []
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, batch: Batch) -> None:
        size = sum(value.nbytes if isinstance(value, np.ndarray) else 0 for value in batch.values())
        if self._bytes + size <= _MEMORY_LIMIT:
            self._bytes += size
            self._batches.append(batch)
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="vqonnx-calibration-")
        path = Path(self._folder.name) / str(len(self._batches))
        try:
            with path.open("wb") as file:
                pickle.dump(batch, file, protocol=pickle.HIGHEST_PROTOCOL)
        except OSError as error:
            folder = tempfile.gettempdir()
            raise VqonnxError(f"{folder}: no room for calibration data ({error.strerror}); set TMPDIR") from error
        self._batches.append(path)

    def __iter__(self) -> Iterator[Batch]:
        return map(_read, self._batches)

    def drain(self) -> Iterator[Batch]:
        """The same, once: a batch leaves memory or disk when it has been read, and makes room for what comes of it."""
        batches, self._batches = self._batches[::-1], []
        while batches:
            kept = batches.pop()
            batch = _read(kept)
            if isinstance(kept, Path):
                kept.unlink()
            yield batch

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._batches = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _read(kept: Batch | Path) -> Batch:
    """A batch of a spool."""
    if not isinstance(kept, Path):
        return kept
    with kept.open("rb") as file:
        batch: Batch = pickle.load(file)
    return batch
