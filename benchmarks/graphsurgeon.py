"""What an import and export with onnx-graphsurgeon that changes nothing does to real models (docs/decisions.md).

python benchmarks/graphsurgeon.py
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import onnx
import onnx_graphsurgeon
from common import data_dir

_ASPECTS: dict[str, Callable[[onnx.ModelProto], object]] = {
    "nodes": lambda model: [node.SerializeToString() for node in model.graph.node],
    "order of initializers": lambda model: [tensor.name for tensor in model.graph.initializer],
    "inputs": lambda model: [entry.name for entry in model.graph.input],
    "value_info": lambda model: [entry.name for entry in model.graph.value_info],
    "metadata_props": lambda model: [(entry.key, entry.value) for entry in model.metadata_props],
}


def main() -> None:
    paths = sorted([*data_dir().glob("zoo/*/*.onnx"), *data_dir().glob("models/*.onnx")])
    changed = 0
    print("| model | bytes before | after | changed |\n|---|---|---|---|")
    for path in paths:
        before = onnx.load(path)
        after = onnx_graphsurgeon.export_onnx(onnx_graphsurgeon.import_onnx(before), do_type_check=False)
        aspects = [name for name, look in _ASPECTS.items() if look(before) != look(after)]
        changed += bool(aspects)
        print(f"| {path.stem} | {before.ByteSize():,} | {after.ByteSize():,} | {', '.join(aspects) or '-'} |")
    version = importlib.metadata.version("onnx-graphsurgeon")
    print(f"\n{changed} of {len(paths)} models changed; onnx-graphsurgeon {version}")


if __name__ == "__main__":
    main()
