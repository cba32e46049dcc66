"""Names of slices -> chips and how they are joined. Imports nothing heavy.

v6e:2x4 (chips along each axis), v6e-8 (Google's accelerator type), h200:8 or h200x8, cpu.
"""

import math
import re
from dataclasses import dataclass

from jaxserve.config import ConfigError
from jaxserve.engine.chips import CHIPS, Chip

# What can be rented, smallest first: (axes in chips). A host has up to 8 chips of v5e and v6e, 4 of the others.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
SLICES: dict[str, tuple[tuple[int, ...], ...]] = {
    "v5e": _FLAT,
    "v6e": _FLAT,
    "v5p": ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)),
    "tpu7x": ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)),
    "h100": ((1,), (2,), (4,), (8,)),
    "h200": ((1,), (2,), (4,), (8,)),
    "cpu": ((1,),),
}
_CHIPS_PER_HOST = {"v5e": 8, "v6e": 8, "v5p": 4, "tpu7x": 4, "h100": 8, "h200": 8, "cpu": 1}
_DEVICES_PER_CHIP = {"tpu7x": 2}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "7x": "tpu7x", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}
_CORES_PER_CHIP = {"v5p": 2, "tpu7x": 2}  # v5p-8 has 8 cores, which are 4 chips


@dataclass(frozen=True, slots=True)
class Slice:
    """Chips of one kind, joined along axes."""

    chip: Chip
    axes: tuple[int, ...]

    @property
    def name(self) -> str:
        if self.chip.platform == "cpu":
            return "cpu"
        return f"{self.chip.name}:{'x'.join(map(str, self.axes))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.axes)

    @property
    def num_devices(self) -> int:
        """As JAX counts them."""
        return self.num_chips * _DEVICES_PER_CHIP.get(self.chip.name, 1)

    @property
    def num_hosts(self) -> int:
        return -(-self.num_chips // _CHIPS_PER_HOST[self.chip.name])


def parse_slice(text: str) -> Slice:
    """Raises ConfigError that says what there is."""
    found = re.fullmatch(r"([a-z0-9]+?)(?:(?P<sign>[:\-x])(?P<size>\d+(?:x\d+)*))?", text.strip().lower())
    family = _ALIASES.get(found.group(1), found.group(1)) if found else ""
    if found is None or family not in CHIPS:
        raise ConfigError(f"topology {text!r} is not known; there are {', '.join(SLICES)}, as v6e:2x4, h200:8 or cpu")
    offered = SLICES[family]
    size, chip = found.group("size"), CHIPS[family]
    if size is None:
        return Slice(chip, offered[0])
    axes = tuple(map(int, size.split("x")))
    if len(axes) == 1 and len(offered[0]) > 1:
        cores = _CORES_PER_CHIP.get(family, 1) if found.group("sign") == "-" else 1
        axes = next((each for each in offered if math.prod(each) * cores == axes[0]), axes)
    if axes not in offered:
        names = ", ".join(Slice(chip, each).name for each in offered)
        raise ConfigError(f"topology {text!r} is not offered; of {family} there are {names}")
    return Slice(chip, axes)


def single_hosts(family: str) -> tuple[Slice, ...]:
    """The slices of a family that are one host, smallest first."""
    slices = (Slice(CHIPS[family], axes) for axes in SLICES[family])
    return tuple(each for each in slices if each.num_hosts == 1)
