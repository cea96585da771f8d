"""What `shardtrain explore` does once its options are read."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from shardtrain.cli.explore import ExploreOptions
from shardtrain.cli.problem import load_problem
from shardtrain.errors import StrategyError
from shardtrain.explore import Exploration, explore
from shardtrain.explore.compiled import compiled_table
from shardtrain.planner.catalogue import CATALOGUE


def run(options: ExploreOptions) -> int:
    """Search, print, write files; 1 if nothing fits."""
    console = Console(highlight=False)
    if options.models:
        console.print(catalogue_table())
        return 0
    own = ".py:" in options.model
    problem = load_problem(options.model) if own else (options.model,)
    found = explore(
        *problem, hardware=options.hardware.split(","), global_batch=options.global_batch,
        sequence=options.sequence, rank=options.rank, prices=read_prices(options.price),
        compile_top=options.compile_top, **read_limits(options.limit),
    )  # fmt: skip
    console.print(found.table(options.rows, compact=console.width < 120))
    if found.compiled:
        console.print(compiled_table(found.compiled))
    for name, path in _write(found, options):
        console.print(f"{name}: {path}", markup=False)
    return 0 if found.ranked else 1


def _write(found: Exploration, options: ExploreOptions) -> list[tuple[str, str]]:
    """The files asked for; the picture only when something fits."""
    wrote = []
    if options.html:
        found.to_html(options.html)
        wrote.append(("page", options.html))
    if options.png and found.ranked:
        found.plot(options.png)
        wrote.append(("figures", options.png))
    if options.json:
        found.to_json(options.json)
        wrote.append(("JSON", options.json))
    return wrote


def read_limits(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`["tensor=1,2", "remat=full"]` -> values to try by field.

    Raises:
      StrategyError: One is not of the form field=values.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise StrategyError(f"--limit {text!r} is not of the form tensor=1,2")
        found[name.strip()] = tuple(_value(v.strip()) for v in values.split(","))
    return found


def read_prices(text: str | None) -> float | dict[str, float] | None:
    """`"2.5"` or `"h100=2.5,v5p=4.2"`: dollars per chip-hour.

    Raises:
      StrategyError: A price is not a number.
    """
    if text is None:
        return None
    try:
        if "=" not in text:
            return float(text)
        return {name.strip(): float(value) for name, _, value in
                (part.partition("=") for part in text.split(","))}  # fmt: skip
    except ValueError as error:
        raise StrategyError(
            f"--price {text!r} is neither a number nor of the form h100=2.5"
        ) from error


def _value(text: str) -> int | bool | str:
    if text.isdigit():
        return int(text)
    return text.lower() == "true" if text.lower() in ("true", "false") else text


def catalogue_table() -> Table:
    """Names, parameters and shape of the models that need no code."""
    table = Table(
        Column("model", no_wrap=True), "parameters", "layers", "width", "heads", "experts", "source"
    )
    for name, model in CATALOGUE.items():
        experts = f"{model.top_k} of {model.experts}" if model.experts else ""
        heads = f"{model.n_heads}/{model.n_kv_heads}"
        table.add_row(name, f"{model.params:,}", str(model.layers), str(model.d_model), heads,
                      experts, model.source)  # fmt: skip
    return table
