"""What the C source takes on an ARM Cortex-M, where its compiler is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

COMPILER = "arm-none-eabi-gcc"  # Debian's package gcc-arm-none-eabi
_SECONDS = 60


@dataclass(frozen=True)
class Compiled:
    """Bytes of an object file: code with constants, and static memory."""

    flash: int
    memory: int


def compiled(source: Path, cpu: str = "cortex-m4") -> Compiled | None:
    """Return what a source takes, compiled for size (`-Os`); None if there is no compiler, or if it fails.

    Library functions that the linker may add are not included.

    Args:
        source: The source. Its header is in the same folder.
        cpu: Name of the processor, as the compiler knows it.
    """
    if shutil.which(COMPILER) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "network.o"
        command = [COMPILER, f"-mcpu={cpu}", "-mthumb", "-std=c99", "-Os", "-c", str(source), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
            size = subprocess.run(
                [COMPILER.replace("gcc", "size"), str(made)], check=True, capture_output=True, timeout=_SECONDS
            )
        except (OSError, subprocess.SubprocessError):
            return None
    text, data, bss = map(int, size.stdout.decode().splitlines()[1].split()[:3])
    return Compiled(text + data, data + bss)
