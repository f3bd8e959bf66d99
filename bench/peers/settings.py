"""What `python -m bench peers` measures: the settings of `bench model` with kinds of layouts and contenders of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..model import settings as model
from ..model.layouts import QUOTA, SPREAD
from ..model.settings import Settings, _in_order
from ..settings import OneLineParser, _check_choice
from .registry import NAMES

KINDS = (QUOTA, SPREAD)


@dataclass(frozen=True)
class PeerSettings(Settings):
    """As `bench.model.settings.Settings`, with kinds of its own and the names of `bench.peers.registry`."""

    layouts: tuple[str, ...] = KINDS
    contenders: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        for flag, values, choices in (("--layout", self.layouts, KINDS), ("--contender", self.contenders, NAMES)):
            for value in values:
                _check_choice(flag, value, choices)
        Settings(**{**_values(self), "layouts": (), "contenders": ()})  # refuses what is wrong with the rest


def parse(arguments: Sequence[str]) -> PeerSettings:
    """Settings from what follows the word `peers`.

    Raises:
        UsageError: unknown flag, or a value that is refused.
    """
    own, others = _parser().parse_known_args(arguments)
    chosen = {
        "layouts": _in_order("--layout", own.layout, KINDS),
        "contenders": _in_order("--contender", own.contender, NAMES),
    }
    return PeerSettings(**{**_values(model.parse(others)), **chosen})


def _values(settings: Settings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(Settings)}


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m bench peers",
        description="Compares this package with CTS, DToP and both in eager PyTorch, at the same weights and recorded decisions, "
        "and with ToMe where its own package is installed.",
        epilog="All other options are those of `python -m bench model --help`, with the same defaults; writes peers.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--layout", nargs="+", help=f"kinds of layouts: {', '.join(KINDS)} (default: all)")
    parser.add_argument("--contender", action="append", help=f"only this one; may be repeated ({'; '.join(NAMES)})")
    return parser
