"""Check that a wheel holds what is imported at run time, and nothing else."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("tritonloss", "kernels_reference")
SHIPPED = ("**/*.py", "py.typed", "tuned/*.json", "tuned/README.md")


def main(wheel: str) -> int:
    """The exit status: 1 if the wheel's files are not those of the packages in the checkout."""
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in SHIPPED
        for path in (ROOT / package).glob(pattern)
    }
    for name in sorted(wanted - held):
        print(f"{wheel}: {name} is missing")
    for name in sorted(held - wanted):
        print(f"{wheel}: {name} does not belong there")
    print(f"{wheel}: {len(held)} files")
    return int(held != wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
