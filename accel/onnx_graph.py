"""What is mended in an exported ONNX graph before TensorRT sees it; graphs are those of onnx_ir."""

from __future__ import annotations

from typing import Any


def cast_bytes_first(graph: Any, half: str) -> None:
    """Cast pictures of bytes before anything else is done with them: TensorRT can neither transpose nor slice bytes."""
    import onnx_ir as ir

    to = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}[half]  # either holds 0 … 255 exactly
    for picture in graph.inputs:
        users = list(picture.uses())
        if picture.dtype != ir.DataType.UINT8 or not users:
            continue
        cast = _cast(picture, to)
        graph.insert_before(users[0][0], cast)
        for node, index in users:
            node.replace_input_with(index, cast.outputs[0])
        behind = [node for node, _ in users]
        while behind:  # what moved bytes about now moves numbers, up to the module's own cast
            node = behind.pop()
            if node.op_type != "Cast":
                for output in node.outputs:
                    output.dtype = to
                    behind += [user for user, _ in output.uses()]


def join_one_type(graph: Any) -> None:
    """Cast what is concatenated to the type that torch promotes it to, which the exporter forgets to do."""
    for node in list(graph):
        if node.op_type == "Concat":
            for index, value in enumerate(node.inputs):
                _recast(graph, node, index, value, node.outputs[0].dtype)


def widen_residuals(graph: Any) -> None:
    """Add what a gated feed-forward network gives to its input in float32: the same sum, but not in one kernel.

    TensorRT-RTX 1.7.1 finds no kernel for all of it on Turing (sm_75), and says so instead of taking two.
    """
    import onnx_ir as ir

    for node in list(graph):
        biased = (_maker(value, "Add") for value in node.inputs) if node.op_type == "Add" else ()
        products = [_maker(value, "MatMul") for add in biased if add for value in add.inputs]
        if not any(product and _maker(product.inputs[0], "Mul") for product in products):
            continue
        half, total = node.outputs[0].dtype, node.outputs[0]
        if half == ir.DataType.FLOAT:
            continue
        for index, value in enumerate(node.inputs):
            _recast(graph, node, index, value, ir.DataType.FLOAT)
        back = _cast(total, half)
        for user, index in list(total.uses()):
            user.replace_input_with(index, back.outputs[0])
        back.replace_input_with(0, total)
        total.dtype = ir.DataType.FLOAT
        graph.insert_after(node, back)


def _recast(graph: Any, node: Any, index: int, value: Any, to: Any) -> None:
    if value.dtype != to:
        cast = _cast(value, to)
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])


def _cast(value: Any, to: Any) -> Any:
    import onnx_ir as ir

    cast = ir.node("Cast", [value], attributes={"to": int(to)})
    found = cast.outputs[0]
    found.name, found.shape, found.dtype = f"{value.name}_as_{to.name.lower()}", value.shape, to
    return cast


def _maker(value: Any, kind: str) -> Any:
    """The node that makes a value, where it is of that kind."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None
