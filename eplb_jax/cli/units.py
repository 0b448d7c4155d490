"""Numbers with their units, as text for people."""

from collections.abc import Sequence


def percent(value: float) -> str:
    r"""Two digits, or all before the point.

    Example:
        >>> percent(1.174), percent(0.0634), percent(0.00006), percent(0)
        ('117\xa0%', '6.3\xa0%', '0.01\xa0%', '0\xa0%')
    """
    number = 100 * value
    if abs(number) < 0.005:
        return "0\N{NO-BREAK SPACE}%"
    digits = 0 if abs(number) >= 9.95 else 1 if abs(number) >= 0.995 else 2
    text = f"{number:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return f"{text}\N{NO-BREAK SPACE}%"


def size(value: float) -> str:
    r"""Bytes, in decimal units.

    Example:
        >>> size(44_040_192), size(87.9e9)
        ('44\xa0MB', '88\xa0GB')
    """
    return _scaled(value, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "B")


def seconds(value: float) -> str:
    r"""Seconds, or parts of one.

    Example:
        >>> seconds(1.234), seconds(0.0213)
        ('1.2\xa0s', '21\xa0ms')
    """
    sign, value = ("\N{MINUS SIGN}" if value < 0 else ""), abs(value)
    return sign + _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")), "s")


def _scaled(value: float, units: Sequence[tuple[float, str]], smallest: str) -> str:
    for unit, name in units:
        if value >= 0.9995 * unit:
            number = value / unit
            digits = 1 if number < 9.95 else 0
            return f"{number:,.{digits}f}\N{NO-BREAK SPACE}{name}"
    return f"{value:,.0f}\N{NO-BREAK SPACE}{smallest}"
