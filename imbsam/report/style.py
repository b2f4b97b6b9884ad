"""What distinguishes groups of runs in every figure: a colour, a dash and a marker."""

# ten hues with a contrast of at least 3 on white and on the dark page (WCAG 2.2, 1.4.11); tested
COLOURS = (
    "#3079bd",
    "#c9651a",
    "#2f8f5b",
    "#d1495b",
    "#8f63bd",
    "#9a7040",
    "#c4599a",
    "#77838f",
    "#8c8519",
    "#16909f",
)
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = {"circle": "●", "square": "■", "diamond": "◆", "triangle-up": "▲"}


def colour(group: int) -> str:
    """The colour of a group, by its place in the table."""
    return COLOURS[group % len(COLOURS)]


def dash(group: int) -> str:
    """The dash of a group's lines; changes once the colours are used up."""
    return DASHES[group // len(COLOURS) % len(DASHES)]


def symbol(group: int) -> str:
    """The marker of a group's points; neighbours have different ones."""
    return list(SYMBOLS)[group % len(SYMBOLS)]
