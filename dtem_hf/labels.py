"""Names of methods and schedules, and units of multiply-adds, for tables, plots and cards."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .configuration import MergeConfig
from .schedule import ConstantSchedule, ListSchedule, as_schedule


# The order of tables: methods that learn come last.
_TITLES = {
    name: config.title for name, config in sorted(MergeConfig._methods.items(), key=lambda item: item[1].learns)
}
METHOD_NAMES = {"none": "unmerged", "tome": _TITLES["tome"], "soft": "ToMe, merged softly", **_TITLES}


def method_name(method: str) -> str:
    """The name of a method in tables and plots."""
    return METHOD_NAMES.get(method, method)


def reduction_label(r: Any) -> str:
    """The name of a schedule in tables and plots: "r=16", "flops=0.5", "linear r=8"; "–" for None.

    Raises ValueError for an r that is no schedule.
    """
    if r is None:
        return "–"
    schedule = as_schedule(r)
    if isinstance(schedule, (ConstantSchedule, ListSchedule)):
        return f"r={schedule.to_json()}"
    values = {f.name: getattr(schedule, f.name) for f in fields(schedule) if getattr(schedule, f.name) != f.default}  # type: ignore[arg-type]
    text = " ".join(f"{name}={value}" for name, value in values.items())
    return text if schedule.kind in values else f"{schedule.kind} {text}"


def multiply_adds_unit(largest: float) -> tuple[float, str]:
    """The unit for multiply-adds up to `largest`: its factor and its letter, G or M."""
    return (1e9, "G") if largest >= 1e9 else (1e6, "M")


def series_name(row: dict[str, Any]) -> str:
    """The name of a row's series in plots and tables: its method, and its adapter if the row names one."""
    name = method_name(row["method"])
    return f"{name} ({row['adapter']})" if row.get("adapter") else name
