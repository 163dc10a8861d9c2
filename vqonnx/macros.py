"""Runs of nodes that occur again and again (layers, blocks) as functions of their own, each call one short node.

The functions lie in a domain of one letter, and runtimes put their nodes in the place of the calls when they load the
model. They are found as byte pair encoding finds words: the most frequent pair of a node and the only reader of its
output becomes one, again and again; what does not pay for its function in the end is taken apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from onnx import FunctionProto, ModelProto, NodeProto, helper

from vqonnx.breakdown import field_bytes
from vqonnx.modelfile import remove_entries, set_nodes
from vqonnx.names import STANDARD, short_names, spaces, subgraphs

DOMAIN = "v"
_FUNCTION_IR_VERSION = 8


@dataclass(frozen=True)
class _Leaf:
    """What nodes that differ in names alone have in common.

    Attributes:
        content: The node without names, serialised.
        given: Which inputs are not left out.
    """

    content: bytes
    given: tuple[bool, ...]

    @property
    def arity(self) -> int:
        return sum(self.given)

    @property
    def size(self) -> int:
        return 1


@dataclass(frozen=True)
class _Pair:
    """A pattern whose output goes into an input of another one and nowhere else.

    Attributes:
        slot: Which of the inputs of ``consumer``.
    """

    producer: _Leaf | _Pair
    consumer: _Leaf | _Pair
    slot: int

    @property
    def arity(self) -> int:
        return self.producer.arity + self.consumer.arity - 1

    @property
    def size(self) -> int:
        return self.producer.size + self.consumer.size


_Pattern = _Leaf | _Pair


@dataclass(frozen=True, eq=False)
class _Run:
    """Nodes of the graph that are an instance of a pattern; one node and None where there can be none."""

    nodes: tuple[NodeProto, ...]
    pattern: _Pattern | None
    inputs: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        return str(self.nodes[-1].output[0])


def gather_runs(model: ModelProto) -> None:
    """Move the nodes of each run of the main graph to where its last one is, as `inline` will find them."""
    if not _allowed(model):
        return
    for _ in range(len(model.graph.node)):  # moving nodes may change which of equally frequent pairs comes first
        before = list(model.graph.node)
        after = [node for run in _find(model) for node in run.nodes]
        if [id(node) for node in after] == [id(node) for node in before]:
            return
        set_nodes(model.graph, after)


def write_macros(model: ModelProto) -> None:
    """Put calls in the place of runs of nodes, and add the functions; nothing happens where there can be none."""
    if not _allowed(model):
        return
    runs = _find(model)
    names = short_names(set())
    macros: dict[_Pattern, _Macro] = {}
    nodes: list[NodeProto] = []
    for run in runs:
        if run.pattern is None or run.pattern not in macros:
            macro = _Macro.of(run.pattern, runs, model) if run.pattern is not None else None
            if macro is None or macro.saves <= 0:
                nodes += run.nodes
                continue
            assert run.pattern is not None
            macro.function.name = next(names)
            macros[run.pattern] = macro
        nodes.append(macros[run.pattern].call(run))
    if macros:
        set_nodes(model.graph, nodes)
        model.functions.extend(macro.function for macro in macros.values())
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def inline(model: ModelProto) -> None:
    """Undo `write_macros`: nodes instead of calls. Values inside get short names, those of other domains first."""
    functions = {function.name: function for function in model.functions if _is_macro(function)}
    if not functions:
        return
    nodes: list[NodeProto] = []
    inside: dict[bool, list[str]] = {True: [], False: []}  # whether a standard operator yields it
    for call in model.graph.node:
        if call.domain != DOMAIN or call.op_type not in functions:
            nodes.append(call)
            continue
        function = functions[call.op_type]
        names = dict(zip(function.input, call.input, strict=True)) | {function.output[0]: call.output[0]}
        for inner in function.node:
            node = NodeProto()
            node.CopyFrom(inner)
            name = inner.output[0]
            if name not in names:
                names[name] = f"\0{len(nodes)}"  # until it is known which names are free
                inside[inner.domain in STANDARD].append(names[name])
            node.input[:] = [names.get(each, each) for each in inner.input]
            node.output[0] = names[name]
            nodes.append(node)
    fresh = short_names({name for space in spaces(model)[0].all for name in space.uses})
    given = dict(zip([*inside[False], *inside[True]], fresh, strict=False))
    for node in nodes:
        node.input[:] = [given.get(name, name) for name in node.input]
        node.output[:] = [given.get(name, name) for name in node.output]
    set_nodes(model.graph, nodes)
    remove_entries(model.functions, _is_macro)
    if not any(function.domain == DOMAIN for function in model.functions):
        remove_entries(model.opset_import, lambda entry: entry.domain == DOMAIN)


def _is_macro(function: FunctionProto) -> bool:
    plain = all(len(node.output) == 1 and not any(True for _ in subgraphs(node)) for node in function.node)
    return function.domain == DOMAIN and plain and not function.attribute and len(function.output) == 1


def _allowed(model: ModelProto) -> bool:
    """Whether the model has functions already, so that its readers know them, and the domain is free."""
    free = all(entry.domain != DOMAIN for entry in model.opset_import)
    return free and model.ir_version >= _FUNCTION_IR_VERSION and len(model.functions) > 0


@dataclass(frozen=True, eq=False)
class _Macro:
    """A function for a pattern.

    Attributes:
        function: The function; its name is given last.
        places: Which inputs of the pattern are inputs of the function; the others are always the same as one of them.
        saves: Bytes that all calls together save, the function counted.
    """

    function: FunctionProto
    places: tuple[int, ...]
    saves: int

    @classmethod
    def of(cls, pattern: _Pattern, runs: Sequence[_Run], model: ModelProto) -> _Macro:
        instances = [run.inputs for run in runs if run.pattern == pattern]
        first = [
            next(j for j in range(pattern.arity) if all(inputs[j] == inputs[i] for inputs in instances))
            for i in range(pattern.arity)
        ]
        names = short_names(set())
        arguments = {place: next(names) for place in sorted(set(first))}
        output = next(names)
        nodes = list(_build(pattern, [arguments[place] for place in first], output, names))
        domains = {"" if node.domain == "ai.onnx" else node.domain for node in nodes}
        imports = [e for e in model.opset_import if ("" if e.domain == "ai.onnx" else e.domain) in domains]
        function = helper.make_function(DOMAIN, "a", list(arguments.values()), [output], nodes, imports)
        call = helper.make_node("a", ["aa"] * len(arguments), ["aa"], domain=DOMAIN)
        if len(instances) < 2:
            return cls(function, tuple(arguments), 0)
        each = sum(_bytes(leaf) for leaf in _leaves(pattern)) - field_bytes(call)
        return cls(function, tuple(arguments), len(instances) * each - field_bytes(function))

    def call(self, run: _Run) -> NodeProto:
        """The node that takes the place of a run."""
        inputs = [run.inputs[place] for place in self.places]
        return helper.make_node(self.function.name, inputs, [run.output], domain=DOMAIN)


def _find(model: ModelProto) -> list[_Run]:
    """The nodes of the main graph in runs, each where its last node is; those that do not pay are single nodes."""
    (main, *_) = spaces(model)
    runs = [_single(node) for node in model.graph.node]
    reads = Counter(name for node in model.graph.node for name in node.input)
    alone = {name for name, count in reads.items() if count == 1} - main.leaving
    while True:
        places = {
            run.output: place for place, run in enumerate(runs) if run.pattern is not None and run.output in alone
        }
        found: Counter[_Pair] = Counter()
        for run in runs:
            for slot, name in enumerate(run.inputs if run.pattern is not None else ()):
                if name in places:
                    producer, consumer = runs[places[name]].pattern, run.pattern
                    assert producer is not None
                    assert consumer is not None
                    found[_Pair(producer, consumer, slot)] += 1
        pair, count = max(found.items(), key=lambda entry: entry[1], default=(None, 0))
        if pair is None or count < 2:
            break
        runs = _merge(runs, pair, places)
    return _worthwhile(runs, model)


def _single(node: NodeProto) -> _Run:
    """One node as a run; without a pattern if no function can hold it."""
    if len(node.output) != 1 or not any(node.input) or node.metadata_props or any(True for _ in subgraphs(node)):
        return _Run((node,), None)
    bare = NodeProto()
    bare.CopyFrom(node)
    for name in ("name", "input", "output"):
        bare.ClearField(name)
    leaf = _Leaf(bare.SerializeToString(deterministic=True), tuple(map(bool, node.input)))
    return _Run((node,), leaf, tuple(filter(None, node.input)))


def _merge(runs: list[_Run], pair: _Pair, places: dict[str, int]) -> list[_Run]:
    """Make one run of each two that are the pair."""
    merged: list[_Run | None] = list(runs)
    for place, run in enumerate(runs):
        name = run.inputs[pair.slot] if run.pattern == pair.consumer else None
        producer = merged[places[name]] if name in places else None
        if producer is None or producer.pattern != pair.producer or merged[place] is not run:
            continue
        inputs = (*run.inputs[: pair.slot], *producer.inputs, *run.inputs[pair.slot + 1 :])
        merged[place] = _Run(producer.nodes + run.nodes, pair, inputs)
        merged[places[str(name)]] = None
    return [run for run in merged if run is not None]


def _worthwhile(runs: list[_Run], model: ModelProto) -> list[_Run]:
    """Take runs apart until each pattern pays for its function."""
    while True:
        patterns = dict.fromkeys(run.pattern for run in runs if isinstance(run.pattern, _Pair))
        poor = {pattern for pattern in patterns if pattern and _Macro.of(pattern, runs, model).saves <= 0}
        if not poor:
            return runs
        largest = max(pattern.size for pattern in poor)
        poor = {pattern for pattern in poor if pattern.size == largest}
        runs = [part for run in runs for part in (_apart(run) if run.pattern in poor else [run])]


def _apart(run: _Run) -> list[_Run]:
    """The two runs that one was made of."""
    assert isinstance(run.pattern, _Pair)
    producer, consumer, slot = run.pattern.producer, run.pattern.consumer, run.pattern.slot
    first, second = run.nodes[: producer.size], run.nodes[producer.size :]
    own = run.inputs[slot : slot + producer.arity]
    others = (*run.inputs[:slot], str(first[-1].output[0]), *run.inputs[slot + producer.arity :])
    return [_Run(first, producer, own), _Run(second, consumer, others)]


def _leaves(pattern: _Pattern) -> Iterator[_Leaf]:
    if isinstance(pattern, _Leaf):
        yield pattern
    else:
        yield from _leaves(pattern.producer)
        yield from _leaves(pattern.consumer)


def _bytes(leaf: _Leaf) -> int:
    """Bytes of a node in a graph, where names have two letters."""
    node = NodeProto.FromString(leaf.content)
    node.input.extend("aa" if given else "" for given in leaf.given)
    node.output.append("aa")
    return field_bytes(node)


def _build(pattern: _Pattern, inputs: list[str], output: str, names: Iterator[str]) -> Iterator[NodeProto]:
    """The nodes of a pattern between values of these names; values inside get fresh ones."""
    if isinstance(pattern, _Leaf):
        node = NodeProto.FromString(pattern.content)
        left = iter(inputs)
        node.input.extend(next(left) if given else "" for given in pattern.given)
        node.output.append(output)
        yield node
        return
    between, arity, slot = next(names), pattern.producer.arity, pattern.slot
    yield from _build(pattern.producer, inputs[slot : slot + arity], between, names)
    yield from _build(pattern.consumer, [*inputs[:slot], between, *inputs[slot + arity :]], output, names)
