"""Ways to generate that evaluations state by name."""

from typing import Literal

from rlhf.sampling.methods import Greedy, Method, Sample

Preset = Literal["greedy", "standard", "liberal"]

PRESETS: dict[Preset, Method] = {
    "greedy": Greedy(),
    "standard": Sample(temperature=0.7, top_k=50.0, top_p=0.95),
    "liberal": Sample(temperature=0.85, top_k=2000.0),
}


def method_name(method: Method) -> str:
    """The preset that a method is, or its numbers."""
    return next((name for name, preset in PRESETS.items() if preset == method), repr(method))
