"""Pictures of a sweep. They are drawn without a display."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanovllm.errors import MissingDependencyError
from nanovllm.sim.sweep import Row, digits, on_frontier, varied

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart by all eyes; and each has a mark of its own.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#b8b8b8"
FEW = 4  # settings whose bands of uncertainty can still be told apart
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "nanovllm",  # the same picture is the same file
}


def require_matplotlib() -> None:
    """
    Raises:
        MissingDependencyError: it is not there.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "bench", "drawing a sweep") from error


class Series:
    """The rows of one setting, by rate, and how they are drawn."""

    def __init__(self, name: str, rows: list[Row], number: int | None) -> None:
        self.name, self.rows = name, rows
        self.color, self.mark, self.order = GREY, ".", 1.0
        self.size, self.width = 5.0, 0.8
        if number is not None:
            self.color, self.mark, self.order = COLORS[number], MARKS[number], 3 + number / 10
            # the later ones lie on top and are thinner: of two that are equal both are seen
            self.size, self.width = 8.5 - 0.6 * number, 3.2 - 0.3 * number

    def points(self, x: str, y: str) -> tuple[list[float], list[float], list[float]]:
        """Means of two metrics, and half the interval of the second (0 if there is none)."""
        xs, ys, halves = [], [], []
        for row in self.rows:
            across = row.setting[x] if x in row.setting else row.mean(x)
            up = row.interval(y)
            if across is not None and up is not None:
                xs.append(float(across))
                ys.append(up.mean)
                halves.append(up.half or 0.0)
        return xs, ys, halves


def series_of(rows: Sequence[Row]) -> list[Series]:
    """The settings apart from their rate. As many as there are colours are told apart, those with
    most rows on the frontier and then the fastest; the others are grey."""
    axes = [axis for axis in varied(rows) if axis != "request_rate"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.error:
            groups.setdefault(row.name(axes), []).append(row)
    best = {id(row) for row in on_frontier(rows)}
    names = list(groups)

    def place(name: str) -> tuple[int, float]:
        times = [row.mean("e2e_ms_mean") or 0.0 for row in groups[name]]
        return -sum(id(row) in best for row in groups[name]), sum(times) / len(times)

    ranked = sorted(names, key=place)
    chosen = [name for name in names if name in ranked[: len(COLORS)]]
    number = {name: i for i, name in enumerate(chosen)}
    return [Series(name, groups[name], number.get(name)) for name in names]


def draw_all(rows: Sequence[Row], folder: str, form: str) -> tuple[list[str], list[str]]:
    """Write the pictures that the rows have the numbers for.

    Args:
        form: "svg" or "png".

    Returns:
        the files, and for each picture that was left out why.
    """
    import matplotlib

    groups, written, left_out = series_of(rows), [], []
    if not groups:
        return [], ["no pictures: no setting can run"]
    pictures = {"frontier": draw_frontier, "latency": draw_latency}
    if any(row.mean("goodput") and row.mean("cost_per_million_output_tokens") for row in rows):
        pictures["cost"] = draw_cost
    else:
        left_out.append(
            "no picture of cost against goodput: it needs --price and --ttft-target-ms or "
            "--tpot-target-ms"
        )
    with matplotlib.rc_context(STYLE):
        for name, draw in pictures.items():
            path = f"{folder}/{name}.{form}"
            date = {"Date": None} if form == "svg" else {}
            draw(groups, rows).savefig(path, dpi=150, metadata=date)
            written.append(path)
    return written, left_out


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure((width, height), layout="constrained")


def draw_frontier(groups: Sequence[Series], rows: Sequence[Row]) -> "Figure":
    """Output throughput against mean time from end to end, and the frontier under all points."""
    figure = new_figure(7, 4.8)
    axes = figure.add_subplot()
    best = on_frontier(rows)
    corners = [(row.mean("output_throughput"), row.mean("e2e_ms_mean")) for row in best]
    if len(corners) > 1:
        axes.plot(*zip(*corners, strict=True), color="#dddddd", linewidth=9, zorder=0,
                  solid_capstyle="round", label="frontier")  # fmt: skip
    for one in groups:
        draw_line(axes, one, "output_throughput", "e2e_ms_mean")
    axes.set(xlabel="output throughput (tokens/s)", ylabel="mean latency, end to end (ms)")
    axes.set_title("Latency against throughput: lower right is better")
    axes.xaxis.set_major_formatter(lambda value, _: digits(value))
    finish(figure, [axes], groups)
    return figure


def draw_latency(groups: Sequence[Series], rows: Sequence[Row]) -> "Figure":
    """TTFT and TPOT: against the load, or without one a bar from p50 to p99 for each setting."""
    if "request_rate" not in varied(rows):
        return draw_bars(groups)
    figure = new_figure(9.5, 4.8)
    panels = list(figure.subplots(1, 2))
    rates = sorted({float(row.setting["request_rate"]) for row in rows})
    few = len(groups) <= FEW
    for axes, kind in zip(panels, ("ttft", "tpot"), strict=True):
        for one in groups:
            draw_line(axes, one, "request_rate", f"{kind}_ms_p99", band=few)
            if one.color != GREY:
                xs, ys, _ = one.points("request_rate", f"{kind}_ms_p50")
                axes.plot(xs, ys, "--", color=one.color, linewidth=1.1, zorder=2)
        axes.set(xlabel="load (requests/s)", ylabel=f"{kind.upper()} (ms)")
        banded = few and any(len(row.reports) > 1 for row in rows)
        band = " (95% band)" if banded else ""
        axes.set_title(f"{kind.upper()}: p99 solid{band}, p50 dashed")
        if rates[-1] > 5 * rates[0]:
            axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
    finish(figure, panels, groups)
    return figure


def draw_bars(groups: Sequence[Series]) -> "Figure":
    figure = new_figure(9.5, 1.6 + 0.32 * len(groups))
    panels = list(figure.subplots(1, 2, sharey=True))
    for axes, kind in zip(panels, ("ttft", "tpot"), strict=True):
        for y, one in enumerate(groups):
            for row in one.rows:
                low, high = row.mean(f"{kind}_ms_p50"), row.mean(f"{kind}_ms_p99")
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=GREY, linewidth=2, zorder=2)
                    axes.plot(low, y, "o", color="white", markeredgecolor=COLORS[0], zorder=3)
                    axes.plot(high, y, "o", color=COLORS[0], zorder=3)
        axes.set_xlabel(f"{kind.upper()} (ms)")
        axes.set_title(f"{kind.upper()}: p50 open, p99 filled")
        scale_logs(axes, "x")
        axes.grid(axis="y", visible=False)
    panels[0].set_yticks(range(len(groups)), [one.name for one in groups])
    panels[0].invert_yaxis()
    return figure


def draw_cost(groups: Sequence[Series], rows: Sequence[Row]) -> "Figure":
    figure = new_figure(7, 4.8)
    axes = figure.add_subplot()
    for one in groups:
        draw_line(axes, one, "goodput", "cost_per_million_output_tokens")
    axes.set(xlabel="goodput (requests/s that meet their targets)")
    axes.set_ylabel("cost (US$ per million output tokens)")
    axes.set_title("Cost against goodput: lower right is better")
    axes.set_xlim(left=0)
    finish(figure, [axes], groups)
    return figure


def draw_line(axes: "Axes", one: Series, x: str, y: str, band: bool = False) -> None:
    xs, ys, halves = one.points(x, y)
    axes.plot(xs, ys, color=one.color, marker=one.mark, markersize=one.size, linewidth=one.width,
              zorder=one.order)  # fmt: skip
    if band and any(halves) and one.color != GREY:
        low = [max(value - half, 0.05 * value) for value, half in zip(ys, halves, strict=True)]
        high = [value + half for value, half in zip(ys, halves, strict=True)]
        axes.fill_between(xs, low, high, color=one.color, alpha=0.15, linewidth=0)


def scale_logs(axes: "Axes", which: str) -> None:
    """A logarithmic axis if its values need one, with numbers in full."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis: Any = axes.xaxis if which == "x" else axes.yaxis
    lines: list[Any] = list(axes.lines)
    data = (one.get_xdata() if which == "x" else one.get_ydata() for one in lines)
    values = [float(value) for values in data for value in values if value > 0]
    plain = FuncFormatter(lambda value, _: digits(value))
    if values and max(values) > 8 * min(values):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        wide = max(values) > 300 * min(values)
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
    else:
        if which == "x":
            axes.set_xlim(0, 1.03 * axes.get_xlim()[1])
        else:
            axes.set_ylim(0, 1.03 * axes.get_ylim()[1])
    axis.set_major_formatter(plain)


def finish(figure: "Figure", panels: Sequence["Axes"], groups: Sequence[Series]) -> None:
    """Scale the axes, and put the legend below them, where no data are."""
    from matplotlib.lines import Line2D

    for axes in panels:
        scale_logs(axes, "y")
    handles = [
        Line2D(
            [],
            [],
            label=one.name,
            color=one.color,
            marker=one.mark,
            markersize=one.size,
            linewidth=one.width,
        )
        for one in groups
        if one.color != GREY
    ]
    num_grey = sum(one.color == GREY for one in groups)
    if num_grey:
        label = f"{num_grey} other settings"
        handles.append(Line2D([], [], color=GREY, marker=".", linewidth=0.8, label=label))
    for axes in panels[:1]:
        extra = [line for line in axes.lines if line.get_label() == "frontier"]
        handles += extra
    if len(handles) > 1:
        longest = max(len(str(handle.get_label())) for handle in handles)
        most = max(1, int(figure.get_figwidth() * 11 / (longest + 8)))
        columns = -(-len(handles) // -(-len(handles) // most))  # rows of about equal length
        figure.legend(handles=handles, loc="outside lower center", ncols=columns)
