"""Tables of ``gradguide inspect``, printed with rich."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["show"]

_ALL = "(all)"


def show(found: dict[str, Any]) -> None:
    """Print the results of ``gradguide.cli.inspect``.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError('tables need rich: pip install "gradguide[demo]", or use --json') from error
    console = Console(markup=False)  # names may contain brackets
    source = found["source"]
    console.print(_summary(source))
    console.print(
        _layers(
            "by layer", source["layers"], {"numbers": "numbers", "gradient_norm": "|s0|", "fisher_trace": "sum of F"}
        )
    )
    if "against" in found:
        against = found["against"]
        title = f"cosine with {against['path']} over {against['shared']} shared tensors"
        whole = {"layer": _ALL, **{key: against[key] for key in ("gradient_cosine", "fisher_cosine")}}
        columns = {"gradient_cosine": "s0", "fisher_cosine": "F"}
        console.print(_layers(title, [whole, *against["layers"]], columns))
    if "drift" in found:
        drift = found["drift"]
        keys = {"distance": "distance", "relative": "relative", "modelled_rise": "modelled rise of the loss"}
        whole = {"layer": _ALL, **{key: drift[key] for key in keys}}
        title = f"drift of {drift['path']}, {drift['matched']} tensors"
        console.print(_layers(title, [whole, *drift["layers"]], keys))


def _summary(source: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(show_header=False, show_edge=False)
    metadata = source["metadata"]
    rows = {
        "file": source["path"],
        "kind": source["kind"],
        "tensors": f"{source['tensors']:,}",
        "numbers": f"{source['numbers']:,}",
        "bytes": f"{source['bytes']:,}",
        "examples": metadata.get("examples"),
        "mean loss": metadata.get("loss"),
        "Fisher information": metadata.get("curvature"),
        "adapter": metadata.get("adapter"),
        "|s0|": source["gradient_norm"],
        "sum of F": source["fisher_trace"],
        **{f"captured with {name}": version for name, version in (metadata.get("versions") or {}).items()},
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, _text(value))
    return table


def _layers(title: str, layers: list[dict[str, Any]], columns: dict[str, str]) -> Table:
    from rich.table import Table

    prefix = _common([layer["layer"] for layer in layers if layer["layer"] != _ALL])
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column(f"layer of {prefix[:-1]}" if prefix else "layer", overflow="fold")
    shown = {key: head for key, head in columns.items() if any(layer[key] is not None for layer in layers)}
    for head in shown.values():
        table.add_column(head, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(layer["layer"].removeprefix(prefix), *(_text(layer[key]) for key in shown))
    return table


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
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
