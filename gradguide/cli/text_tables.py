"""Print the tables of ``gradguide inspect`` as plain text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["show"]

_ALL = "(all)"
# Titles of the columns by key; a column without a value is left out.
_SOURCE = {
    "numbers": "numbers",
    "gradient_norm": "|s0|",
    "fisher_trace": "sum of F",
    "rank": "rank",
    "input_kept": "S kept",
    "output_kept": "G kept",
    "scale": "E|y|^2",
    "anchored": "anchor",
}
_AGAINST = {"gradient_cosine": "s0", "fisher_cosine": "F", "input_cosine": "S", "output_cosine": "G"}
_DRIFT = {
    "distance": "distance",
    "relative": "relative",
    "modelled_rise": "modelled rise of the loss",
    "modelled_kl": "modelled drift, nats per token",
}


def show(found: dict[str, Any]) -> None:
    """Print the results of ``inspect_stored`` or ``inspect_structured``."""
    source = found["source"]
    print("\n".join(_grid([[name, _text(value)] for name, value in _summary(source) if value is not None], "<<")))
    _show_layers("by layer", source["layers"], _SOURCE)
    if "against" in found:
        against = found["against"]
        kind = "layers" if "input_cosine" in against else "tensors"
        title = f"cosine with {against['path']} over {against['shared']} shared {kind}"
        _show_layers(title, [{**against, "layer": _ALL}, *against["layers"]], _AGAINST)
    if "drift" in found:
        drift = found["drift"]
        kind = "layers" if "modelled_kl" in drift else "tensors"
        outside = len(drift.get("outside", ()))
        others = drift.get("others", ())
        more = f"; {outside} adapted layers are not in the source" if outside else ""
        more += f"; not counted: {', '.join(others)}" if others else ""
        title = f"drift of {drift['path']}, {drift['matched']} {kind}{more}"
        _show_layers(title, [{**drift, "layer": _ALL}, *drift["layers"]], _DRIFT)


def _summary(source: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    metadata = source["metadata"]
    yield "file", source["path"]
    yield "kind", source["kind"]
    yield "tensors", source.get("tensors")
    yield "layers", len(source["layers"]) if "input_kept" in source else None
    yield "numbers", source["numbers"]
    yield "bytes", source["bytes"]
    yield "base model", (metadata.get("base") or {}).get("id")
    for key in ("examples", "tokens", "predictions", "rank", "text"):
        yield key, metadata.get(key)
    yield "mean loss", metadata.get("loss")
    yield "Fisher information", metadata.get("curvature")
    yield "adapter", metadata.get("adapter")
    yield "|s0|", source.get("gradient_norm")
    yield "sum of F", source.get("fisher_trace")
    yield "S kept", source.get("input_kept")
    yield "G kept", source.get("output_kept")
    for name, version in (metadata.get("versions") or {}).items():
        yield f"captured with {name}", version


def _show_layers(title: str, layers: list[dict[str, Any]], columns: dict[str, str]) -> None:
    prefix = _common([layer["layer"] for layer in layers if layer["layer"] != _ALL])
    shown = {key: head for key, head in columns.items() if any(layer.get(key) is not None for layer in layers)}
    rows = [[f"layer of {prefix[:-1]}" if prefix else "layer", *shown.values()]]
    rows += [[layer["layer"].removeprefix(prefix), *(_text(layer.get(key)) for key in shown)] for layer in layers]
    print("\n".join(["", title, *_grid(rows, "<" + ">" * len(shown))]))


def _grid(rows: list[list[str]], sides: str) -> Iterator[str]:
    """Return lines with aligned columns.

    Args:
        sides: one character for each column, "<" for left and ">" for right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{side}{n}}" for cell, side, n in zip(row, sides, widths, strict=True)).rstrip()


def _common(names: list[str]) -> str:
    """Return the common prefix of dotted names, with its last dot. It excludes the last part of each name."""
    parts = [name.split(".") for name in names]
    shared = []
    for column in zip(*(part[:-1] for part in parts), strict=False):
        if len(set(column)) > 1:
            break
        shared.append(f"{column[0]}.")
    return "".join(shared)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
