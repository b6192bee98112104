"""Every legal recipe, spelled out by hand, for tests that run over all of them."""

from __future__ import annotations

from itertools import product

from sparse_bitnet.recipe import Recipe

TERNARY = [
    {"values": "ternary", "order": order, "mask_from": mask_from, "gradient": gradient}
    for order, mask_from, gradient in product(
        ["quant-then-mask", "mask-then-quant"], ["latent", "quantized"], ["dense", "masked"]
    )
]
OTHERS = [
    {"values": values, "gradient": gradient} for values, gradient in product(["sign", "full"], ["dense", "masked"])
]
SETTINGS = [*TERNARY, *OTHERS]


def all_recipes(pattern: str, activations: tuple[str, ...] = ("int8", "int4", "none")) -> list[Recipe]:
    return [Recipe(pattern, activations=kind, **settings) for settings in SETTINGS for kind in activations]


def quantizing_recipes(pattern: str, activations: tuple[str, ...] = ("int8", "int4", "none")) -> list[Recipe]:
    """Those that have codes, hence a scale and a packed form."""
    return [recipe for recipe in all_recipes(pattern, activations) if recipe.values != "full"]
