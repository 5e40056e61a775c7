"""Which layers attend to a window only; llama.cpp knows that by the architecture."""

from __future__ import annotations

from collections.abc import Callable

from quantkit.arch.base import Config, refuse

_KINDS = ("sliding_attention", "full_attention")


def check_pattern(config: Config, arch: str, is_windowed: Callable[[int], bool]) -> None:
    """Refuse a `layer_types` or `sliding_window_pattern` that is not llama.cpp's."""
    types = config.text.get("layer_types")
    n_layers = config.count("num_hidden_layers")
    expected = [_KINDS[0] if is_windowed(i) else _KINDS[1] for i in range(n_layers)]
    if types is None and config.has("sliding_window_pattern"):
        period = config.count("sliding_window_pattern")
        types = [_KINDS[bool(period) and i % period == period - 1] for i in range(n_layers)]
    if types is not None and types != expected:
        refuse(f"layer_types {str(types)[:200]}: llama.cpp's {arch} has another pattern")
