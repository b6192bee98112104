"""What torch.compile is to be told of an accelerated model: options, and a pass over its graphs.

In a block of a transformer the residual is added to what a product gives. The compiler makes a kernel of that, which
reads both and writes their sum; a product on sparse tensor cores can add the residual to its sums before it writes
them, one rounding less, and a third of the bytes. The pass has it do so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from sparse_bitnet.kernels import sparse_product

ADD, PRODUCT = torch.ops.aten.add.Tensor, torch.ops.sparse_bitnet.sparse_product.default
ARGUMENTS = [argument.name for argument in PRODUCT._schema.arguments]


class AddInProducts(CustomGraphPass):
    """y = sparse_product(...) + residual, where y is all that the product is for, becomes one call of it."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.find_nodes(op="call_function", target=ADD)):
            for product, residual in (node.args, reversed(node.args)):
                if not node.kwargs and _can_add(product, residual, node):
                    _add_in_product(graph, product, residual, node)
                    break

    def uuid(self) -> Any:
        """What the compiler's cache knows the pass by."""
        return get_hash_for_files((__file__, str(sparse_product.__file__)))


COMPILE_OPTIONS: dict[str, Any] = {
    "triton.tiling_prevents_reduction_fusion": False,
    "split_reductions": False,
    "post_grad_custom_post_pass": AddInProducts(),
}
"""For `torch.compile(model, options=...)` of an accelerated model. For up to 64 sequences that are written all that
stands between two of its products, quantisation and norm, is one kernel with them; in prompts a product adds the
residual. The pass takes the place of torch._inductor.config.post_grad_custom_post_pass."""


def _can_add(product: Any, residual: Any, total: Node) -> bool:
    """Whether `product` is one without a residual, `total` all that reads it, and `residual` just such a tensor."""
    if not isinstance(product, Node) or product.target is not PRODUCT or not isinstance(residual, Node):
        return False
    if set(product.users) != {total} or _arguments(product).get("residual") is not None or product is residual:
        return False
    like = product.meta["val"]
    return all(_is_like(node.meta.get("val"), like) for node in (residual, total))


def _is_like(value: Any, other: Tensor) -> bool:
    """Whether, whatever sizes are unknown yet, it is a tensor of the same dtype that lies in memory alike."""
    if not isinstance(value, Tensor) or value.dtype != other.dtype or value.ndim != other.ndim:
        return False
    if not statically_known_true(sym_eq(tuple(value.shape), tuple(other.shape))):
        return False
    of_each = zip(value.shape, value.stride(), other.stride(), strict=True)
    return all(statically_known_true(size == 1) or statically_known_true(one == two) for size, one, two in of_each)


def _add_in_product(graph: Graph, product: Node, residual: Node, total: Node) -> None:
    with graph.inserting_before(total):
        arguments = _arguments(product) | {"residual": residual}
        joint = graph.call_function(PRODUCT, tuple(arguments[name] for name in ARGUMENTS))
    joint.meta.update(val=total.meta["val"])
    total.replace_all_uses_with(joint)
    graph.erase_node(total)
    graph.erase_node(product)


def _arguments(product: Node) -> dict[str, Any]:
    return dict(zip(ARGUMENTS, product.args, strict=False)) | dict(product.kwargs)
