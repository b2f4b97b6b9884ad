"""Draws the pictures of architecture.md from the import statements of the source files."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

PACKAGES = ("imbsam", "lightning_modules", "datamodules")
ENGINE = (
    "sam",
    "class_aware_sam",
    "partitioned_sam",
    "partition",
    "surrogate_gap",
    "step",
    "batch",
    "extra_passes",
    "distributed",
    "perturbation",
    "gradients",
    "snapshot",
    "reduce_overhead",
    "row_weights",
    "reference",
)
OTHER_MODULES = {"errors": "imbsam: the engine", "report": "imbsam.report", "command": "imbsam: the command"}

Graph = dict[str, set[str]]


def module_imports(root: Path) -> Graph:
    """The modules of ours that each of our modules imports, by dotted names."""
    files = {_name(path.relative_to(root)): path for package in PACKAGES for path in (root / package).rglob("*.py")}
    found: Graph = {}
    for name, path in files.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {target if target in files else node.module for target in whole}
        found[name] = {target for target in imported if target in files and target != name}
    return found


def folders(imports: Graph) -> Graph:
    """The imports between folders; the engine counts as a folder."""

    def folder_of(module: str) -> str:
        parts = module.split(".")
        if parts[0] == "imbsam":
            if len(parts) == 1 or parts[1] in (*ENGINE, "capture"):
                return "imbsam: the engine"
            return OTHER_MODULES.get(parts[1], "imbsam: losses, metrics, sharpness")
        return ".".join(parts[:2]) if len(parts) > 2 else parts[0]

    found: Graph = {}
    for module, targets in imports.items():
        into = found.setdefault(folder_of(module), set())
        into |= {folder_of(target) for target in targets} - {folder_of(module)}
    return found


def engine(imports: Graph) -> Graph:
    """The imports between the files of the engine."""
    names = {f"imbsam.{name}": f"{name}.py" for name in ENGINE if f"imbsam.{name}" in imports}
    return {shown: {names[t] for t in imports[module] if t in names} for module, shown in names.items()}


def draw(graph: Mapping[str, Iterable[str]], path: Path) -> None:
    """Draw the graph as an SVG, with importing modules above the imported ones."""
    layers = _layers(graph)
    width, height = max(len(layer) for layer in layers), len(layers)
    figure, axes = plt.subplots(figsize=(max(8.0, 2.7 * width), 1.15 * height))
    place = {
        name: ((i + 0.5) / len(layer), 1 - (row + 0.5) / height)
        for row, layer in enumerate(layers)
        for i, name in enumerate(layer)
    }
    for name, targets in graph.items():
        for target in targets:
            arrow = {"arrowstyle": "-|>", "color": "0.6", "shrinkA": 12, "shrinkB": 12}
            axes.annotate("", xy=place[target], xytext=place[name], arrowprops=arrow)
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#eef3fa", "edgecolor": "#3b6ea5"}
        axes.text(x, y, name, ha="center", va="center", fontsize=10, bbox=box)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def _layers(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Layers from what nothing imports downwards; modules that import each other share a layer."""
    depth: dict[str, int] = {}

    def visit(name: str, above: tuple[str, ...]) -> int:
        if name not in depth:
            below = [visit(t, (*above, name)) for t in sorted(graph.get(name, ())) if t not in (*above, name)]
            depth[name] = 1 + max(below, default=-1)
        return depth[name]

    for name in sorted(graph):
        visit(name, ())
    return [[n for n in sorted(depth) if depth[n] == d] for d in range(max(depth.values()), -1, -1)]


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main(root: Path, static: Path) -> None:
    """Write both pictures."""
    imports = module_imports(root)
    draw(folders(imports), static / "architecture.svg")
    draw(engine(imports), static / "engine.svg")


if __name__ == "__main__":
    main(Path(__file__).resolve().parents[1], Path(__file__).parent / "_static")
