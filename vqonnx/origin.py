"""What a fused node was made of, kept in its metadata as JSON (docs/format.md), and how the nodes are made again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from onnx import NodeProto

from vqonnx.fused import CODED, FusedOp
from vqonnx.ops import DOMAIN

KEY = "vqonnx"
_OWN = ("perm", "coding", "precision")  # attributes of the fused op that its layer does not have


@dataclass(frozen=True)
class Origin:
    """The nodes that a fused node stands for: ``Decode``, the layer, and its tail.

    Attributes:
        weight: Name of the weight that ``Decode`` yielded; empty if there was none.
        places: Positions of the nodes in the file that was fused.
        values: Names of the values between the layer and the end of the tail.
        names: Names of ``Decode`` and of the nodes of the tail, if one has any; the layer has that of the fused node.
        added: Attributes that the layer did not have.
        bias: Inputs of the layer behind the weight; None if that is ``B``.
        bias_shape: Shape of the layer's own constant bias, if ``B`` was made from it.
        limits: Inputs of Clip behind the value; None if they are ``min`` and ``max``.
        swapped: Add has the residual first, or Mul the sigmoid.
        texts: ``doc_string`` and metadata of ``Decode`` and of the tail, a list for each; empty if there are none.
    """

    weight: str = ""
    places: tuple[int, ...] = ()
    values: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    bias: tuple[str, ...] | None = None
    bias_shape: tuple[int, ...] | None = None
    limits: tuple[str, ...] | None = None
    swapped: bool = False
    texts: tuple[Any, ...] = ()

    def to_json(self) -> str:
        """In few bytes; what has its default is left out."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def of(cls, node: NodeProto, op: FusedOp) -> Origin | None:
        """What a node's metadata say; None if they say nothing that fits it."""
        for entry in node.metadata_props:
            if entry.key == KEY:
                try:
                    content: dict[str, Any] = json.loads(entry.value)
                    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
                    origin = cls(**values)
                except (ValueError, TypeError, AttributeError):
                    return None
                return origin if origin._fits(op) else None
        return None

    def _fits(self, op: FusedOp) -> bool:
        def are(kind: type, values: Any, count: int | None = None) -> bool:
            return (
                isinstance(values, tuple)
                and all(type(value) is kind for value in values)
                and count in (None, len(values))
            )

        others = op.coded + len(op.tail)  # nodes besides the layer
        return (
            type(self.weight) is str
            and (self.weight != "") == op.coded
            and are(int, self.places, 1 + others)
            and are(str, self.values, len(op.tail))
            and all(self.values)
            and (are(str, self.names, others) or self.names == ())
            and are(str, self.added)
            and (self.bias is None or are(str, self.bias))
            and (self.bias_shape is None or are(int, self.bias_shape))
            and (self.limits is None or are(str, self.limits))
            and (are(list, self.texts, others) or self.texts == ())
        )


def texts_of(nodes: Sequence[NodeProto]) -> tuple[Any, ...]:
    """What nodes say besides what they compute, for `Origin.texts`."""
    texts = [[node.doc_string, [[entry.key, entry.value] for entry in node.metadata_props]] for node in nodes]
    return tuple(texts) if any(text != ["", []] for text in texts) else ()


def restore(node: NodeProto, op: FusedOp, origin: Origin) -> list[NodeProto]:
    """The nodes that a fused node stands for, in order: ``Decode``, the layer, and its tail."""
    given = dict(zip(op.inputs, node.input, strict=True))
    own = {attribute.name: attribute for attribute in node.attribute if attribute.name in _OWN and op.coded}
    nodes: list[NodeProto] = []
    if op.coded:
        decode = NodeProto(op_type="Decode", domain=DOMAIN, input=[given[name] for name in CODED])
        decode.output.append(origin.weight)
        decode.attribute.extend(own[name] for name in ("perm", "coding") if name in own)
        nodes.append(decode)

    layer = NodeProto()
    layer.CopyFrom(node)
    layer.op_type = op.operator
    layer.ClearField("domain")
    del layer.input[:], layer.output[:], layer.attribute[:], layer.metadata_props[:]
    bias = origin.bias if origin.bias is not None else [given["B"]] if "B" in given else []
    weight = [origin.weight] if op.coded else [given["W"]] if "W" in given else []
    layer.input.extend([given["X"], *weight, *bias])
    layer.attribute.extend(a for a in node.attribute if a.name not in (*own, *origin.added))
    layer.metadata_props.extend(entry for entry in node.metadata_props if entry.key != KEY)

    nodes.append(layer)
    outputs = [*origin.values, node.output[0]]
    layer.output.append(outputs[0])
    for number, step in enumerate(op.tail):
        inputs = [outputs[number]]
        if step == "Add":
            inputs.insert(0 if origin.swapped else 1, given["Z"])
        elif step == "Mul":
            inputs.insert(1 if origin.swapped else 0, outputs[0])
        elif step == "Clip":
            inputs += [given["min"], given["max"]] if origin.limits is None else origin.limits
        nodes.append(NodeProto(op_type=step, input=inputs, output=[outputs[number + 1]]))
    others = [other for other in nodes if other is not layer]
    for other, name in zip(others, origin.names, strict=False):
        if name:
            other.name = name
    for other, (text, props) in zip(others, origin.texts, strict=False):
        if text:
            other.doc_string = text
        for key, value in props:
            other.metadata_props.add(key=key, value=value)
    return nodes
