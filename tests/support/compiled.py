"""C sources, compiled with all warnings as errors and with sanitizers, and run."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc compiles the C sources, and is not installed")
FLAGS = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O1", "-fsanitize=address,undefined")

MAIN = """\
#include <stdio.h>
#include "NAME.h"

int main(void)
{
    static VALUE input[PREFIX_INPUT_SIZE], output[PREFIX_OUTPUT_SIZE];
    while (fread(input, sizeof input, 1, stdin) == 1) {
        NAME(input, output);
        fwrite(output, sizeof output, 1, stdout);
    }
    return 0;
}
"""


class Program:
    """A compiled source, which reads inputs and writes outputs.

    Args:
        source: The source, with its header beside it.
        values: "int8" or "float32".
    """

    def __init__(self, source: Path, values: str) -> None:
        self.dtype = np.dtype(values)
        name, kind = source.stem, {"int8": "int8_t", "float32": "float"}[values]
        main = MAIN.replace("NAME", name).replace("PREFIX", name.upper()).replace("VALUE", kind)
        (source.parent / "main.c").write_text(main)
        self.binary = source.with_suffix("")
        sources = (str(source), str(source.parent / "main.c"))
        command = ("gcc", *FLAGS, "-fno-sanitize-recover=all", *sources, "-o", str(self.binary))
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the outputs of each row, shape `(n, outputs)`."""
        given = inputs.contiguous().numpy().astype(self.dtype).tobytes()
        done = subprocess.run((str(self.binary),), input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return torch.from_numpy(np.frombuffer(done.stdout, self.dtype).reshape(len(inputs), -1).copy())
